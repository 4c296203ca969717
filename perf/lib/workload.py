"""The workload: OTLP bodies encoded in advance, whose ids are rewritten for each send, and rules.

A trace is a request in a shop: a root span, client and internal spans with semantic-convention
attributes, and occasional events. One span in ten has a name that a rule uses (``step.s000`` to
``step.s099`` with a hundred rules). It is known whether it breaks the rule, so the service's
signals can be checked.
"""

from __future__ import annotations

import json
import random
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from isal import isal_zlib
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from perf.lib.relational_rules import COUNT, relational_definitions

MARK = b"\xf1\xb7\xe3\x9c\xd5\xa8\xfb\xee"  # first half of every trace id before it is rewritten
SPAN_MARK = b"\xf3\xa1\xc7\x9e"  # first half of every span id
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it maps counters to distinct ids
_HIGH = np.uint64(0xD1342543DE82EF95)  # for the first half
_FIRST = np.uint64(secrets.randbits(48))  # so that runs do not repeat each other's trace ids
_HEX = np.frombuffer("".join(f"{i:02x}" for i in range(256)).encode(), np.uint8).reshape(256, 2)
GZIP_LEVEL = 2

SERVICES = ("frontend", "checkout", "payments", "inventory", "shipping", "cart")
ROUTES = ("/api/v1/orders/{id}", "/api/v1/cart/{id}/items", "/api/v1/products", "/api/v1/quote")
TABLES = ("orders", "order_items", "users", "payments", "stock_levels", "shipments")
AGENT = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0"
PROTOBUF, JSON = "application/x-protobuf", "application/json"

Attributes = list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a request. ``breaches`` is the fraction of traces that break a rule. A trace
    with more spans than a request continues over several requests."""

    spans: int = 512
    spans_per_trace: int = 10
    attributes: int = 9
    encoding: str = "protobuf"  # or json
    gzip: bool = False
    rules: int = 100
    breaches: float = 0.001
    seed: int = 1

    @property
    def content_type(self) -> str:
        return JSON if self.encoding == "json" else PROTOBUF

    def payload(self, bodies: Sequence[Body]) -> dict[str, Any]:
        """Return the facts about the payload that every report states."""
        spans = sum(body.spans for body in bodies)
        return asdict(self) | {
            "bytes_per_span": round(sum(len(b.data) for b in bodies) / spans, 1),
            "raw_bytes_per_span": round(sum(b.raw for b in bodies) / spans, 1),
            "bodies": len(bodies),
        }


# Rules


def rule_definitions(count: int = 100, relational: bool = False) -> list[dict[str, Any]]:
    """Return ``count`` rules, with ``relational`` the last twenty of them rules that relate spans.
    Each uses one ``step.sNNN``; their predicates alternate between
    numbers, text, the resource and the span's own fields."""
    rules = []
    for i in range(count - COUNT if relational else count):
        step = f"step.s{i:03d}"
        condition = (
            f"when {{ {step} }} never {{ {step}.where(order.total > 1000) }}",
            f"never {{ {step}.where(order.total > 1000 and order.currency == EUR) }}",
            f'{step}.where(order.total > 1000 and resource.service.name != "nobody")',
            f"count({step}.where(order.total > 1000 and span:kind == internal)) > 0",
        )[i % 4]
        rules.append(
            {
                "id": f"rule-{i:04d}",
                "name": f"Step {i}",
                "severity": ("critical", "high", "medium", "low")[i % 4],
                "condition": condition,
            }
        )
    return rules + (relational_definitions(len(rules)) if relational else [])


def write_rules(
    directory: Path, tenants: Sequence[str], count: int, relational: bool = False
) -> None:
    """Write rule files for the tenant ``default`` and ``tenants``."""
    text = yaml.safe_dump(
        {"rules": rule_definitions(count, relational)}, sort_keys=False, width=1000
    )
    for tenant in {"default", *tenants}:
        folder = directory if tenant == "default" else directory / tenant
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "steps.yaml").write_text(text)


# Spans


@dataclass(slots=True)
class _Span:
    trace: int
    number: int  # in the body
    parent: int | None
    name: str
    kind: int
    start: int
    end: int
    attributes: Attributes
    failed: bool
    event: bool
    service: int


def _attributes(rng: random.Random, kind: int) -> Attributes:
    order = rng.randrange(10**7)
    if kind == 2:
        route = rng.choice(ROUTES)
        return [
            ("http.request.method", rng.choice(("GET", "GET", "POST"))),
            ("http.route", route),
            ("url.path", route.replace("{id}", str(order))),
            ("url.scheme", "https"),
            ("http.response.status_code", rng.choice((200, 200, 200, 201, 404, 500))),
            ("server.address", "api.shop.internal"),
            ("server.port", 8443),
            ("network.protocol.version", "1.1"),
            ("user_agent.original", AGENT),
            ("client.address", f"10.{rng.randrange(255)}.{rng.randrange(255)}.7"),
            ("http.request.body.size", rng.randrange(4096)),
        ]
    if kind == 3:
        table = rng.choice(TABLES)
        return [
            ("db.system.name", "postgresql"),
            ("db.namespace", "shop"),
            ("db.operation.name", "SELECT"),
            ("db.collection.name", table),
            (
                "db.query.text",
                f"SELECT id, status, total FROM {table} WHERE id = $1 AND tenant_id = $2 LIMIT 50",
            ),
            ("server.address", "pg-primary.shop.internal"),
            ("server.port", 5432),
            ("db.response.returned_rows", rng.randrange(50)),
            ("thread.id", rng.getrandbits(30)),
            ("db.cached", rng.random() < 0.2),
        ]
    return [
        ("order.id", f"o-{order:07d}"),
        ("code.function.name", "shop.orders.price_order"),
        ("code.line.number", rng.randrange(900)),
        ("thread.name", f"worker-{rng.randrange(16)}"),
        ("order.items", rng.randrange(1, 20)),
        ("feature.flag", "new-pricing"),
        ("cache.hit", rng.random() < 0.6),
        ("app.region", "eu-central-1"),
        ("retry.count", rng.randrange(3)),
        ("queue.name", "orders-high"),
    ]


def _resource(rng: random.Random, service: int) -> Attributes:
    name = SERVICES[service]
    return [
        ("service.name", name),
        ("service.version", "2.14.3"),
        ("service.instance.id", f"{name}-{rng.getrandbits(32):08x}"),
        ("deployment.environment.name", "production"),
        ("k8s.pod.name", f"{name}-{rng.getrandbits(32):08x}"),
        ("telemetry.sdk.language", "python"),
        ("telemetry.sdk.name", "opentelemetry"),
        ("telemetry.sdk.version", "1.45.2"),
    ]


def _spans(shape: Shape, rng: random.Random, first_trace: int, now: int) -> tuple[list[_Span], int]:
    """Return the spans of a body, and how many of its traces break a rule."""
    spans: list[_Span] = []
    breaches = 0
    every = round(1 / shape.breaches) if shape.breaches else 0
    trace = 0
    while len(spans) < shape.spans:
        count = min(shape.spans_per_trace, shape.spans - len(spans))
        base = now - rng.randrange(5 * 10**9)
        first = len(spans)
        breaks = bool(every) and (first_trace + trace) % every == every // 2 and count > 1
        breaches += breaks
        # One span in ten: the second of a trace, and each tenth after it.
        for i in range(count):
            step = i % 10 == 1
            kind = 2 if i == 0 else 1 if step else rng.choice((1, 2, 3, 3, 3))
            attributes = _attributes(rng, kind)[: shape.attributes - 2 * step]
            name = (
                f"step.s{rng.randrange(shape.rules):03d}"
                if step
                else f"GET {dict(attributes)['http.route']}"
                if kind == 2
                else f"SELECT {dict(attributes)['db.collection.name']}"
                if kind == 3
                else "shop.orders.price_order"
            )
            if step:
                total = 2000.5 if breaks and i == 1 else round(rng.random() * 900, 2)
                attributes += [("order.total", total), ("order.currency", "EUR")]
            start = base + i * rng.randrange(10**5, 10**7)
            spans.append(
                _Span(
                    trace,
                    len(spans),
                    None if i == 0 else first + rng.randrange(max(0, i - 3), i),
                    name,
                    kind,
                    start,
                    start + rng.randrange(10**5, 3 * 10**8),
                    attributes,
                    rng.random() < 0.04,
                    rng.random() < 0.1,
                    0 if i == 0 else rng.randrange(3),
                )
            )
        trace += 1
    return spans, breaches


def _trace_id(trace: int) -> bytes:
    return MARK + trace.to_bytes(8, "big")


def _span_id(number: int) -> bytes:
    return SPAN_MARK + number.to_bytes(4, "big")


def _by_service(spans: list[_Span]) -> dict[int, list[_Span]]:
    groups: dict[int, list[_Span]] = {}
    for span in spans:
        groups.setdefault(span.service, []).append(span)
    return groups


def _put(target: Any, attributes: Attributes) -> None:
    for key, value in attributes:
        kind = {bool: "bool_value", int: "int_value", float: "double_value", str: "string_value"}
        setattr(target.add(key=key).value, kind[type(value)], value)


def _protobuf(spans: list[_Span], rng: random.Random) -> bytes:
    request = ExportTraceServiceRequest()
    for service, members in _by_service(spans).items():
        group = request.resource_spans.add()
        _put(group.resource.attributes, _resource(rng, service))
        scope = group.scope_spans.add()
        scope.scope.name, scope.scope.version = "opentelemetry.instrumentation.asgi", "0.66b2"
        for s in members:
            span = scope.spans.add(
                trace_id=_trace_id(s.trace),
                span_id=_span_id(s.number),
                name=s.name,
                kind=s.kind,  # type: ignore[arg-type]
                start_time_unix_nano=s.start,
                end_time_unix_nano=s.end,
                flags=257,
            )
            if s.parent is not None:
                span.parent_span_id = _span_id(s.parent)
            _put(span.attributes, s.attributes)
            if s.failed:
                span.status.code, span.status.message = 2, "upstream error"  # type: ignore[assignment]
            if s.event:
                event = span.events.add(time_unix_nano=s.start, name="cache.miss")
                _put(event.attributes, [("cache.key", "orders")])
    return request.SerializeToString()


def _json_attributes(attributes: Attributes) -> list[dict[str, Any]]:
    def value(v: Any) -> dict[str, Any]:
        if isinstance(v, bool):
            return {"boolValue": v}
        if isinstance(v, int):
            return {"intValue": str(v)}
        return {"doubleValue": v} if isinstance(v, float) else {"stringValue": v}

    return [{"key": k, "value": value(v)} for k, v in attributes]


def _json(spans: list[_Span], rng: random.Random) -> bytes:
    groups = []
    for service, members in _by_service(spans).items():
        encoded = []
        for s in members:
            span: dict[str, Any] = {
                "traceId": _trace_id(s.trace).hex(),
                "spanId": _span_id(s.number).hex(),
                "name": s.name,
                "kind": s.kind,
                "startTimeUnixNano": str(s.start),
                "endTimeUnixNano": str(s.end),
                "attributes": _json_attributes(s.attributes),
                "flags": 257,
            }
            if s.parent is not None:
                span["parentSpanId"] = _span_id(s.parent).hex()
            if s.failed:
                span["status"] = {"code": 2, "message": "upstream error"}
            if s.event:
                key = _json_attributes([("cache.key", "orders")])
                span["events"] = [
                    {"timeUnixNano": str(s.start), "name": "cache.miss", "attributes": key}
                ]
            encoded.append(span)
        scope = {"name": "opentelemetry.instrumentation.asgi", "version": "0.66b2"}
        groups.append(
            {
                "resource": {"attributes": _json_attributes(_resource(rng, service))},
                "scopeSpans": [{"scope": scope, "spans": encoded}],
            }
        )
    return json.dumps({"resourceSpans": groups}, separators=(",", ":")).encode()


# Bodies


class Body:
    """One encoded request. ``data`` is what is sent; :meth:`renew` rewrites its ids in place.

    ``spans``, ``traces`` and ``breaches`` are its contents, ``raw`` its uncompressed bytes.
    """

    def __init__(self, shape: Shape, number: int, now: int) -> None:
        rng = random.Random(shape.seed * 1_000_003 + number)
        per_body = -(-shape.spans // min(shape.spans_per_trace, shape.spans))
        spans, self.breaches = _spans(shape, rng, number * per_body, now)
        self.spans = len(spans)
        self.traces = spans[-1].trace + 1
        self.data: bytearray | bytes
        encoded = _json(spans, rng) if shape.encoding == "json" else _protobuf(spans, rng)
        self.raw = len(encoded)
        self.data = bytearray(encoded)
        self._array = np.frombuffer(self.data, np.uint8)
        self._width = 2 if shape.encoding == "json" else 1  # characters for a byte of an id
        self._traces_at = self._places(encoded, MARK, 8)
        self._whole_at = self._traces_at[0][:, :1] - 8 * self._width + np.arange(16 * self._width)
        self._spans_at = self._places(encoded, SPAN_MARK, 4)
        self._parts = -(-shape.spans_per_trace // shape.spans)  # requests for one trace

    def _places(self, encoded: bytes, mark: bytes, size: int) -> tuple[Any, Any]:
        """Return the positions of the second half of each id, and the numbers there."""
        written = mark.hex().encode() if self._width == 2 else mark
        starts = [m.end() for m in re.finditer(re.escape(written), encoded)]
        at = np.array(starts)[:, None] + np.arange(size * self._width)
        raw = [encoded[i : i + size * self._width] for i in starts]
        numbers = [int(r, 16) if self._width == 2 else int.from_bytes(r, "big") for r in raw]
        return at, np.array(numbers, np.uint64)

    def renew(self, send: int, first_trace: int) -> None:
        """Write the ids for send number ``send``, whose first trace has the number ``first_trace``;
        both count up over all bodies."""
        _, numbers = self._traces_at
        if self._parts == 1:
            self._write(self._whole_at, _halves(numbers + np.uint64(first_trace)))
            return
        self._write(self._whole_at, _halves(np.full(len(numbers), send // self._parts, np.uint64)))
        at, numbers = self._spans_at
        self._write(at, (numbers + np.uint64(send % self._parts * self.spans)).astype(np.uint32))

    def _write(self, at: Any, ids: Any) -> None:
        big = ids.astype(ids.dtype.newbyteorder(">"))
        digits = big.view(np.uint8).reshape(len(ids), -1)
        if self._width == 2:
            digits = _HEX[digits].reshape(len(ids), -1)
        self._array[at] = digits

    def compressed(self) -> Body:
        """Return a gzip-compressed copy. Its ids cannot be rewritten."""
        packed = object.__new__(Body)
        packed.spans, packed.traces, packed.breaches = self.spans, self.traces, self.breaches
        packed.raw = self.raw
        packed.data = isal_zlib.compress(self.data, GZIP_LEVEL, wbits=31)
        packed._parts = 0  # not renewable
        return packed

    @property
    def renewable(self) -> bool:
        """Whether :meth:`renew` can be called."""
        return self._parts > 0


def _halves(numbers: Any) -> Any:
    """Return trace ids that look random for numbers from 0, as rows of two halves."""
    low = (numbers + _FIRST) * _SPREAD
    return np.stack([low * _HIGH ^ low >> np.uint64(29), low], axis=1)


def make_bodies(shape: Shape, count: int = 0, least: int = 64) -> list[Body]:
    """Return ``count`` bodies of a shape (0: enough for 2500 traces, at least ``least``). Bodies
    with gzip have distinct ids, but sending one again repeats its ids."""
    traces = max(1, shape.spans // shape.spans_per_trace)
    renewable = count if count and not shape.gzip else max(64, least, -(-2500 // traces))
    now = time.time_ns()
    bodies = [Body(shape, i, now) for i in range(renewable)]
    if not shape.gzip:
        return bodies
    packed = []
    first = 0
    for i in range(count or max(least, 2000)):
        body = bodies[i % len(bodies)]
        body.renew(i, first)
        first += body.traces
        packed.append(body.compressed())
    return packed
