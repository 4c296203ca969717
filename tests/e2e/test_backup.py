"""A backup of the running and of the killed service, restored, has each signal once."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.process import Running, command, running, wait_for

pytestmark = pytest.mark.slow


def trace(number: int) -> tuple[str, bytes]:
    """A trace that breaks a rule, and its id."""
    trace_id = f"{number + 1:032x}"
    span = {"traceId": trace_id, "spanId": f"{number + 1:016x}", "name": "payment.charge_card"}
    times = {"startTimeUnixNano": "1", "endTimeUnixNano": "2"}
    span |= times | {"attributes": [{"key": "amount", "value": {"intValue": "1500"}}]}  # type: ignore[dict-item]
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}
    return trace_id, json.dumps(body).encode()


def betrace(*arguments: str | Path) -> str:
    ran = subprocess.run(command(*map(str, arguments)), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def recorded(service: Running) -> list[str]:
    """The trace of each signal, as often as it has signals."""
    found, cursor = [], ""
    while True:
        page = service.get(f"/api/v1/signals?limit=1000{cursor}").json()
        found += [signal["trace_id"] for signal in page["signals"]]
        if not page["next"]:
            return found
        cursor = f"&cursor={page['next']}"


class Load:
    """Sends traces one after another until it is stopped."""

    def __init__(self, service: Running) -> None:
        self._service = service
        self._stop = threading.Event()
        self.accepted: list[str] = []
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        number = 0
        while not self._stop.is_set():
            trace_id, body = trace(number)
            answer = self._service.send(body, {"content-type": "application/json"})
            assert answer.status_code == 200
            self.accepted.append(trace_id)
            number += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def check(directory: Path, accepted: list[str], sent: list[str]) -> None:
    """Start on a restored directory: each accepted trace has one signal, and no other has."""
    with running(directory) as service:
        wait_for(lambda: set(recorded(service)) >= set(accepted), 60)
        found = recorded(service)
        assert len(found) == len(set(found))
        assert set(found) <= set(sent)
        assert service.trace(accepted[0])["signals"]
        trace_id, body = trace(1_000_000)  # it works
        service.send(body, {"content-type": "application/json"})
        wait_for(lambda: service.signals(trace_id))
        assert service.stop() == 0
    assert not [line for line in service.log if "Traceback" in line], "".join(service.log)


def test_backups_while_it_runs_and_after_a_kill(tmp_path: Path) -> None:
    live, killed = tmp_path / "live", tmp_path / "killed"
    accepted: list[list[str]] = []
    settings = {"checkpoint__interval_seconds": "1", "checkpoint__max_interval_seconds": "1"}
    with running(tmp_path / "first", **settings) as service:
        load = Load(service)
        for number in range(3):
            wait_for(lambda n=number: len(load.accepted) > 100 * (n + 1), 60)
            accepted.append(list(load.accepted))
            told = betrace("backup", f"{live}-{number}", "--data", tmp_path / "first" / "data")
            assert "rebuilds the DuckDB files" in told
        load.stop()
        service.process.kill()
        service.process.wait()
    told = betrace("backup", killed, "--data", tmp_path / "first" / "data", "--json")
    assert json.loads(told)["duckdb"] is True
    restored = [*((f"{live}-{n}", accepted[n]) for n in (0, 2)), (str(killed), load.accepted)]
    for source, least in restored:
        directory = Path(f"{source}-restored")
        shutil.copytree(tmp_path / "first" / "rules", directory / "rules")
        betrace("restore", source, "--data", directory / "data")
        check(directory, least, load.accepted)
