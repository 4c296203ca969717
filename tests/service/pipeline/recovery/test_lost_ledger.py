"""A service does not start with an empty ledger beside a full DuckDB; the ledger is rebuilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from betrace.service.cli.main import cli
from betrace.service.config.settings import Settings
from betrace.service.pipeline.request import Done
from betrace.service.signals import Kind
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from tests.support.inprocess import (
    active_signals,
    closed,
    ledger_signals,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.spans import S


def trace(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def filled(tmp_path: Path, *, die: bool) -> tuple[Settings, list[Any], set[tuple[str, str]]]:
    """A service that raised, retracted and raised again; its signals and the active ones."""
    write_rules(tmp_path, {"more-a": "count(a) > count(b)", "no-c": "never { c }"})
    write_rules(tmp_path, {"more-a": "count(a) > count(b)"}, "acme")
    config = settings(tmp_path)
    async with running(config, die=die) as service:
        for span in (S(1, "a"), S(2, "b"), S(3, "a")):
            assert await send(service, [span]) == Done(1)
            await closed(service)
        assert await send(service, [S(4, "c", trace=trace(2))]) == Done(1)
        assert await send(service, [S(5, "a", trace=trace(3))], "acme") == Done(1)
        await closed(service)
        signals = ledger_signals(service) + ledger_signals(service, "acme")
        active = active_signals(service)
    assert [s.kind for s in signals].count(Kind.RETRACTED) == 1
    assert max(s.episode for s in signals) == 1
    return config, signals, active


def betrace(config: Settings, *more: str) -> Any:
    data = str(config.storage.path)
    return CliRunner().invoke(cli, ["ledger", "rebuild", "--data", data, "--json", *more])


def by_id(signals: list[Any]) -> list[Any]:
    return sorted(signals, key=lambda signal: str(signal.id))


def lose(config: Settings, how: str) -> None:
    path = config.storage.path / "ledger.sqlite"
    for name in ("-wal", "-shm", ""):
        path.with_name(path.name + name).unlink(missing_ok=True)
    if how == "empty":
        path.touch()
    elif how == "new":
        SqliteLedger(path).close()


async def starts(config: Settings) -> None:
    async with running(config):
        pass


@pytest.mark.parametrize("how", ["gone", "empty", "new"])
async def test_the_start_is_refused_and_the_ledger_is_rebuilt(tmp_path, how):
    config, signals, active = await filled(tmp_path, die=how == "gone")
    lose(config, how)
    with pytest.raises(LedgerError, match="betrace ledger rebuild"):
        await starts(config)
    if how == "gone":
        assert not (config.storage.path / "ledger.sqlite").exists()
    done = betrace(config)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"tenants": 2, "signals": len(signals), "uncertain": []}
    async with running(config) as service:
        found = ledger_signals(service) + ledger_signals(service, "acme")
        assert by_id(found) == by_id(signals)
        assert active_signals(service) == active
        assert service.ledger.balances("default") == {"more-a": 1, "no-c": 1}
        # A late span retracts what was raised before.
        assert await send(service, [S(6, "b")]) == Done(1)
        await closed(service)
        assert service.ledger.balances("default") == {"more-a": 0, "no-c": 1}


async def test_a_repetition_and_a_whole_ledger_change_nothing(tmp_path):
    config, signals, _ = await filled(tmp_path, die=False)
    for _ in range(2):
        assert json.loads(betrace(config).stdout)["signals"] == 0
    async with running(config) as service:
        found = ledger_signals(service) + ledger_signals(service, "acme")
        assert found == signals


async def test_an_older_copy_is_completed(tmp_path):
    write_rules(tmp_path, {"no-a": "never { a }"})
    config = settings(tmp_path)
    path = config.storage.path / "ledger.sqlite"
    async with running(config) as service:
        assert await send(service, [S(1, "a", trace=trace(1))]) == Done(1)
        await closed(service)
    shutil.copy(path, tmp_path / "backup")
    async with running(config) as service:
        assert await send(service, [S(2, "a", trace=trace(2))]) == Done(1)
        await closed(service)
        signals = ledger_signals(service)
    shutil.copy(tmp_path / "backup", path)
    assert json.loads(betrace(config).stdout)["signals"] == 1
    async with running(config) as service:
        assert ledger_signals(service) == signals


async def test_new_entries_are_numbered_above_all_known_ones(tmp_path):
    config, signals, _ = await filled(tmp_path, die=False)
    progress = config.storage.path / "export" / "webhook.json"
    progress.parent.mkdir()
    progress.write_text('{"default": 7000, "acme": 3}')
    lose(config, "gone")
    assert betrace(config).exit_code == 0
    ledger = SqliteLedger(config.storage.path / "ledger.sqlite")
    entries = ledger.entries("default") + ledger.entries("acme")
    assert sorted(number for number, _ in entries) == list(range(7001, 7001 + len(signals)))
    ledger.close()
    assert json.loads(progress.read_text()) == {"default": 7000, "acme": 3}
    assert betrace(config, "--exported").exit_code == 0
    assert json.loads(progress.read_text()) == {
        tenant: max(n for n, signal in entries if signal.tenant == tenant)
        for tenant in ("default", "acme")
    }


async def test_the_service_must_be_stopped_and_have_data(tmp_path):
    config = settings(tmp_path)
    refused = betrace(config)
    assert refused.exit_code == 3
    assert "there is no data" in refused.stderr
    async with running(config):
        refused = betrace(config)
        assert refused.exit_code == 3
        assert "stop it first" in refused.stderr


async def test_signals_that_wait_for_the_ledger_are_not_lost(tmp_path):
    """The ledger did not answer from the beginning, so it never had a signal."""
    config, signals, _ = await filled(tmp_path, die=False)
    lose(config, "new")
    waiting = config.storage.path / "fallback/ledger/1.jsonl"
    lines = [json.dumps(signal.to_json()) for signal in signals]
    waiting.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(LedgerError, match="has signals of acme"):
        await starts(config)
    waiting.write_text("\n".join(lines) + "\n")
    await starts(config)
