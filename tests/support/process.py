"""The real service in its own process, and a client for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

START_SECONDS = 600  # kernels may have to be compiled, on a busy machine
ANSWER_SECONDS = 60  # tests share the machine

RULES = """\
rules:
  - id: fraud-check
    name: Payments over 1000 are checked for fraud
    severity: critical
    labels: {team: payments}
    condition: |
      when   { payment.charge_card.where(amount > 1000) }
      always { payment.fraud_check }
  - id: too-many-spans
    severity: low
    condition: count("loop") > 3
"""

Json = dict[str, Any]
T = TypeVar("T")


class ServingPlace(Protocol):
    """Where services run, if not as one process: :class:`tests.support.on_cluster.OnCluster`."""

    def serve_options(self, data: Path) -> tuple[list[str], dict[str, str]]: ...


place: ServingPlace | None = None
"""Set for tests that run on a cluster."""


class Running:
    """A running service: its addresses and its process."""

    def __init__(self, process: subprocess.Popen[str], urls: dict[str, str | None]) -> None:
        self.process = process
        self.ingest = f"{urls['ingest']}"
        self.grpc = f"{urls['grpc']}"
        self.api = f"{urls['api']}"
        self.metrics = f"{urls['metrics']}"
        self.log: list[str] = []

    def get(self, path: str, tenant: str | None = None) -> httpx.Response:
        headers = {"x-scope-orgid": tenant} if tenant else {}
        return httpx.get(self.api + path, headers=headers, timeout=ANSWER_SECONDS, trust_env=False)

    def signals(self, trace_id: str, tenant: str | None = None) -> list[Json]:
        response = self.get(f"/api/v1/signals?trace_id={trace_id}", tenant)
        assert response.status_code == 200, response.text
        return list(response.json()["signals"])

    def trace(self, trace_id: str, tenant: str | None = None) -> Json:
        """The trace, once it is closed."""

        def ask() -> Json | None:
            response = self.get(f"/api/v1/traces/{trace_id}", tenant)
            assert response.status_code in (200, 404), response.text
            found: Json = response.json() if response.status_code == 200 else {}
            return found if found.get("state") == "closed" else None

        return wait_for(ask)

    def send(self, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        """Post a body to the ingestion port."""
        given = {"content-type": "application/x-protobuf"} | (headers or {})
        url = f"{self.ingest}/v1/traces"
        return httpx.post(url, content=body, headers=given, timeout=ANSWER_SECONDS, trust_env=False)

    def samples(self, listener: str) -> dict[str, float]:
        """Metric samples, by name with labels."""
        response = httpx.get(f"{listener}/metrics", trust_env=False)
        assert response.status_code == 200
        lines = [line for line in response.text.splitlines() if line and line[0] != "#"]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def stop(self) -> int:
        """Send SIGTERM. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def wait_for(ask: Callable[[], T | None], seconds: float = ANSWER_SECONDS) -> T:
    """Ask until the answer is not empty, and return it."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < end, f"nothing came in {seconds} s"
        time.sleep(0.05)
    return answer


def command(*arguments: str) -> list[str]:
    """The arguments that call the command line."""
    return [sys.executable, "-m", "betrace.service", *arguments]


def environment(**settings: str) -> dict[str, str]:
    """This process's environment, with settings of the service."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("BETRACE_", "OTEL_"))}
    return mine | {f"BETRACE_{name.upper()}": value for name, value in settings.items()}


@contextmanager
def running(directory: Path, *options: str, **settings: str) -> Iterator[Running]:
    """Run the service on free ports, with its data and rules below ``directory``."""
    rules = directory / "rules"
    if not rules.exists():
        rules.mkdir(parents=True)
        (rules / "payments.yaml").write_text(RULES)
    arguments = ["--data", str(directory / "data"), "--rules", str(rules), *options]
    if place is not None:
        more, section = place.serve_options(directory / "data")
        arguments, settings = [*arguments, *more], settings | section
    with started(arguments, settings) as (process, urls, log):
        service = Running(process, urls)
        service.log = log
        yield service


@contextmanager
def started(
    options: Sequence[str], settings: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str | None], list[str]]]:
    """Run ``betrace serve`` on free ports until the block ends; kill it then, if it still runs.
    Yields the process, its addresses, and the lines of its log, which grow."""
    arguments = ["serve", "--json"]
    for listener in ("ingest", "grpc", "api", "metrics"):
        arguments += [f"--{listener}", "127.0.0.1:0"]
    process = subprocess.Popen(
        command(*arguments, *options),
        env=environment(**{"traces__idle_seconds": "1"} | settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    reader = threading.Thread(target=log.extend, args=(process.stderr,))
    watchdog = threading.Timer(START_SECONDS, process.kill)
    reader.start()
    watchdog.start()
    try:
        first = process.stdout.readline()
        watchdog.cancel()
        assert first, "the service did not start:\n" + "".join(log)
        yield process, json.loads(first), log
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
