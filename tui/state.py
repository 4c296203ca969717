"""The last snapshot of the service, parsed, and short histories of the values that are plotted.

Parsing is lenient: a missing value becomes None or 0, so the TUI works with a slightly older or
newer service.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from betrace.tui.json_values import Json, as_float, as_int, as_text, mapping, objects

HISTORY = 300
"""Points kept for each history: five minutes at one per second."""

MAX_SERIES = 200
"""Maximum number of histories."""


@dataclass(frozen=True, slots=True)
class StageStatus:
    """A stage and its input channel, which share a name."""

    name: str
    unit: str
    """What the channel counts: spans, traces or rows."""
    size: int
    capacity: int
    fill: float
    """In per cent."""
    peak: int
    blocked: int
    """Senders that wait because the channel is full."""
    workers: int
    busy: int
    taken: int
    """Input since the start, in ``unit``."""
    done: int
    errors: int
    dropped: int
    """Batches that failed for good: dead letters, or refused."""
    last_progress: float | None
    """Seconds since 1970."""
    p50: float | None
    """Milliseconds of work per batch."""
    p95: float | None
    p99: float | None
    last_error: str
    state: str
    """working or paused."""
    status: str
    """Of the component: ok, degraded, failed, starting or stopping."""
    detail: str


@dataclass(frozen=True, slots=True)
class BreakerTransition:
    at: float
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class BreakerStatus:
    name: str
    state: str
    since: float | None
    failure_rate: float | None
    """0 to 1; None before the minimum number of calls."""
    slow_rate: float | None
    window_calls: int
    running: int
    trials_left: int
    retry_in: float | None
    """Seconds to the next trial call; None if only an operator can close it."""
    calls: Mapping[str, int]
    """Since the start, by kind."""
    settings: Mapping[str, float]
    transitions: tuple[BreakerTransition, ...]
    """Recent transitions, oldest first."""


@dataclass(frozen=True, slots=True)
class CacheStatus:
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
    """Mean duration of a load in milliseconds."""


@dataclass(frozen=True, slots=True)
class ComponentStatus:
    name: str
    status: str
    detail: str


@dataclass(frozen=True, slots=True)
class WaitingTenant:
    """A tenant that used up its CPU time, so that its spans wait."""

    name: str
    spans: int
    seconds: float
    """How long the oldest has waited."""
    cpu_seconds: float
    """CPU time that the tenant had meanwhile."""


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """The service at one moment. ``raw`` is the complete snapshot."""

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
    """Milliseconds from the last relevant span to the signal in the ledger."""
    stages: tuple[StageStatus, ...]
    breakers: tuple[BreakerStatus, ...]
    caches: tuple[CacheStatus, ...]
    components: tuple[ComponentStatus, ...]
    open_traces: int
    ready: bool
    ingestion: str
    """open, paused or draining."""
    waiting: tuple[WaitingTenant, ...]
    raw: Json


def parse(data: Json, at: float) -> ServiceSnapshot:
    """Parse a snapshot from :meth:`betrace.tui.client.ApiClient.snapshot` or from the stream."""
    metrics = mapping(data.get("metrics"))
    pipeline = mapping(data.get("pipeline"))
    components = tuple(
        ComponentStatus(
            name, as_text(mapping(shown).get("status")), as_text(mapping(shown).get("detail"))
        )
        for name, shown in mapping(data.get("components")).items()
    )
    by_name = {component.name: component for component in components}
    paused = mapping(pipeline.get("stages"))
    worked = mapping(metrics.get("stages"))
    return ServiceSnapshot(
        at=at,
        accepted=as_int(metrics.get("spansAccepted")),
        signals=as_int(metrics.get("signalsRaised")),
        retracted=as_int(metrics.get("signalsRetracted")),
        refused={name: as_int(n) for name, n in mapping(metrics.get("spansRefused")).items()},
        in_flight=as_int(metrics.get("spansInFlight")),
        tenants=as_int(metrics.get("activeTenants")),
        uptime=as_float(metrics.get("uptime")) or 0.0,
        end_to_end_p99=as_float(metrics.get("endToEndP99")),
        stages=tuple(
            _stage(queue, mapping(worked.get(as_text(queue.get("name")))), by_name, paused)
            for queue in objects(data.get("queues"))
        ),
        breakers=tuple(_breaker(each) for each in objects(data.get("breakers"))),
        caches=tuple(_cache(name, mapping(c)) for name, c in mapping(data.get("caches")).items()),
        components=components,
        open_traces=as_int(mapping(data.get("traceWindows")).get("activeWindows")),
        ready=bool(data.get("ready")),
        ingestion=as_text(pipeline.get("ingestion")) or "open",
        waiting=tuple(
            _waiting(name, mapping(each)) for name, each in mapping(pipeline.get("backlog")).items()
        ),
        raw=data,
    )


def _waiting(name: str, line: Json) -> WaitingTenant:
    return WaitingTenant(
        name,
        as_int(line.get("spans")),
        as_float(line.get("seconds")) or 0.0,
        as_float(line.get("cpuSeconds")) or 0.0,
    )


def _stage(
    queue: Json, worked: Json, components: Mapping[str, ComponentStatus], paused: Json
) -> StageStatus:
    name = as_text(queue.get("name"))
    component = components.get(name)
    latency = mapping(worked.get("latencyMs"))
    return StageStatus(
        name=name,
        unit=as_text(queue.get("unit")),
        size=as_int(queue.get("currentSize")),
        capacity=as_int(queue.get("capacity")),
        fill=as_float(queue.get("utilizationPercent")) or 0.0,
        peak=as_int(queue.get("peak")),
        blocked=as_int(queue.get("waitingSenders")),
        workers=as_int(queue.get("concurrentConsumers")),
        busy=as_int(queue.get("busyConsumers")),
        taken=as_int(worked.get("unitsIn")),
        done=as_int(worked.get("unitsOut")),
        errors=as_int(worked.get("errors")),
        dropped=as_int(worked.get("dead")),
        last_progress=as_float(worked.get("lastProgress")),
        p50=as_float(latency.get("p50")),
        p95=as_float(latency.get("p95")),
        p99=as_float(latency.get("p99")),
        last_error=as_text(worked.get("lastError")),
        state=as_text(paused.get(name)) or "working",
        status=component.status if component else "ok",
        detail=component.detail if component else "",
    )


def _breaker(data: Json) -> BreakerStatus:
    return BreakerStatus(
        name=as_text(data.get("name")),
        state=as_text(data.get("state")),
        since=as_float(data.get("since")),
        failure_rate=as_float(data.get("failureRate")),
        slow_rate=as_float(data.get("slowCallRate")),
        window_calls=as_int(data.get("windowCalls")),
        running=as_int(data.get("running")),
        trials_left=as_int(data.get("trialsLeft")),
        retry_in=as_float(data.get("retryInSeconds")),
        calls={name: as_int(number) for name, number in mapping(data.get("calls")).items()},
        settings={name: as_float(v) or 0.0 for name, v in mapping(data.get("settings")).items()},
        transitions=tuple(
            BreakerTransition(
                as_float(each.get("at")) or 0.0,
                as_text(each.get("before")),
                as_text(each.get("after")),
                as_text(each.get("reason")),
            )
            for each in objects(data.get("transitions"))
        ),
    )


def _cache(name: str, data: Json) -> CacheStatus:
    def optional(key: str) -> int | None:
        return as_int(data[key]) if key in data else None

    return CacheStatus(
        name=name,
        size=as_int(data.get("size")),
        capacity=as_int(data.get("maxSize")),
        hits=as_int(data.get("hitCount")),
        misses=as_int(data.get("missCount")),
        hit_rate=as_float(data.get("hitRate")) or 0.0,
        evictions=optional("evictionCount"),
        loads=optional("loadSuccessCount"),
        load_failures=optional("loadFailureCount"),
        load_ms=as_float(data.get("averageLoadPenaltyMs")),
    )


class ServiceState:
    """The last snapshot, and histories of at most `HISTORY` points that end with it.

    The names of histories are: ``accepted``, ``signals`` and ``refused`` (per second),
    ``end_to_end_p99`` (milliseconds), ``memory`` (bytes), ``cpu`` (cores); for each stage
    ``<name>.in``, ``<name>.out`` and ``<name>.dropped`` (per second) and ``<name>.fill`` (per
    cent); for each cache ``<name>.hit_rate`` (0 to 1, of the requests since the previous snapshot;
    no point without requests); and for each breaker ``<name>.failure_rate``.
    """

    def __init__(self) -> None:
        self.now: ServiceSnapshot | None = None
        self.stale = False
        """Whether the connection is lost, so that the snapshot is out of date."""
        self._histories: dict[str, deque[tuple[float, float]]] = {}

    def update(self, snapshot: ServiceSnapshot) -> None:
        before, self.now = self.now, snapshot
        if before is None or snapshot.uptime < before.uptime:  # the service restarted
            return
        seconds = snapshot.at - before.at
        if seconds < 0.1:  # too short for a rate
            return
        for name, value in _points(before, snapshot, seconds):
            self._add(name, snapshot.at, value)

    def _add(self, name: str, at: float, value: float) -> None:
        if name not in self._histories:
            if len(self._histories) >= MAX_SERIES:
                return
            self._histories[name] = deque(maxlen=HISTORY)
        self._histories[name].append((at, value))

    def history(self, name: str, points: int = HISTORY) -> list[float]:
        """The last points, oldest first."""
        return [value for _, value in self._last(name, points)]

    def period(self, name: str, points: int = HISTORY) -> float:
        """Seconds since the oldest of the last points."""
        last = self._last(name, points)
        return self.now.at - last[0][0] if last and self.now is not None else 0.0

    def rate(self, name: str) -> float | None:
        """The last point; None before there are two snapshots."""
        found = self._histories.get(name)
        return found[-1][1] if found else None

    def _last(self, name: str, points: int) -> list[tuple[float, float]]:
        return list(self._histories.get(name, ()))[-max(1, points) :]


def _points(
    before: ServiceSnapshot, now: ServiceSnapshot, seconds: float
) -> Iterable[tuple[str, float]]:
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


def _memory_and_cpu(snapshot: ServiceSnapshot) -> tuple[float, float]:
    """Resident bytes, and seconds of CPU time since the start."""
    system = mapping(snapshot.raw.get("system"))
    cpu = mapping(system.get("cpu"))
    used = sum(as_float(cpu.get(name)) or 0.0 for name in ("userSeconds", "systemSeconds"))
    return as_float(mapping(system.get("memory")).get("rssBytes")) or 0.0, used
