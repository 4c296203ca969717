"""What a tenant can do to take the service away from the others: the attacks of
:mod:`perf.attacks`, at full size.

An attack is a function of an :class:`Attack`. It prepares itself, sets ``begun``, and goes on until
``over`` is set. It does not check answers, because refusals are expected.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

NOISY = "noisy"
EXPENSIVE = " or ".join(f'x matches "[ab]*a[ab]{{{250 - n}}}c"' for n in range(40))
MIB = 1 << 20
PROTOBUF, JSON = "application/x-protobuf", "application/json"


class Target(Protocol):
    """What is attacked: the URLs of its listeners."""

    ingest: str
    api: str


@dataclass(slots=True)
class Attack:
    """An attack in progress: ``begun`` when it is prepared, ``over`` when it must end. ``size`` is
    the fraction of the full size; ``pace`` limits the acts per second (0: no limit). ``acts`` and
    ``received`` count acts and bytes of answers."""

    target: Target
    size: float = 1.0
    pace: float = 0.0
    acts: int = 0
    received: int = 0
    begun: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    answers: dict[int, int] = field(default_factory=dict)

    def scaled(self, full: int) -> int:
        """A number at this attack's size."""
        return max(1, int(full * self.size))

    def ask(
        self, method: str, path: str, body: bytes = b"", kind: str = JSON, **headers: str
    ) -> int:
        """Send a request and read the answer; its status, 0 if there was none."""
        address = urlsplit(self.target.ingest if path == "/v1/traces" else self.target.api)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        given = {"content-type": kind, "x-scope-orgid": NOISY}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        status = 0
        with suppress(OSError, http.client.HTTPException):
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            while part := answer.read(MIB):
                self.received += len(part)
            status = answer.status
        connection.close()
        self.answers[status] = self.answers.get(status, 0) + 1
        return status

    def connect(self, path: str = "/v1/traces") -> socket.socket:
        """A new connection to the listener for ``path``. Raises OSError."""
        address = urlsplit(self.target.ingest if path == "/v1/traces" else self.target.api)
        return socket.create_connection((address.hostname or "", address.port or 0), timeout=10)

    def together(self, count: int, act: Callable[[], object]) -> None:
        """``count`` threads that repeat ``act`` until the attack is over."""

        def repeat() -> None:
            while not self.over.is_set():
                started = time.monotonic()
                with suppress(OSError):
                    act()
                self.acts += 1
                wait = count / self.pace - (time.monotonic() - started) if self.pace else 0.0
                self.over.wait(max(0.01, wait))

        threads = [threading.Thread(target=repeat, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        self.begun.set()
        for thread in threads:
            thread.join()

    def hold(self, path: str, count: int, data: bytes) -> None:
        """Open connections, send ``data`` on each, and keep them open; replace those that the
        service closes."""
        with ExitStack() as stack:
            opened: list[socket.socket] = []
            while not self.over.is_set():
                while len(opened) < count and not self.over.is_set():
                    try:
                        one = self.connect(path)
                        stack.callback(one.close)
                        one.settimeout(2)
                        with suppress(OSError):
                            one.sendall(data)
                        one.setblocking(False)
                    except OSError:
                        break
                    opened.append(one)
                self.begun.set()
                self.over.wait(0.5)
                opened = [one for one in opened if _is_open(one)]


def _is_open(one: socket.socket) -> bool:
    try:
        if one.recv(65_536):
            return True
    except BlockingIOError:
        return True
    except OSError:
        pass
    one.close()
    return False


def request(texts: list[str], name: str = "a", trace: bytes | None = None) -> bytes:
    """A request with a span for each text, which is its attribute ``x``."""
    message = ExportTraceServiceRequest()
    scope = message.resource_spans.add().scope_spans.add()
    trace = trace or secrets.token_bytes(16)
    for text in texts:
        span = scope.spans.add(trace_id=trace, span_id=secrets.token_bytes(8), name=name)
        span.start_time_unix_nano = span.end_time_unix_nano = time.time_ns()
        if text:
            span.attributes.add(key="x").value.string_value = text
    return bytes(message.SerializeToString())


def _put_rule(attack: Attack, name: str, condition: str) -> None:
    body = json.dumps({"condition": condition}).encode()
    attack.ask("PUT", f"/api/v1/rules/{name}", body)


def _text(size: int, seed: int = 1) -> str:
    return "".join(random.Random(seed).choices("ab", k=size))


def patterns(attack: Attack) -> None:
    """One rule of 1.6 kB, one span with 1 MiB of text and three with 64 KiB, again and again."""
    _put_rule(attack, "slow", f"a.where({EXPENSIVE})")
    bodies = [request([_text(attack.scaled(MIB))])]
    bodies += [request([_text(60_000, seed)]) for seed in range(3)]

    def act() -> None:
        for body in bodies:
            attack.ask("POST", "/v1/traces", body, PROTOBUF)

    attack.together(1, act)


def many_patterns(attack: Attack) -> None:
    """A thousand patterns like ``a.*b7``, and 5000 small spans, again and again."""
    count = attack.scaled(1000)
    for first in range(0, count, 50):
        some = " or ".join(f'x matches "a.*b{n}"' for n in range(first, min(count, first + 50)))
        _put_rule(attack, f"r{first}", f"a.where({some})")
    spans = attack.scaled(5000)

    def act() -> None:
        texts = [f"a text {secrets.token_hex(8)}" for _ in range(spans)]
        attack.ask("POST", "/v1/traces", request(texts), PROTOBUF)

    attack.together(1, act)


def empty_objects(attack: Attack) -> None:
    """Four senders of 20 kB of gzip JSON with 6.9 million empty objects."""
    body = gzip.compress(b'{"resourceSpans":[' + b"{}," * attack.scaled(6_900_000) + b"{}]}")

    attack.together(
        4, lambda: attack.ask("POST", "/v1/traces", body, JSON, content_encoding="gzip")
    )


def unfinished_bodies(attack: Attack) -> None:
    """60 connections that sent a chunked body of 19 MiB and go no further."""
    size = attack.scaled(19 * MIB)
    head = f"POST /v1/traces HTTP/1.1\r\nhost: x\r\ncontent-type: {PROTOBUF}\r\n"
    head += f"x-scope-orgid: {NOISY}\r\ntransfer-encoding: chunked\r\n\r\n{size:x}\r\n"
    attack.hold("/v1/traces", attack.scaled(60), head.encode() + bytes(size))


def connections(attack: Attack) -> None:
    """A thousand connections to the API, closed at once; then again."""

    def act() -> None:
        for one in [attack.connect("/api") for _ in range(attack.scaled(1000) // 4 or 1)]:
            one.close()

    attack.together(4, act)


def rule_tests(attack: Attack) -> None:
    """20 tests of a rule with expensive patterns at once, again and again."""
    span = {"traceId": "01" * 16, "spanId": "02" * 8, "name": "a"}
    span |= {"startTimeUnixNano": "1", "endTimeUnixNano": "2"}
    text = {"key": "x", "value": {"stringValue": _text(60_000)}}
    trace = {"resourceSpans": [{"scopeSpans": [{"spans": [span | {"attributes": [text]}]}]}]}
    body = json.dumps({"condition": f"a.where({EXPENSIVE})", "trace": trace}).encode()
    attack.together(attack.scaled(20), lambda: attack.ask("POST", "/api/v1/rules/test", body))


def huge_trace(attack: Attack) -> None:
    """Eight readers of a trace of a million spans."""
    trace = secrets.token_bytes(16)
    for _ in range(attack.scaled(100)):
        body = request([""] * 10_000, trace=trace)
        while attack.ask("POST", "/v1/traces", body, PROTOBUF) in (429, 503):
            time.sleep(0.2)
    attack.together(8, lambda: attack.ask("GET", f"/api/v1/traces/{trace.hex()}"))


def slow_senders(attack: Attack) -> None:
    """800 connections that sent 3 bytes of a body, and 800 that sent half a head."""
    head = f"POST /v1/traces HTTP/1.1\r\nhost: x\r\ncontent-type: {PROTOBUF}\r\n"
    body = head + f"x-scope-orgid: {NOISY}\r\ncontent-length: 100000\r\n\r\nabc"
    count = attack.scaled(800)
    other = threading.Thread(target=attack.hold, args=("/v1/traces", count, head.encode()))
    other.start()
    attack.hold("/v1/traces", count, body.encode())
    other.join()


def most_compressed_spans(attack: Attack) -> None:
    """gzip requests of 7 kB with 100 000 spans, as many as are accepted."""
    compressed_spans(attack, 100_000)


def compressed_spans(attack: Attack, spans: int = 600_000) -> None:
    """gzip requests of 43 kB with 600 000 spans, which are refused."""
    message = ExportTraceServiceRequest()
    scope = message.resource_spans.add().scope_spans.add()
    scope.spans.add(trace_id=b"\1" * 16, span_id=b"\2" * 8)
    one = scope.spans[0].SerializeToString()
    scope_bytes = (b"\x12%c" % len(one) + one) * attack.scaled(spans)
    resource = b"\x12" + _varint(len(scope_bytes)) + scope_bytes
    body = gzip.compress(b"\x0a" + _varint(len(resource)) + resource)
    attack.together(
        4, lambda: attack.ask("POST", "/v1/traces", body, PROTOBUF, content_encoding="gzip")
    )


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def unfinished_puts(attack: Attack) -> None:
    """300 PUTs of 4 MiB that are never finished."""
    size = attack.scaled(4 * MIB)
    head = f"PUT /api/v1/rules/a HTTP/1.1\r\nhost: x\r\nx-scope-orgid: {NOISY}\r\n"
    head += f"content-length: {size}\r\n\r\n"
    attack.hold("/api", attack.scaled(300), head.encode() + bytes(size - 1))


def streams(attack: Attack) -> None:
    """100 event streams of one tenant."""
    head = f"GET /api/v1/signals/stream HTTP/1.1\r\nhost: x\r\nx-scope-orgid: {NOISY}\r\n\r\n"
    attack.hold("/api", attack.scaled(100), head.encode())


def tenant_names(attack: Attack) -> None:
    """2000 tenants, each with one span, while the service may open 1024 files."""
    names = iter(range(1 << 60))
    count = attack.scaled(2000)

    def act() -> None:
        name = f"name-{next(names) % count}"
        attack.ask("POST", "/v1/traces", request(["1"]), PROTOBUF, x_scope_orgid=name)

    attack.together(4, act)


ATTACKS: dict[str, Callable[[Attack], None]] = {
    "40 patterns, 1 MiB of text": patterns,
    "1000 patterns, 5000 spans": many_patterns,
    "JSON of empty objects": empty_objects,
    "unfinished bodies of 19 MiB": unfinished_bodies,
    "connections to the API": connections,
    "tests of rules": rule_tests,
    "reads of a huge trace": huge_trace,
    "slow senders": slow_senders,
    "600 000 spans in 43 kB": compressed_spans,
    "100 000 spans in 7 kB": most_compressed_spans,
    "unfinished PUTs of 4 MiB": unfinished_puts,
    "event streams": streams,
    "tenant names": tenant_names,
}
