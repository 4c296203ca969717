"""The service under test and the load generator, each in its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import httpx
import psutil

from betrace.service.storage.duck.schema import FILE
from perf.generator import tenant_name
from perf.lib import threads
from perf.lib.workload import write_rules
from perf.report.output import ROOT

START_SECONDS = 300  # kernels may have to be compiled
DRAIN_SECONDS = 300
STOP_SECONDS = 120

Json = dict[str, Any]


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU that a process and its children used, in user and system mode."""
    used = process.cpu_times()
    seconds = used.user + used.system + used.children_user + used.children_system
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile; its parent counts its CPU
            times = child.cpu_times()
            seconds += times.user + times.system
    return float(seconds)


class Service:
    """A running service: its URLs, its process, its API."""

    def __init__(self, process: subprocess.Popen[str], urls: dict[str, str], data: Path) -> None:
        self.process = process
        self.ingest, self.grpc, self.api = urls["ingest"], urls["grpc"], urls["api"]
        self.data = data
        self._usage = psutil.Process(process.pid)
        self._client = httpx.Client(base_url=self.api, timeout=30, trust_env=False)

    def cpu_seconds(self) -> float:
        """Return the CPU used since the start, in user and system mode."""
        return cpu_seconds(self._usage)

    def threads(self) -> dict[int, threads.Used]:
        """Return what each thread used since its start."""
        return threads.threads(self.process.pid)

    def rss(self) -> int:
        """Return resident memory in bytes."""
        return int(self._usage.memory_info().rss)

    def get(self, path: str, tenant: str | None = None) -> Json:
        """Return the JSON of an API path. Raises httpx.HTTPError."""
        headers = {"X-Scope-OrgID": tenant} if tenant else {}
        response = self._client.get(path, headers=headers)
        response.raise_for_status()
        return dict(response.json())

    def metrics(self) -> Json:
        """Return ``GET /api/performance/metrics``."""
        return self.get("/api/performance/metrics")

    def settle(self, idle_seconds: float) -> Json:
        """Wait until every accepted span is evaluated, all traces are closed and everything is
        stored. Return the metrics.

        Raises:
          TimeoutError: it took too long.
        """
        end = time.monotonic() + DRAIN_SECONDS + idle_seconds
        while time.monotonic() < end:
            found = self.metrics()
            windows = self.get("/api/performance/trace-windows")
            queues = self.get("/api/performance/queue-stats")
            waiting = sum(q["currentSize"] + q["busyConsumers"] for q in _rows(queues))
            if not found["spansInFlight"] and not windows["activeWindows"] and not waiting:
                return found
            time.sleep(1)  # each request costs the service CPU, which is counted
        raise TimeoutError("the service did not finish its work")

    def stop(self) -> None:
        """Stop the service gracefully; RuntimeError if its exit code is not 0."""
        self.process.terminate()
        code = self.process.wait(STOP_SECONDS)
        if code:
            raise RuntimeError(f"the service ended with exit code {code}")

    def stored(self) -> Json:
        """Count tenants, traces, the traces' spans and signals in the query store; the service must
        have been stopped."""
        found = {"tenants": 0, "traces": 0, "spans": 0, "signals": 0}
        for path in self.data.rglob(FILE):
            with duckdb.connect(str(path)) as db:
                row = db.execute(
                    "SELECT 1, count(*), coalesce(sum(spans), 0), (SELECT count(*) FROM signals) "
                    "FROM traces"
                ).fetchone()
            assert row is not None
            for key, value in zip(found, row, strict=True):
                found[key] += int(value)
        return found

    def close(self) -> None:
        self._client.close()


def _rows(queues: Json) -> list[Json]:
    (rows,) = [v for v in queues.values() if isinstance(v, list)]
    return rows


@contextmanager
def service(
    *,
    rules: int = 100,
    tenants: int = 0,
    settings: dict[str, str] | None = None,
    relational: bool = False,
    files: int | None = None,
) -> Iterator[Service]:
    """Run ``python -m betrace.service serve`` on free loopback ports with its data in a temporary
    directory. ``settings`` are named like its environment variables without the prefix
    (``log__ack``); with ``relational`` twenty of the rules relate spans; ``files`` limits the files
    that it may open."""
    directory = Path(tempfile.mkdtemp(prefix="betrace-perf-", dir=os.environ.get("PERF_TMP")))
    process = log = None
    try:
        folder = directory / "rules"
        folder.mkdir()
        write_rules(folder, [tenant_name(i) for i in range(tenants)], rules, relational)
        arguments = [sys.executable, "-m", "betrace.service", "serve", "--json"]
        arguments += ["--data", str(directory / "data"), "--rules", str(folder)]
        for listener in ("ingest", "grpc", "api", "metrics"):
            arguments += [f"--{listener}", "127.0.0.1:0"]
        if files is not None:
            limit = f'ulimit -n {files} && exec "$@"'
            arguments = ["sh", "-c", limit, "sh", *arguments]
        own = {k: v for k, v in os.environ.items() if not k.startswith(("BETRACE_", "OTEL_"))}
        own |= {f"BETRACE_{k.upper()}": v for k, v in (settings or {}).items()}
        log = (directory / "log").open("w+")
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=log, text=True
        )
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        if not line:
            log.seek(0)
            raise RuntimeError(f"the service did not start:\n{log.read()}")
        running = Service(process, json.loads(line), directory / "data")
        yield running
        running.close()
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if log is not None:
            log.close()
        shutil.rmtree(directory, ignore_errors=True)


class GeneratorProcess:
    """Runs ``python -m perf.generator``. Its bodies are ready when the constructor returns."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (stop closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "perf.generator", "--wait", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        try:
            self.payload: Json = self._event("ready")["payload"]
        except BaseException:
            self.stop()
            raise

    def _event(self, name: str) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            why = self._said.read().strip().rpartition("\n")[2] or "no message"
            raise RuntimeError(f"the load generator ended before its event {name!r}: {why}")
        message: Json = json.loads(line)
        assert message["event"] == name, message
        return message

    def start(self) -> None:
        """Start sending."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def wait_begin(self) -> None:
        """Wait until the warm-up is over."""
        self._event("begin")

    def wait_end(self) -> Json:
        """Wait for the end and return the result."""
        result: Json = self._event("end")["result"]
        self._process.wait()
        return result

    def stop(self) -> None:
        """Stop the process if it is still running."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                pipe.close()
