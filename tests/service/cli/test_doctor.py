"""betrace doctor finds each problem with its remedy, and changes nothing."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from betrace.service.cli.doctor import machine, stores
from betrace.service.cli.doctor.checks import Diagnosis, diagnose
from betrace.service.cli.doctor.finding import FAILED, NOTE, OK, WARNING, Finding, size
from betrace.service.cli.main import cli
from betrace.service.config.settings import Settings
from betrace.service.storage.ledger.base import tenant_account
from betrace.service.storage.ledger.open import LEDGER_FILE
from betrace.service.storage.lockfile import LockFile
from betrace.service.storage.spanlog.log import LOCK_FILE
from tests.support.inprocess import closed, running, send, write_rules
from tests.support.inprocess import settings as of_service
from tests.support.spans import S

OFF = {"address": "off"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The directory that a service left behind."""
    directory = tmp_path_factory.mktemp("kept")
    write_rules(directory, {"r": "never { a }"})

    async def main() -> None:
        async with running(of_service(directory)) as service:
            await send(service, [S(1)])
            await send(service, [S(2)], "acme")
            await closed(service)

    trio.run(main)
    return directory


@pytest.fixture
def data(kept, tmp_path) -> Path:
    """A copy of its data."""
    shutil.copytree(kept / "data", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def synchronised(monkeypatch) -> None:
    monkeypatch.setattr(machine, "_unsynchronised", lambda: False)


def settings(data: Path, **sections: Any) -> Settings:
    given = {"storage": {"path": data}, "ingest": OFF, "api": OFF, "metrics": OFF}
    return Settings(**given | sections)


def worst(findings: Iterator[Finding]) -> Finding:
    found = sorted(findings, key=lambda each: (OK, NOTE, WARNING, FAILED).index(each.status))
    assert all(bool(each.remedy) == (each.status != OK) for each in found), found
    return found[-1]


def options(data: Path) -> dict[str, Any]:
    return {
        "storage.path": str(data),
        **{f"{name}.address": "off" for name in ("ingest", "api", "metrics")},
    }


def file_system(free: int, files: int = 500) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=free, f_blocks=100, f_frsize=4096, f_files=1000, f_favail=files)


def contents(data: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(data)): path.read_bytes()
        for path in data.rglob("*")
        if path.is_file() and path.suffix not in (".sqlite-shm", ".sqlite-wal")
        and not path.name.endswith(("-shm", "-wal"))
    }  # fmt: skip


def test_sound_data_is_good_and_stays_unchanged(data, synchronised, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: file_system(50))
    before = contents(data)
    diagnosis = diagnose(None, options(data))
    assert [each for each in diagnosis.findings if each.status != OK] == []
    assert diagnosis.good
    assert list(diagnosis.lines())[-1] == "all is well"
    found = {each.check: each.found for each in diagnosis.findings}
    assert found["span log"].startswith("2 of 2 segments of 2 tenants, 2 requests with 2")
    assert found["ledger"].endswith("ledger.sqlite, 1 transfers")
    assert found["DuckDB"] == "the files of 2 of 2 tenants can be read"
    assert contents(data) == before


def test_a_missing_directory_is_good(tmp_path):
    for check in (stores.rules, stores.span_log, stores.checkpoint, stores.ledger):
        assert worst(check(settings(tmp_path / "none"))).status == OK
    assert worst(stores.duckdb_files(settings(tmp_path / "none"))).status == OK
    assert worst(machine.directory(settings(tmp_path / "none/deep"))).status == OK
    assert not (tmp_path / "none").exists()


def test_a_wrong_configuration_is_the_only_finding(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("[storage]\npaht = 1\n")
    diagnosis = diagnose(config, {})
    assert [each.check for each in diagnosis.findings] == ["configuration"]
    assert "storage.path" in diagnosis.findings[0].found
    assert not diagnosis.good


def test_a_check_that_raises_is_a_finding(data, monkeypatch):
    def fail(_: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: fail(0))
    diagnosis = diagnose(None, options(data))
    (found,) = [each for each in diagnosis.findings if "on purpose" in each.found]
    assert (found.check, found.status) == ("limits", WARNING)
    assert diagnosis.findings[-1].check == "waiting"  # the others were done


def test_the_command(data):
    environment = {f"BETRACE_{name}__ADDRESS": "off" for name in ("INGEST", "API", "METRICS")}
    (data / "ledger.sqlite").write_bytes(b"no database" * 1000)
    ran = CliRunner().invoke(cli, ["doctor", "--data", str(data), "--json"], env=environment)
    assert ran.exit_code == 1
    printed = json.loads(ran.stdout)
    assert printed["good"] is False
    (bad,) = [each for each in printed["checks"] if each["status"] == "failed"]
    assert bad["check"] == "ledger"
    listeners = ["--ingest", "off", "--api", "off", "--metrics", "off"]
    ran = CliRunner().invoke(cli, ["doctor", "--data", str(data), *listeners])
    assert ran.exit_code == 1
    assert "failed   ledger" in ran.stdout
    assert "→ stop the service and restore" in ran.stdout


# The machine


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("")
    assert worst(machine.directory(settings(tmp_path / "data"))).status == FAILED


def test_permissions(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not writable" in worst(machine.directory(settings(tmp_path))).found
    assert "cannot be created" in worst(machine.directory(settings(tmp_path / "new"))).found


@pytest.mark.parametrize(("free", "status"), [(50, OK), (15, WARNING), (3, FAILED)])
def test_free_space(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(os, "statvfs", lambda _: file_system(free))
    assert worst(machine.disk(settings(tmp_path))).status == status
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_slow_or_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: file_system(50))
    monkeypatch.setattr(machine, "_SLOW_SYNC_SECONDS", 0.0)
    assert "synced in" in worst(machine.disk(settings(tmp_path))).found

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    assert "Input/output error" in worst(machine.disk(settings(tmp_path))).found


def test_few_files_left(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: file_system(50, files=10))
    found = [each.found for each in machine.disk(settings(tmp_path))]
    assert any("only 10 more files" in text for text in found)


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        found = worst(machine.ports(settings(tmp_path, api={"address": address})))
        assert found.status == FAILED
        assert "api.address" in found.remedy
    assert worst(machine.ports(settings(tmp_path, api={"address": address}))).status == OK


def test_the_running_services_own_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as own, LockFile(tmp_path / LOCK_FILE):
        address = f"127.0.0.1:{own.getsockname()[1]}"
        found = worst(machine.ports(settings(tmp_path, api={"address": address})))
        assert "belongs to the running service" in found.found


def test_the_owner_of_the_directory(tmp_path):
    assert machine.owner(tmp_path) is None
    with LockFile(tmp_path / LOCK_FILE):
        assert machine.owner(tmp_path) == os.getpid()
    assert machine.owner(tmp_path) is None


@pytest.mark.parametrize(
    ("code", "body", "status", "text"),
    [
        (200, {"a": {"status": "ok", "detail": ""}}, OK, "all 1 components are ok"),
        (503, {"a": {"status": "failed", "detail": "no disk"}}, FAILED, "a is failed: no disk"),
        (200, {"a": {"status": "degraded", "detail": "x"}}, WARNING, "a is degraded: x"),
        (503, {"a": {"status": "starting", "detail": "x"}}, NOTE, "it is starting"),
        (200, None, FAILED, "does not answer"),
    ],
)
def test_a_running_service_is_asked(tmp_path, code, body, status, text):
    with answering(code, body) as address, LockFile(tmp_path / LOCK_FILE):
        found = worst(machine.service(settings(tmp_path, api={"address": address})))
    assert found.status == status
    assert text in found.found


@pytest.mark.parametrize(("state", "status"), [("failed", FAILED), ("ok", OK)])
def test_a_service_that_lost_its_data_directory(tmp_path, state, status):
    body = {"span-log": {"status": state, "detail": "the data directory was deleted"}}
    with answering(503, body) as address:
        api = {"address": address}
        found = worst(machine.service(settings(tmp_path / "gone", api=api)))
    assert found.status == status
    assert ("restore a backup" in found.remedy) == (status == FAILED)


@contextmanager
def answering(code: int, body: Any) -> Iterator[str]:
    """A server that answers every request with these components; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = b"?" if body is None else json.dumps({"components": body}).encode()
            self.send_response(code)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_running_service_without_api(tmp_path):
    with LockFile(tmp_path / LOCK_FILE):
        assert worst(machine.service(settings(tmp_path))).found.startswith("process")


def test_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 256))
    assert "ulimit -Hn" in worst(machine.limits(settings(tmp_path))).remedy
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    little = SimpleNamespace(available=1)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: little)
    assert "duckdb.memory_bytes" in worst(machine.limits(settings(tmp_path))).remedy


def test_the_clock(tmp_path, monkeypatch, synchronised):
    assert worst(machine.clock(settings(tmp_path))).status == OK
    os.utime(tmp_path, (0, 0))
    (tmp_path / "checkpoints").mkdir()
    future = tmp_path / "checkpoints" / f"{2 * 10**18:020d}.checkpoint"
    future.touch()
    assert "in the future" in worst(machine.clock(settings(tmp_path))).found
    future.unlink()
    monkeypatch.setattr(machine, "_unsynchronised", lambda: True)
    found = worst(machine.clock(settings(tmp_path)))
    assert (found.status, "chrony" in found.remedy) == (NOTE, True)
    assert Diagnosis([found]).good
    monkeypatch.setattr(machine, "_FIRST_YEAR", 9999)
    assert worst(machine.clock(settings(tmp_path))).status == FAILED


def test_the_kernel_reports_whether_the_clock_is_synchronised():
    assert machine._unsynchronised() in (True, False)


def certificate(directory: Path, days: int) -> dict[str, str]:
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=100))
        .not_valid_after(now + datetime.timedelta(days=days, hours=1))
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    paths = {"certificate": directory / "cert.pem", "key": directory / "key.pem"}
    paths["certificate"].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    paths["key"].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return {name: str(path) for name, path in paths.items()}


@pytest.mark.parametrize(("days", "status"), [(60, OK), (3, WARNING), (-3, FAILED)])
def test_certificates(tmp_path, days, status):
    tls = certificate(tmp_path, days)
    assert worst(machine.secrets(settings(tmp_path, tls=tls))).status == status


def test_an_invalid_certificate(tmp_path):
    tls = {"certificate": str(tmp_path / "x"), "key": str(tmp_path / "y")}
    assert "TLS cannot use" in worst(machine.secrets(settings(tmp_path, tls=tls))).found


def test_the_operator_token(tmp_path):
    auth = {"enabled": True, "operator_token_file": str(tmp_path / "token")}
    found = worst(machine.secrets(settings(tmp_path, auth=auth)))
    assert (found.status, found.remedy[:11]) == (FAILED, "name a file")
    (tmp_path / "token").write_text("x" * 40)
    assert worst(machine.secrets(settings(tmp_path, auth=auth))).status == OK


# What is kept


def test_rules(tmp_path):
    given = {"directory": str(tmp_path / "rules")}
    assert worst(stores.rules(settings(tmp_path, rules=given))).status == FAILED
    write_rules(tmp_path, {"r": "never { a }"})
    assert worst(stores.rules(settings(tmp_path, rules=given))).status == OK
    (tmp_path / "rules/default/bad.yaml").write_text("rules: 7")
    assert "bad.yaml" in worst(stores.rules(settings(tmp_path, rules=given))).found


def test_a_damaged_span_log(data):
    (segment,) = (data / "acme/log").rglob("*.seg")
    content = bytearray(segment.read_bytes())
    content[-3] ^= 0xFF
    segment.write_bytes(content)
    found = worst(stores.span_log(settings(data)))
    assert found.status == WARNING
    assert "of acme" in found.found
    assert "lost: 1 spans received between 20" in found.found
    with LockFile(data / LOCK_FILE):  # perhaps a frame that is being written
        assert worst(stores.span_log(settings(data))).status == OK


def test_a_damaged_checkpoint(data):
    path = max((data / "checkpoints").glob("*.checkpoint"))
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in worst(stores.checkpoint(settings(data))).found


def test_an_old_checkpoint_of_a_running_service(data, monkeypatch):
    monkeypatch.setattr(stores, "_OLD_CHECKPOINT_SECONDS", 0.0)
    assert worst(stores.checkpoint(settings(data))).status == OK
    with LockFile(data / LOCK_FILE):
        assert worst(stores.checkpoint(settings(data))).status == WARNING


def test_ledgers_that_cannot_be_used(data):
    path = data / LEDGER_FILE
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    assert "newer version" in worst(stores.ledger(settings(data))).found
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE x (y)")
    database.close()
    assert "is not a ledger" in worst(stores.ledger(settings(data))).found


def test_a_ledger_that_takes_too_long(data, monkeypatch):
    monkeypatch.setattr(stores, "_MOST_SECONDS", -1.0)
    found = worst(stores.ledger(settings(data)))
    assert found.status == OK  # it is small, or it is not looked at to the end


def test_tigerbeetle_that_cannot_be_reached(data):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        given = {"kind": "tigerbeetle", "tigerbeetle": {"addresses": address}}
        found = worst(stores.ledger(settings(data, ledger=given)))
    assert found.status == FAILED
    assert "does not answer" in found.found


def test_a_tigerbeetle_of_another_cluster_never_answers(data, monkeypatch):
    import tigerbeetle

    let_go = threading.Event()
    ended = threading.Event()

    class Client:
        def __init__(self, cluster: int, addresses: str) -> None:
            self.cluster = cluster

        def lookup_accounts(self, ids: list[int]) -> list[Any]:
            if self.cluster != 7:
                let_go.wait(60)
                ended.set()
            return []

    monkeypatch.setattr(tigerbeetle, "ClientSync", Client)
    with socket.create_server(("127.0.0.1", 0)) as replica:
        limits = {"addresses": f"127.0.0.1:{replica.getsockname()[1]}", "start_seconds": 0.2}
        for cluster, status in ((7, OK), (8, FAILED)):
            given = {"kind": "tigerbeetle", "tigerbeetle": limits | {"cluster_id": cluster}}
            found = worst(stores.ledger(settings(data, ledger=given)))
            assert found.status == status
    assert "cluster_id" in found.remedy
    let_go.set()
    assert ended.wait(60)


def test_a_tigerbeetle_adopted_later_lacks_earlier_transfers(data, monkeypatch):
    import tigerbeetle

    class Client:
        accounts = 0

        def __init__(self, cluster: int, addresses: str) -> None:
            pass

        def lookup_accounts(self, ids: list[int]) -> list[Any]:
            assert ids == [tenant_account("default")]
            return self.accounts * [SimpleNamespace(debits_posted=0, credits_posted=1)]

    monkeypatch.setattr(tigerbeetle, "ClientSync", Client)
    with socket.create_server(("127.0.0.1", 0)) as replica:
        limits = {"addresses": f"127.0.0.1:{replica.getsockname()[1]}"}
        given = settings(data, ledger={"kind": "tigerbeetle", "tigerbeetle": limits})
        found = list(stores.ledger(given))
        assert [each.status for each in found] == [OK, OK]
        assert "lacks 1 of 1 transfers" in found[1].found
        Client.accounts = 3  # other instances share the cluster
        assert "lacks" not in list(stores.ledger(given))[1].found


def test_tigerbeetle_without_its_extra(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tigerbeetle", None)
    with socket.create_server(("127.0.0.1", 0)) as replica:
        limits = {"addresses": f"127.0.0.1:{replica.getsockname()[1]}"}
        given = settings(data, ledger={"kind": "tigerbeetle", "tigerbeetle": limits})
        found = worst(stores.ledger(given))
    assert found.status == FAILED
    assert "pip install 'betrace[tigerbeetle]'" in found.remedy


def test_a_damaged_duckdb_file(data):
    (data / "acme/betrace.duckdb").write_bytes(b"x" * 5000)
    found = worst(stores.duckdb_files(settings(data)))
    assert found.status == WARNING
    assert "acme" in found.found
    with LockFile(data / LOCK_FILE):
        assert worst(stores.duckdb_files(settings(data))).status == OK


def test_scrub_reads_everything(data, monkeypatch):
    monkeypatch.setattr(stores, "_MOST_TENANTS", 1)
    monkeypatch.setattr(stores, "_MOST_SECONDS", -1.0)
    monkeypatch.setattr(stores, "_AGAIN_SECONDS", 0.0)
    found = {each.check: each.found for each in diagnose(None, options(data), True).findings}
    assert found["span log"].startswith("2 of 2 segments of 2 tenants, 2 requests with 2")
    assert found["DuckDB"] == "the files of 2 of 2 tenants can be read"
    path = data / "acme/betrace.duckdb"
    with LockFile(data / LOCK_FILE):  # the service has the files
        found = {each.check: each.found for each in diagnose(None, options(data), True).findings}
        assert "blocks in the files of 2 tenants are right" in found["DuckDB"]
        content = bytearray(path.read_bytes())
        content[3 * 4096 + 100] ^= 1
        path.write_bytes(content)
        found = worst(stores.duckdb_files(settings(data), True))
        assert found.status == WARNING
        assert f"1 blocks of {path} have a wrong checksum, at offset 12288 first" in found.found


def test_data_waiting_for_a_store(data):
    (data / "fallback/ledger").mkdir(parents=True, exist_ok=True)
    (data / "fallback/ledger/1.jsonl").write_text("{}\n")
    assert "3 bytes in local files" in worst(stores.waiting(settings(data))).found
    (data / "dead-letters-exported").mkdir()
    (data / "dead-letters-exported/1.jsonl").write_text("{}\n")
    found = [each.found for each in stores.waiting(settings(data)) if each.status != OK]
    assert found[0] == "1 files of exported dead letters"


def test_sizes():
    assert [size(n) for n in (5, 2048, 3 << 30, 5 << 40)] == [
        "5 bytes",
        "2.0 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]
