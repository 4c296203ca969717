"""A tenant that sends little, in a process of its own: how long its requests and signals take.

It sends ten requests a second, every second one on a new connection. One span in each breaks a
rule, and the time until the signal arrives on the event stream counts. Once a second it asks for
its signals.
"""

from __future__ import annotations

import http.client
import json
import math
import multiprocessing
import secrets
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TENANT = "quiet"
RULE = {"condition": "a.where(x == 1)"}
PAUSE = 0.1
TIMEOUT = 20.0
"""Seconds; what takes longer has failed, and counts as taking that long."""

Json = dict[str, Any]


def spans(trace: bytes) -> bytes:
    """A request with five spans, the first of which breaks the rule."""
    request = ExportTraceServiceRequest()
    scope = request.resource_spans.add().scope_spans.add()
    now = time.time_ns()
    for number in range(1, 6):
        span = scope.spans.add(trace_id=trace, span_id=number.to_bytes(8, "big"), name="a")
        span.start_time_unix_nano, span.end_time_unix_nano = now, now + 1000
        span.attributes.add(key="x").value.string_value = str(number)
    return bytes(request.SerializeToString())


class _Quiet:
    """Runs in its own process."""

    def __init__(self, ingest: str, api: str) -> None:
        self._ingest, self._api = urlsplit(ingest), urlsplit(api)
        self._lock = threading.Lock()
        self._clear()
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self._query, daemon=True).start()
        threading.Thread(target=self._send, daemon=True).start()

    def _clear(self) -> None:
        self.requests: list[float] = []
        self.signals: list[float] = []
        self.queries: list[float] = []
        self.failed = 0
        self._sent: dict[str, float] = {}

    def _connect(self, address: Any) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(address.hostname, address.port, timeout=TIMEOUT)

    def _send(self) -> None:
        kept = self._connect(self._ingest)
        for number in range(1 << 60):
            due = time.monotonic() + PAUSE
            trace = secrets.token_bytes(16)
            sent = self._sent
            started = sent[trace.hex()] = time.monotonic()
            connection = kept if number % 2 else self._connect(self._ingest)
            ok = self._ask(connection, "POST", "/v1/traces", spans(trace))
            took = time.monotonic() - started
            if not ok:
                sent.pop(trace.hex(), None)
                connection.close()
            if connection is not kept:
                connection.close()
            with self._lock:
                if sent is self._sent:
                    self.requests.append(took if ok else TIMEOUT)
                    self.failed += not ok
            time.sleep(max(0.0, due - time.monotonic()))

    def _query(self) -> None:
        while True:
            connection = self._connect(self._api)
            started = time.monotonic()
            ok = self._ask(connection, "GET", "/api/v1/signals?limit=5", b"")
            with self._lock:
                self.queries.append(time.monotonic() - started if ok else TIMEOUT)
            connection.close()
            time.sleep(1)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes
    ) -> bool:
        headers = {"content-type": "application/x-protobuf", "x-scope-orgid": TENANT}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return False
        return answer.status == 200

    def _watch(self) -> None:
        """Note when signals arrive; connect again if the stream ends."""
        while True:
            with suppress(OSError, http.client.HTTPException):
                connection = self._connect(self._api)
                connection.request(
                    "GET", "/api/v1/signals/stream", headers={"x-scope-orgid": TENANT}
                )
                answer = connection.getresponse()
                while line := answer.readline():
                    if line.startswith(b"data: {"):
                        self._arrived(json.loads(line[6:]))
            time.sleep(0.1)

    def _arrived(self, signal: Json) -> None:
        sent = self._sent.pop(str(signal.get("trace_id", signal.get("traceId"))), None)
        if sent is not None:
            with self._lock:
                self.signals.append(time.monotonic() - sent)

    def begin(self) -> None:
        """Start a measurement."""
        with self._lock:
            self._clear()

    def end(self) -> Json:
        """The figures in seconds. A signal that has not arrived for a second counts with the time
        that it has taken so far."""
        with self._lock:
            waiting, self._sent = self._sent, {}
            requests, signals, queries = list(self.requests), self.signals, list(self.queries)
            failed = self.failed
        now = time.monotonic()
        late = [now - at for at in list(waiting.values()) if now - at > 1]
        return {
            "requests": len(requests),
            "failed": failed,
            "p99": quantile(requests, 0.99),
            "median": quantile(requests, 0.5),
            "signal_p99": quantile([*signals, *late], 0.99),
            "signal_median": quantile([*signals, *late], 0.5),
            "signals": len(signals),
            "query_max": max(queries, default=0.0),
        }


def quantile(values: list[float], q: float) -> float:
    """The value below which the fraction ``q`` of the values is; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def _run(ingest: str, api: str, pipe: Connection) -> None:
    quiet = _Quiet(ingest, api)
    while True:
        if pipe.recv() == "begin":
            quiet.begin()
        else:
            pipe.send(quiet.end())


class QuietTenant:
    """The tenant; use it as a context manager. Its rule must have been saved."""

    def __init__(self, ingest: str, api: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_run, args=(ingest, api, other), daemon=True)

    def __enter__(self) -> QuietTenant:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def measure(self, seconds: float) -> Json:
        """What it noticed in the next ``seconds``."""
        self._pipe.send("begin")
        time.sleep(seconds)
        self._pipe.send("end")
        found: Json = self._pipe.recv()
        return found
