"""Deleting a tenant from a running service leaves nothing of it and affects no other tenant."""

from __future__ import annotations

import gzip

import orjson
import pytest
import trio

from betrace.service.api.audit import Operator
from betrace.service.export.archiver import archive_directory
from betrace.service.pipeline.recovery import removal
from betrace.service.pipeline.request import Done, Refused
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.paths import SHARED, tenant_archive
from betrace.service.tenancy.tenant import TenantState
from betrace.service.tenants import is_tenant_name
from tests.support.inprocess import closed, folded, running, send, settings, write_rules
from tests.support.spans import S

ME = Operator("tester", "here")
MARK = "marked"


def span(number):
    """A span that is a complete trace."""
    return S(number, MARK, number.to_bytes(16, "big"))


def files_with(directory, text):
    """The files that contain a text, except those that keep it: the ledger, the audit log, and the
    directory of tenants with its name."""
    kept = ("ledger.sqlite", "audit.jsonl", "tenants.sqlite")
    return [
        path
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(kept) and text.encode() in path.read_bytes()
    ]


def fill(directory, *tenants):
    for tenant in tenants:
        write_rules(directory, {f"{tenant}-rule": f"never {{ {MARK} }}"}, tenant)


async def some(service, *tenants, first=0):
    """Let tenants send traces that raise signals, and one that stays open."""
    for tenant in tenants:
        spans = [span(first + n + 1) for n in range(5)]
        assert isinstance(await send(service, spans, tenant), Done)
    await folded(service)


def signals(service, tenant):
    return service.store.signals(tenant)[0]


async def test_all_data_of_a_tenant_is_deleted_and_nothing_of_others(tmp_path):
    fill(tmp_path, "acme", "beta")
    archive = archive_directory(settings(tmp_path))
    for name in ("acme", "beta"):
        tenant_archive(archive, name).mkdir(parents=True)
        (tenant_archive(archive, name) / "spans.parquet").write_bytes(b"x")
    async with running(settings(tmp_path)) as service:
        await some(service, "acme", "beta")
        await closed(service)
        assert len(signals(service, "acme")) == len(signals(service, "beta")) == 5
        await some(service, "acme", "beta", first=10)  # these are open
        assert await service.tenants.delete(ME, "acme", 60)
        assert await service.tenants.get("acme") is None
        assert "acme" not in service.pipeline.open_traces.tenants
        assert not (tmp_path / "data" / "acme").exists()
        assert not (tmp_path / "rules" / "acme").exists()
        assert not tenant_archive(archive, "acme").exists()
        assert tenant_archive(archive, "beta").exists()
        assert files_with(tmp_path, "acme-rule") == []
        assert signals(service, "acme") == []
        refused = await send(service, [span(99)], "acme")
        assert (refused.status, "is deleted" in refused.message) == (403, True)
        await closed(service)
        assert len(signals(service, "beta")) == 10
        account = service.sources.account()
        lost = account.dead_lettered + account.discarded
        assert account.accepted == account.evaluated + account.in_flight + lost
    async with running(settings(tmp_path)) as service:  # nothing brings it back
        assert service.store.tenants() == ["beta"]
        assert service.log.tenants() == ["beta"]
        assert isinstance(await send(service, [span(98)], "beta"), Done)
        assert "acme" in service.gate.closed


async def test_a_tenant_is_deleted_while_it_sends(tmp_path):
    fill(tmp_path, "acme", "beta")
    outcomes = {"acme": [], "beta": []}

    async def sender(service, tenant, number):
        while True:
            spans = [span(number * 10_000 + len(outcomes[tenant]) + 1)]
            outcomes[tenant].append(await send(service, spans, tenant))

    async with running(settings(tmp_path)) as service, trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(sender, service, ("acme", "beta")[number % 2], number)
        with trio.fail_after(60):
            while not all(outcomes.values()):
                await trio.sleep(0.01)
        assert await service.tenants.delete(ME, "acme", 60)
        before, deleted = len(outcomes["beta"]), len(outcomes["acme"])
        with trio.fail_after(60):
            while len(outcomes["beta"]) == before or len(outcomes["acme"]) == deleted:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert not (tmp_path / "data" / "acme").exists()
    assert {type(outcome) for outcome in outcomes["beta"]} == {Done}
    assert len(outcomes["beta"]) > before
    kinds = [type(outcome) for outcome in outcomes["acme"]]
    assert kinds[0] is Done
    assert len(kinds) > deleted
    assert set(kinds[deleted:]) == {Refused}
    assert {outcome.status for outcome in outcomes["acme"] if isinstance(outcome, Refused)} == {403}


@pytest.mark.parametrize("stop", ["_hide", "_remove_files", "finish_deletion", "save"])
async def test_an_interrupted_deletion_continues_at_the_start(tmp_path, monkeypatch, stop):
    fill(tmp_path, "acme", "beta")

    def crash(*args):
        raise LedgerError("the ledger is away", transient=True)

    async with running(settings(tmp_path), die=True) as service:
        await some(service, "acme", "beta")
        await closed(service)
        await service.recovery.save()
        await some(service, "acme", "beta", first=10)
        with monkeypatch.context() as patched:
            if stop == "save":

                async def unsaved():
                    return False

                patched.setattr(service.recovery, "save", unsaved)
            elif stop == "finish_deletion":
                patched.setattr(service.gate.directory, stop, crash)
            else:
                patched.setattr(service.removal, stop, crash)
            assert not await service.tenants.delete(ME, "acme", 0.5)
            assert (await service.tenants.get("acme"))["state"] == "deleting"
            assert isinstance(await send(service, [span(7)], "acme"), Refused)
    async with running(settings(tmp_path)) as service:
        with trio.fail_after(60):
            while not service.removal.removed:
                await trio.sleep(0.02)
        assert not (tmp_path / "data" / "acme").exists()
        assert files_with(tmp_path, "acme-rule") == []
        assert service.gate.directory.in_state(TenantState.DELETED) == {"acme"}
        await closed(service)
        assert len(signals(service, "beta")) == 10
        assert signals(service, "acme") == []


async def test_a_recreated_tenant_starts_empty(tmp_path):
    fill(tmp_path, "acme")
    config = settings(tmp_path)
    async with running(config) as service:
        await some(service, "acme")
        await closed(service)
        assert await service.tenants.delete(ME, "acme", 60)
        await service.tenants.create(ME, "acme", None, None)
        fill(tmp_path, "acme")
        await service.reload_rules()
        await some(service, "acme", first=50)
        await closed(service)
        assert len(signals(service, "acme")) == 5
        service.store.remove("acme")
    async with running(config) as service:  # DuckDB is rebuilt from the ledger and the log
        found = signals(service, "acme")
        assert len(found) == 5
        assert {int(each.signal.trace_id, 16) for each in found} == set(range(51, 56))


async def test_fallback_files_and_dead_letters_are_deleted_too(tmp_path):
    fill(tmp_path, "acme", "beta")
    async with running(settings(tmp_path)) as service:
        service.pipeline.breakers.act("duckdb", "force-open")
        service.pipeline.breakers.act("ledger", "force-open")
        await some(service, "acme", "beta")
        await closed(service)
        fallbacks = service.pipeline.fallbacks
        assert all(fallback.pending for fallback in fallbacks.values())
        service.pipeline.breakers.act("rule-evaluation", "force-open")
        await some(service, "acme", "beta", first=10)
        await closed(service)
        letters = service.pipeline.letters
        assert {letter.tenant for letter in await letters.page(None, None, 99, 0)} == {
            "acme",
            "beta",
        }
        assert await service.tenants.delete(ME, "acme", 60)
        assert {letter.tenant for letter in await letters.page(None, None, 99, 0)} == {"beta"}
        assert files_with(tmp_path / "data" / "fallback", "acme") == []
        assert all(fallback.pending for fallback in fallbacks.values())
        for name in ("duckdb", "ledger", "rule-evaluation"):
            service.pipeline.breakers.act(name, "reset")
        for fallback in fallbacks.values():
            fallback.write_back_now()
        await letters.retry()
        with trio.fail_after(60):
            while len(signals(service, "beta")) < 10:
                await trio.sleep(0.05)
        account = service.sources.account()
        lost = account.dead_lettered + account.discarded
        assert account.accepted == account.evaluated + account.in_flight + lost
    assert not (tmp_path / "data" / "acme").exists()


async def test_tenants_named_like_shared_directories_are_harmless(tmp_path):
    names = ["rules", "fallback", "checkpoints", "dead-letters-exported", "log"]
    config = settings(tmp_path, rules={"directory": ""})
    async with running(config) as service:
        for name in names:
            service.tools.rule_writer.put(
                name,
                "r",
                {"name": "n", "condition": f"never {{ {MARK} }}", "severity": "low"},
                None,
            )
        await service.reload_rules()
        await some(service, *names)
        await closed(service)
        assert sorted(service.log.tenants()) == sorted(service.store.tenants()) == sorted(names)
        assert await service.tenants.delete(ME, "rules", 60)
        assert await service.tenants.delete(ME, "fallback", 60)
        for name in ("checkpoints", "dead-letters-exported", "log"):
            assert len(signals(service, name)) == 5
            assert service.registry.store.rule(name, "r").id == "r"
        data = tmp_path / "data"
        shared = {path.name for path in data.iterdir() if path.is_dir()} - {"log"}
        assert {name for name in shared if is_tenant_name(name)} <= SHARED
        assert (data / "fallback" / "ledger").is_dir()


async def test_many_tenants_are_deleted_at_once(tmp_path):
    async with running(settings(tmp_path)) as service:
        for n in range(20):
            await service.tenants.create(ME, f"t{n}", 5, None)
        done = [await service.removal.begin(f"t{n}") for n in range(20)]
        with trio.fail_after(60):
            for each in done:
                await each.wait()
        page, following = await service.tenants.page("", 10)
        assert (page, following) == ([], None)


def test_lines_are_dropped_from_fallback_files(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20, file_bytes=60)
    lines = [orjson.dumps({"tenant": tenant, "n": n}) for n in range(4) for tenant in ("a", "b")]
    for line in lines:
        files.append([line])
    files.set_aside(b'{"tenant":"a", broken')
    first = files.read(1, 1000)
    files.consume(first)
    assert files.drop(lambda line: b'"a"' in line) == 4  # one was consumed, one set aside
    kept = [line for page in files.pages(10) for line in page]
    assert kept == [line for line in lines if b'"b"' in line]
    assert files.statistics().lines == 4
    files.append([b'{"tenant":"c"}'])
    assert (files.drop(lambda line: False), files.statistics().lines) == (0, 5)
    assert files.drop(lambda line: True) == 5
    assert files.pending == 0
    assert list(tmp_path.glob("*.new")) == []
    files.close()


async def test_exported_letters_of_the_tenant_are_deleted(tmp_path):
    async with running(settings(tmp_path)) as service:
        folder = tmp_path / "data" / "dead-letters-exported"
        folder.mkdir()
        for name, tenants in (("one", "ab"), ("two", "a"), ("three", "b")):
            lines = [orjson.dumps({"tenant": tenant}) + b"\n" for tenant in tenants]
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
        await service.pipeline.letters.forget_tenant("a")
        left = {path.name: gzip.decompress(path.read_bytes()) for path in folder.iterdir()}
        assert left == dict.fromkeys(
            ("one.jsonl.gz", "three.jsonl.gz"), orjson.dumps({"tenant": "b"}) + b"\n"
        )


async def test_a_failed_deletion_is_retried(tmp_path, monkeypatch):
    monkeypatch.setattr(removal, "RETRY_SECONDS", 0.05)
    fill(tmp_path, "acme")
    async with running(settings(tmp_path)) as service:
        await some(service, "acme")
        real, failures = service.store.remove, [OSError("busy"), OSError("busy")]

        def remove(tenant):
            if failures:
                raise failures.pop()
            real(tenant)

        monkeypatch.setattr(service.store, "remove", remove)
        assert await service.tenants.delete(ME, "acme", 60)
        assert not failures
