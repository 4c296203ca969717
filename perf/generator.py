"""A load generator for OTLP over HTTP and gRPC that uses little CPU. It sends to this machine's
loopback only.

Bodies are encoded in advance (:mod:`perf.lib.workload`); only their ids are rewritten for each
send. One epoll loop serves the connections, which are kept alive. *Closed loop*: each connection
sends the next request when it has the answer. *Open loop*: requests are due at a rate, and latency
counts from the due time, so that a server that falls behind cannot hide it.

``python -m perf.generator --url http://127.0.0.1:4318/v1/traces --secs 10`` (or ``--url
grpc://127.0.0.1:4317``) prints a line of JSON
when the measurement begins (``{"event": "begin"}``) and one with the :class:`Result` at its end.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import select
import socket
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from perf.lib.grpc_wire import GrpcWire
from perf.lib.quantiles import value_at
from perf.lib.workload import Body, Shape, make_bodies

LOOPBACK = ("127.0.0.1", "::1", "localhost")
OTHER_FILES = 64  # of the generator, besides its connections
TENANT_HEADER = "X-Scope-OrgID"
_RETRY = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

# Kinds of invalid requests, and the expected status.
WRONG = ("truncated", "garbage", "type", "encoding")
WRONG_STATUS = {"truncated": 400, "garbage": 400, "type": 415, "encoding": 415}


@dataclass(frozen=True, slots=True)
class Load:
    """How to send. ``rate`` is in spans/s (0: closed loop). ``tenants`` 0 sends no tenant header.
    ``wrong`` is the fraction of invalid requests. Times are in seconds. A ``slice`` above 0 adds
    latencies for each such part of the measured time."""

    url: str
    connections: int = 8
    seconds: float = 10.0
    warm_up: float = 2.0
    rate: float = 0.0
    tenants: int = 0
    wrong: float = 0.0
    honour_retry_after: bool = False
    timeout: float = 30.0
    slice: float = 0.0


@dataclass(slots=True)
class Result:
    """The result. Counts without ``all_`` are of answers within the measured seconds."""

    seconds: float = 0.0
    spans: int = 0
    requests: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    refused_spans: int = 0
    retry_after: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    wrong_sent: int = 0
    wrong_answered: int = 0
    latency_ms: dict[str, float] = field(default_factory=dict)
    per_second: list[int] = field(default_factory=list)
    slices: list[dict[str, float]] = field(default_factory=list)
    bytes: int = 0
    cpu_seconds: float = 0.0
    late_requests: int = 0
    all_spans: int = 0
    all_traces: int = 0
    all_breaches: int = 0
    all_unknown_spans: int = 0
    sends_per_body: float = 0.0

    @property
    def failures(self) -> int:
        """Requests that failed: neither accepted, nor refused for load, nor invalid on purpose."""
        return sum(self.errors.values())


def tenant_name(number: int) -> str:
    """Return the name of tenant ``number``."""
    return f"tenant-{number:04d}"


class _Connection:
    __slots__ = (
        "body",
        "buffer",
        "due",
        "out",
        "resume",
        "since",
        "socket",
        "watching",
        "wire",
        "wrong",
    )

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.body: Body | None = None
        self.wrong: str | None = None
        self.buffer = b""
        self.out: list[memoryview] = []
        self.due = self.since = self.resume = 0.0
        self.watching = False  # for writability
        self.wire: GrpcWire | None = None


class Generator:
    """Sends bodies as described by a :class:`Load`; :meth:`run` blocks."""

    def __init__(self, load: Load, shape: Shape, bodies: Sequence[Body]) -> None:
        parts = urlsplit(load.url)
        if parts.scheme not in ("http", "grpc") or parts.hostname not in LOOPBACK:
            raise ValueError(
                "the load generator sends only to http:// and grpc:// on this machine's loopback; "
                "change --url"
            )
        self._authority = parts.netloc if parts.scheme == "grpc" else ""
        if self._authority and (load.wrong or shape.encoding == "json"):
            raise ValueError("gRPC has no wrong requests and no JSON; leave out --wrong and --json")
        self._gzip = shape.gzip
        if len(bodies) < load.connections:
            raise ValueError(
                f"{load.connections} connections need as many bodies, but there are {len(bodies)}; "
                f"use --bodies {load.connections} or more, or 0"
            )
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY and load.connections > files - OTHER_FILES:
            raise ValueError(
                f"{load.connections} connections exceed the {files} files that a process may open; "
                f"run ulimit -n {load.connections + OTHER_FILES}, or use fewer --connections"
            )
        self._load = load
        self._address = (parts.hostname, parts.port or 80)
        self._bodies = deque(bodies)
        self._sends = self._traces = 0
        common = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        packed = "Content-Encoding: gzip\r\n" if shape.gzip else ""
        kind = f"Content-Type: {shape.content_type}\r\n{packed}"
        tenants = [
            f"{TENANT_HEADER}: {tenant_name(i)}\r\n" if load.tenants else ""
            for i in range(max(1, load.tenants))
        ]
        self._heads = [f"{common}{kind}{t}Content-Length: ".encode() for t in tenants]
        self._wrong_heads = {
            "type": f"{common}Content-Type: text/plain\r\nContent-Length: ".encode(),
            "encoding": f"{common}{kind.replace(packed, '')}Content-Encoding: br\r\n"
            "Content-Length: ".encode(),
        }
        self._wrong_every = round(1 / load.wrong) if load.wrong else 0
        self._epoll = select.epoll()
        self._by_fd: dict[int, _Connection] = {}
        self._idle: deque[_Connection] = deque()
        self._paused: list[_Connection] = []
        self._latencies = array("d")
        self._ends = [0] * (math.ceil(load.seconds / load.slice) if load.slice else 0)
        self._statuses: Counter[int] = Counter()
        self._errors: Counter[str] = Counter()
        self._begin = self._end = 0.0
        self.result = Result(seconds=load.seconds, per_second=[0] * math.ceil(load.seconds))

    # One request

    def _open(self, connection: _Connection) -> None:
        opened = socket.create_connection(self._address, timeout=10)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setblocking(False)
        connection.socket, connection.watching = opened, False
        connection.wire = GrpcWire(self._authority) if self._authority else None
        self._by_fd[opened.fileno()] = connection
        self._epoll.register(opened.fileno(), select.EPOLLIN)

    def _drop(self, connection: _Connection) -> None:
        if connection.socket is not None:
            self._by_fd.pop(connection.socket.fileno(), None)
            connection.socket.close()  # which removes it from the epoll
            connection.socket = None

    def _send(self, connection: _Connection, due: float) -> None:
        body = self._bodies.popleft()
        connection.body, connection.due, connection.buffer = body, due, b""
        connection.since = time.monotonic()
        if connection.socket is None:
            try:
                self._open(connection)
            except OSError as error:
                self._fail(connection, f"connect: {type(error).__name__}")
                return
        if body.renewable:
            body.renew(self._sends, self._traces)
        head = self._heads[self._sends % len(self._heads)]
        self._sends += 1
        self._traces += body.traces
        data: bytes | memoryview = memoryview(body.data)
        connection.wrong = None
        if self._wrong_every and self._sends % self._wrong_every == 0:
            wrong = WRONG[self._sends // self._wrong_every % len(WRONG)]
            connection.wrong = wrong
            head = self._wrong_heads.get(wrong, head)
            if wrong == "truncated":
                data = data[:-1]  # any other end may be the end of a complete message
            elif wrong == "garbage":
                data = b"\x07" * 100
        if connection.wire is not None:
            number = self._sends % len(self._heads)
            tenant = tenant_name(number) if self._load.tenants else ""
            connection.out = connection.wire.request(memoryview(data), tenant, self._gzip)
            self._flush(connection)
            return
        connection.out = [memoryview(b"%b%d\r\n\r\n" % (head, len(data))), memoryview(data)]
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        out = connection.out
        assert connection.socket is not None
        try:
            while out:
                sent = connection.socket.sendmsg(out)
                while out and sent >= len(out[0]):
                    sent -= len(out.pop(0))
                if sent:
                    out[0] = out[0][sent:]
        except BlockingIOError:
            if not connection.watching:
                connection.watching = True
                self._epoll.modify(connection.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)
            return
        except OSError as error:
            self._receive(connection)  # it may have answered before closing
            if connection.body is not None:
                self._fail(connection, f"send: {type(error).__name__}")
            return
        if connection.watching:
            connection.watching = False
            self._epoll.modify(connection.socket.fileno(), select.EPOLLIN)

    def _receive(self, connection: _Connection) -> None:
        assert connection.socket is not None
        try:
            data = connection.socket.recv(16384)
        except BlockingIOError:
            return
        except OSError as error:
            data = b""
            if connection.body is not None:
                self._fail(connection, f"receive: {type(error).__name__}")
                return
        if not data:
            if connection.body is not None:
                self._fail(connection, "closed before it answered")
            else:
                self._drop(connection)  # an idle connection; it is reopened when needed
            return
        if connection.wire is not None:
            status = connection.wire.feed(data)
            if status == 0:
                self._fail(connection, "the server ended the connection")
            elif status is not None and connection.body is not None:
                self._answered(connection, status, b"")
            return
        if connection.body is None:
            return
        buffer = connection.buffer = connection.buffer + data if connection.buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(buffer, 0, end + 2)
        if length is None:
            self._fail(connection, "an answer without content-length")
        elif len(buffer) >= end + 4 + int(length[1]):
            self._answered(connection, int(buffer[9:12]), buffer[:end])

    def _answered(self, connection: _Connection, status: int, head: bytes) -> None:
        now = time.monotonic()
        counted = self._begin <= now < self._end
        body, result = connection.body, self.result
        assert body is not None
        pause = 0.0
        if connection.wrong is not None:
            if counted:
                result.wrong_sent += 1
                result.wrong_answered += status == WRONG_STATUS[connection.wrong]
        elif status == 200:
            result.all_spans += body.spans
            result.all_traces += body.traces
            result.all_breaches += body.breaches
            if counted:
                self._latencies.append(now - connection.due)
                if self._ends:
                    self._ends[int((now - self._begin) / self._load.slice)] = len(self._latencies)
                result.spans += body.spans
                result.requests += 1
                result.bytes += len(body.data)
                result.per_second[int(now - self._begin)] += body.spans
        elif status in (429, 503):
            asked = _RETRY.search(head)
            if counted:
                result.refused_spans += body.spans
                result.retry_after += asked is not None
            pause = float(asked[1]) if asked and self._load.honour_retry_after else 0.1
        elif counted:
            self._errors[f"status {status}"] += 1
        if counted and connection.wrong is None:
            self._statuses[status] += 1
        early = bool(connection.out)
        self._free(connection, pause)
        if early or b"onnection: close" in head:
            self._drop(connection)

    def _fail(self, connection: _Connection, why: str) -> None:
        if connection.body is not None:
            if connection.wrong is None:
                self.result.all_unknown_spans += connection.body.spans
            if self._begin <= time.monotonic() < self._end:
                self._errors[why] += 1
        self._drop(connection)
        self._free(connection, 0.1)

    def _free(self, connection: _Connection, pause: float) -> None:
        if connection.body is not None:
            self._bodies.append(connection.body)
            connection.body = None
        connection.out = []
        if pause:
            connection.resume = time.monotonic() + pause
            self._paused.append(connection)
        else:
            self._idle.append(connection)

    # All requests

    def run(self, on_begin: Callable[[], None] = lambda: None) -> Result:
        """Send for the warm-up and the measured seconds, then wait for the last answers.
        ``on_begin`` is called when the measurement begins."""
        load = self._load
        start = time.monotonic()
        self._begin = start + load.warm_up
        self._end = self._begin + load.seconds
        connections = [_Connection() for _ in range(load.connections)]
        self._idle.extend(connections)
        interval = self._bodies[0].spans / load.rate if load.rate else 0.0
        due, cpu, begun = start, 0.0, False
        check = start + 1
        while (now := time.monotonic()) < self._end:
            if not begun and now >= self._begin:
                begun, cpu = True, time.process_time()
                on_begin()
            if self._paused:
                self._resume(now)
            if interval:
                while self._idle and due <= now:
                    self._send(self._idle.popleft(), due)
                    due += interval
                wait = due - time.monotonic() if self._idle else 0.2
            else:
                for _ in range(len(self._idle)):
                    self._send(self._idle.popleft(), time.monotonic())
                wait = 0.2
            self._poll(min(wait, 0.02 if self._paused else 0.2, self._end - time.monotonic()))
            if now >= check:
                check = now + 1
                self._give_up(connections, now)
        self.result.cpu_seconds = time.process_time() - cpu
        if interval:
            self.result.late_requests = max(0, int((self._end - due) / interval))
        # Later answers count as accepted spans, but not for the measured seconds.
        self._idle.clear()
        last = time.monotonic() + load.timeout
        while any(c.body is not None for c in connections) and time.monotonic() < last:
            self._poll(0.2)
        for connection in connections:
            if connection.body is not None:
                self._fail(connection, "timeout")
            self._drop(connection)
        self._epoll.close()
        return self._summed()

    def _poll(self, wait: float) -> None:
        for fd, events in self._epoll.poll(max(0.0, wait)):
            connection = self._by_fd.get(fd)
            if connection is None:
                continue
            if events & ~select.EPOLLOUT:
                self._receive(connection)
            if events & select.EPOLLOUT and connection.out and connection.socket is not None:
                self._flush(connection)

    def _resume(self, now: float) -> None:
        ready = [c for c in self._paused if c.resume <= now]
        if ready:
            self._paused = [c for c in self._paused if c.resume > now]
            self._idle.extend(ready)

    def _give_up(self, connections: list[_Connection], now: float) -> None:
        for connection in connections:
            if connection.body is not None and now - connection.since > self._load.timeout:
                self._fail(connection, "timeout")

    def _summed(self) -> Result:
        result = self.result
        result.latency_ms = _quantiles(self._latencies)
        first = 0
        for number, end in enumerate(self._ends):
            answers = self._latencies[first:end]
            seconds = min(self._load.slice, self._load.seconds - number * self._load.slice)
            result.slices.append({"seconds": seconds, "requests": len(answers)})
            result.slices[-1] |= _quantiles(answers)
            first = max(first, end)
        result.statuses = {str(status): n for status, n in sorted(self._statuses.items())}
        result.errors = dict(self._errors)
        result.sends_per_body = round(self._sends / len(self._bodies), 1)
        return result


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return quantiles in milliseconds; empty without values."""
    ordered = sorted(seconds)
    return {
        name: round(1000 * value_at(ordered, q), 2)
        for name, q in {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}.items()
        if ordered
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="such as http://127.0.0.1:4318/v1/traces")
    parser.add_argument("--spans", type=int, default=512, help="a request")
    parser.add_argument("--spans-per-trace", type=int, default=10)
    parser.add_argument("--attributes", type=int, default=9, help="a span")
    parser.add_argument(
        "--rules", type=int, default=100, help="number of rules that the service has"
    )
    parser.add_argument("--breaches", type=float, default=0.001, help="fraction of traces")
    parser.add_argument("--json", action="store_true", help="OTLP JSON")
    parser.add_argument("--gzip", action="store_true")
    parser.add_argument(
        "--bodies", type=int, default=0, help="number of distinct bodies; 0: enough"
    )
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--secs", type=float, default=10)
    parser.add_argument("--warm-up", type=float, default=2)
    parser.add_argument("--rate", type=float, default=0, help="spans/s; 0 for a closed loop")
    parser.add_argument("--tenants", type=int, default=0)
    parser.add_argument("--wrong", type=float, default=0, help="fraction of wrong requests")
    parser.add_argument("--honour-retry-after", action="store_true")
    parser.add_argument(
        "--slice", type=float, default=0, help="seconds; also report latencies by slice"
    )
    parser.add_argument("--wait", action="store_true", help="start when a line arrives on stdin")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    shape = Shape(
        spans=options.spans,
        spans_per_trace=options.spans_per_trace,
        attributes=options.attributes,
        encoding="json" if options.json else "protobuf",
        gzip=options.gzip,
        rules=options.rules,
        breaches=options.breaches,
    )
    load = Load(
        url=options.url,
        connections=options.connections,
        seconds=options.secs,
        warm_up=options.warm_up,
        rate=options.rate,
        tenants=options.tenants,
        wrong=options.wrong,
        honour_retry_after=options.honour_retry_after,
        slice=options.slice,
    )

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    bodies = make_bodies(shape, options.bodies, options.connections)
    try:
        generator = Generator(load, shape, bodies)
    except ValueError as error:
        parser.error(str(error))
    say({"event": "ready", "payload": shape.payload(bodies)})
    if options.wait and not sys.stdin.readline():
        return
    result = generator.run(lambda: say({"event": "begin"}))
    say({"event": "end", "result": asdict(result)})


if __name__ == "__main__":
    main()
