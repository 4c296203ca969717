"""What the service said last, in types, and short histories of what is plotted.

Parsing is lenient: a figure that is not there is None or 0, so that a TUI works with a service that
is a little older or newer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from betrace.tui.client import Json

HISTORY = 300
"""Points kept of each history: five minutes at one a second."""

MAX_SERIES = 200
"""Histories kept, at most."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage and the channel before it, which have one name."""

    name: str
    unit: str
    """What the channel counts: spans, traces or rows."""
    size: int
    capacity: int
    fill: float
    """Per cent."""
    peak: int
    blocked: int
    """Senders that wait for room."""
    workers: int
    busy: int
    taken: int
    """In since the start, in the unit."""
    done: int
    errors: int
    dropped: int
    """Batches given up: dead letters, or refused."""
    last_progress: float | None
    """Seconds since 1970."""
    p50: float | None
    """Milliseconds that the stage works on a batch."""
    p95: float | None
    p99: float | None
    last_error: str
    state: str
    """working or paused."""
    status: str
    """Of the component: ok, degraded, failed, starting, stopping."""
    detail: str


@dataclass(frozen=True, slots=True)
class Transition:
    at: float
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class Breaker:
    name: str
    state: str
    since: float | None
    failure_rate: float | None
    """0 to 1; None below the least number of calls."""
    slow_rate: float | None
    window_calls: int
    running: int
    trials_left: int
    retry_in: float | None
    """Seconds to the next trial; None if only an operator can say."""
    calls: Mapping[str, int]
    """Since the start, by kind."""
    settings: Mapping[str, float]
    transitions: tuple[Transition, ...]
    """The recent ones, oldest first."""


@dataclass(frozen=True, slots=True)
class Cache:
    name: str
    size: int
    capacity: int
    hits: int
    misses: int
    hit_rate: float
    """0 to 1, since the start."""
    evictions: int | None
    loads: int | None
    load_failures: int | None
    load_ms: float | None
    """Mean time of a load, in milliseconds."""


@dataclass(frozen=True, slots=True)
class Component:
    name: str
    status: str
    detail: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The service at one moment. ``raw`` is all that it said."""

    at: float
    """When it was received, in seconds since 1970."""
    accepted: int
    signals: int
    retracted: int
    refused: Mapping[str, int]
    """Spans of refused requests by reason."""
    in_flight: int
    tenants: int
    uptime: float
    end_to_end_p99: float | None
    """Milliseconds from the last span that mattered to the signal in the ledger."""
    stages: tuple[Stage, ...]
    breakers: tuple[Breaker, ...]
    caches: tuple[Cache, ...]
    components: tuple[Component, ...]
    open_traces: int
    ready: bool
    ingestion: str
    """open, paused or draining."""
    raw: Json


def parse(data: Json, at: float) -> Snapshot:
    """A snapshot as :meth:`betrace.tui.client.Client.snapshot` and the stream give it."""
    metrics = _dict(data.get("metrics"))
    pipeline = _dict(data.get("pipeline"))
    components = tuple(
        Component(name, _str(_dict(shown).get("status")), _str(_dict(shown).get("detail")))
        for name, shown in _dict(data.get("components")).items()
    )
    by_name = {component.name: component for component in components}
    paused = _dict(pipeline.get("stages"))
    worked = _dict(metrics.get("stages"))
    return Snapshot(
        at=at,
        accepted=_int(metrics.get("spansAccepted")),
        signals=_int(metrics.get("signalsRaised")),
        retracted=_int(metrics.get("signalsRetracted")),
        refused={name: _int(n) for name, n in _dict(metrics.get("spansRefused")).items()},
        in_flight=_int(metrics.get("spansInFlight")),
        tenants=_int(metrics.get("activeTenants")),
        uptime=_float(metrics.get("uptime")) or 0.0,
        end_to_end_p99=_float(metrics.get("endToEndP99")),
        stages=tuple(
            _stage(queue, _dict(worked.get(_str(queue.get("name")))), by_name, paused)
            for queue in _dicts(data.get("queues"))
        ),
        breakers=tuple(_breaker(each) for each in _dicts(data.get("breakers"))),
        caches=tuple(_cache(name, _dict(c)) for name, c in _dict(data.get("caches")).items()),
        components=components,
        open_traces=_int(_dict(data.get("traceWindows")).get("activeWindows")),
        ready=bool(data.get("ready")),
        ingestion=_str(pipeline.get("ingestion")) or "open",
        raw=data,
    )


def _stage(queue: Json, worked: Json, components: Mapping[str, Component], paused: Json) -> Stage:
    name = _str(queue.get("name"))
    component = components.get(name)
    latency = _dict(worked.get("latencyMs"))
    return Stage(
        name=name,
        unit=_str(queue.get("unit")),
        size=_int(queue.get("currentSize")),
        capacity=_int(queue.get("capacity")),
        fill=_float(queue.get("utilizationPercent")) or 0.0,
        peak=_int(queue.get("peak")),
        blocked=_int(queue.get("waitingSenders")),
        workers=_int(queue.get("concurrentConsumers")),
        busy=_int(queue.get("busyConsumers")),
        taken=_int(worked.get("unitsIn")),
        done=_int(worked.get("unitsOut")),
        errors=_int(worked.get("errors")),
        dropped=_int(worked.get("dead")),
        last_progress=_float(worked.get("lastProgress")),
        p50=_float(latency.get("p50")),
        p95=_float(latency.get("p95")),
        p99=_float(latency.get("p99")),
        last_error=_str(worked.get("lastError")),
        state=_str(paused.get(name)) or "working",
        status=component.status if component else "ok",
        detail=component.detail if component else "",
    )


def _breaker(data: Json) -> Breaker:
    return Breaker(
        name=_str(data.get("name")),
        state=_str(data.get("state")),
        since=_float(data.get("since")),
        failure_rate=_float(data.get("failureRate")),
        slow_rate=_float(data.get("slowCallRate")),
        window_calls=_int(data.get("windowCalls")),
        running=_int(data.get("running")),
        trials_left=_int(data.get("trialsLeft")),
        retry_in=_float(data.get("retryInSeconds")),
        calls={name: _int(number) for name, number in _dict(data.get("calls")).items()},
        settings={name: _float(v) or 0.0 for name, v in _dict(data.get("settings")).items()},
        transitions=tuple(
            Transition(
                _float(each.get("at")) or 0.0,
                _str(each.get("before")),
                _str(each.get("after")),
                _str(each.get("reason")),
            )
            for each in _dicts(data.get("transitions"))
        ),
    )


def _cache(name: str, data: Json) -> Cache:
    def optional(key: str) -> int | None:
        return _int(data[key]) if key in data else None

    return Cache(
        name=name,
        size=_int(data.get("size")),
        capacity=_int(data.get("maxSize")),
        hits=_int(data.get("hitCount")),
        misses=_int(data.get("missCount")),
        hit_rate=_float(data.get("hitRate")) or 0.0,
        evictions=optional("evictionCount"),
        loads=optional("loadSuccessCount"),
        load_failures=optional("loadFailureCount"),
        load_ms=_float(data.get("averageLoadPenaltyMs")),
    )


class State:
    """The last snapshot, and histories of `HISTORY` points that end with it.

    The histories (see :meth:`history`) and :meth:`rate` go by name: ``accepted``, ``signals``,
    ``refused`` (a second), ``end_to_end_p99`` (milliseconds), ``memory`` (bytes), ``cpu`` (cores),
    and for each stage ``<name>.in``, ``<name>.out`` and ``<name>.dropped`` (a second) and
    ``<name>.fill`` (per cent), for each cache ``<name>.hit_rate`` (0 to 1, of the requests since
    the snapshot before; no point without requests), for each breaker ``<name>.failure_rate``.
    """

    def __init__(self) -> None:
        self.now: Snapshot | None = None
        self.stale = False
        """Whether the connection is lost, so that this is how it was."""
        self._histories: dict[str, deque[float]] = {}

    def update(self, snapshot: Snapshot) -> None:
        before, self.now = self.now, snapshot
        if before is None or snapshot.uptime < before.uptime:  # the service was started again
            return
        seconds = snapshot.at - before.at
        if seconds < 0.1:  # too short for a rate
            return
        for name, value in _points(before, snapshot, seconds):
            self._add(name, value)

    def _add(self, name: str, value: float) -> None:
        if name not in self._histories:
            if len(self._histories) >= MAX_SERIES:
                return
            self._histories[name] = deque(maxlen=HISTORY)
        self._histories[name].append(value)

    def history(self, name: str, points: int = HISTORY) -> list[float]:
        """The last points, oldest first."""
        found = self._histories.get(name)
        return [] if found is None else list(found)[-points:]

    def rate(self, name: str) -> float | None:
        """The last point; None before there are two snapshots."""
        found = self._histories.get(name)
        return found[-1] if found else None


def _points(before: Snapshot, now: Snapshot, seconds: float) -> Iterable[tuple[str, float]]:
    def per_second(new: float, old: float) -> float:
        return max(0.0, new - old) / seconds

    yield "accepted", per_second(now.accepted, before.accepted)
    memory, used = _memory_and_cpu(now)
    yield "memory", memory
    yield "cpu", per_second(used, _memory_and_cpu(before)[1])
    yield "signals", per_second(now.signals, before.signals)
    yield "refused", per_second(sum(now.refused.values()), sum(before.refused.values()))
    if now.end_to_end_p99 is not None:
        yield "end_to_end_p99", now.end_to_end_p99
    stages = {stage.name: stage for stage in before.stages}
    for stage in now.stages:
        yield f"{stage.name}.fill", stage.fill
        old = stages.get(stage.name)
        if old is not None:
            yield f"{stage.name}.in", per_second(stage.taken, old.taken)
            yield f"{stage.name}.out", per_second(stage.done, old.done)
            yield f"{stage.name}.dropped", per_second(stage.dropped, old.dropped)
    caches = {cache.name: cache for cache in before.caches}
    for cache in now.caches:
        then = caches.get(cache.name)
        if then is not None:
            hits, misses = cache.hits - then.hits, cache.misses - then.misses
            if hits >= 0 and misses >= 0 and hits + misses:
                yield f"{cache.name}.hit_rate", hits / (hits + misses)
    for breaker in now.breakers:
        if breaker.failure_rate is not None:
            yield f"{breaker.name}.failure_rate", breaker.failure_rate


def _memory_and_cpu(snapshot: Snapshot) -> tuple[float, float]:
    """Bytes in memory, and seconds of CPU since the start."""
    system = _dict(snapshot.raw.get("system"))
    cpu = _dict(system.get("cpu"))
    used = sum(_float(cpu.get(name)) or 0.0 for name in ("userSeconds", "systemSeconds"))
    return _float(_dict(system.get("memory")).get("rssBytes")) or 0.0, used


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[Json]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _int(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _str(value: Any) -> str:
    return value if isinstance(value, str) else ""
