"""Runs the examples of rules with the pipeline's engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import Problem, Rule
from betrace.service.rules.examples import Example, flat_spans, nanoseconds
from betrace.service.rules.syntax import KINDS, STATUSES
from betrace.service.rules.workspace import FOREVER
from betrace.service.traces.slices import CpuSlice
from betrace.service.traces.trial import Trial, TrialError, Verdict

MAX_BODY_BYTES = 4 * 1024 * 1024
_TRACE_ID = b"\xbe" * 16
_EPOCH_NS = 1_700_000_000 * 10**9  # of start_ms 0


def check_examples(
    rules: Iterable[Rule], source: str = "rule", cpu_seconds: float = FOREVER
) -> list[Problem]:
    """The examples that do not do what they say, in the order of the rules. Rules that are not
    enabled are checked, too; ``cpu_seconds`` bounds each rule."""
    problems: list[Problem] = []
    for rule in rules:
        if not rule.examples:
            continue
        spent = CpuSlice(FOREVER)
        compiled = compile_rules([replace(rule, enabled=True)])
        for number, example in enumerate(rule.examples):
            found = _fault(compiled, example, max(0.0, cpu_seconds - spent.used))
            if found is not None:
                path = ("examples", number)
                message = f"the example '{example.name}' {found[0]}"
                problems.append(
                    Problem(source, message, rule.id, example.line, hint=found[1], path=path)
                )
    return problems


def run_example(rules: CompiledRules, example: Example, seconds: float = FOREVER) -> Verdict:
    """The verdict of the only rule in ``rules``. Raises :exc:`TrialError`."""
    trial = Trial(rules, seconds=seconds)
    trial.add(example_body(example))
    (verdict,) = trial.verdicts()
    return verdict


def _fault(rules: CompiledRules, example: Example, seconds: float) -> tuple[str, str | None] | None:
    """What the example does wrong, with a hint; None if it does what it says."""
    try:
        verdict = run_example(rules, example, seconds)
    except TrialError as error:
        return f"cannot be evaluated: {error}", None
    if verdict.undecided is not None:
        return f"is undecided: {verdict.undecided}", None
    wanted = f"{example.clause or 'broken'}"
    if not verdict.breach and example.expect == "broken":
        counts = ", ".join(f"{check}: {count}" for check, count in verdict.counts.items())
        why = verdict.skipped or (f"the matching spans are {counts}" if counts else None)
        return "is kept, but should be broken", why
    if verdict.breach and example.expect == "kept":
        return "is broken, but should be kept", verdict.message
    if verdict.breach and example.clause not in (None, verdict.clause):
        return f"breaks '{verdict.clause}', but should break '{wanted}'", verdict.message
    return None


def example_body(example: Example) -> bytes:
    """The spans of an example as an OTLP export request in protobuf. Raises :exc:`TrialError` if it
    has more than 4 MiB."""
    request = ExportTraceServiceRequest()
    size = 0
    for span in flat_spans(example.spans):
        resource_spans = request.resource_spans.add()
        resource = dict(span.get("resource", {}))
        if "service" in span:
            resource.setdefault("service.name", span["service"])
        _set_all(resource_spans.resource.attributes, resource)
        scope_spans = resource_spans.scope_spans.add()
        scope_spans.scope.name = span.get("scope", "")
        _fill(scope_spans.spans.add(), span)
        size += resource_spans.ByteSize()
        if size > MAX_BODY_BYTES:
            raise TrialError(f"its spans have more than {MAX_BODY_BYTES >> 20} MiB")
    return request.SerializeToString()


def _fill(message: Span, span: Mapping[str, Any]) -> None:
    start = _EPOCH_NS + nanoseconds(span.get("start_ms", 0))
    message.trace_id = _TRACE_ID
    message.span_id = _id(span["span_id"], 8)
    if span.get("parent_id") not in (None, ""):
        message.parent_span_id = _id(span["parent_id"], 8)
    message.name = span["name"]
    message.kind = Span.SpanKind.ValueType(KINDS.index(span.get("kind", "internal")))
    message.start_time_unix_nano = start
    message.end_time_unix_nano = max(0, start + nanoseconds(span.get("duration_ms", 1)))
    message.status.code = STATUSES.index(span.get("status", "unset"))  # type: ignore[assignment]
    message.status.message = span.get("status_message", "")
    _set_all(message.attributes, span.get("attributes", {}))
    for given in span.get("events", ()):
        event = message.events.add(name=given.get("name", ""))
        event.time_unix_nano = max(0, start + nanoseconds(given.get("offset_ms", 0)))
        _set_all(event.attributes, given.get("attributes", {}))
    for given in span.get("links", ()):
        link = message.links.add()
        link.trace_id = _id(given.get("trace_id", "another trace"), 16)
        link.span_id = _id(given.get("span_id", "another span"), 8)
        _set_all(link.attributes, given.get("attributes", {}))


def _id(given: str | int, size: int) -> bytes:
    """An id: hex digits as they are, any other text by its hash."""
    text = str(given)
    if len(text) == 2 * size:
        try:
            return bytes.fromhex(text)
        except ValueError:
            pass
    return hashlib.sha256(text.encode()).digest()[:size]


def _set_all(target: Any, attributes: Mapping[str, Any]) -> None:
    target.extend(KeyValue(key=key, value=_value(value)) for key, value in attributes.items())


def _value(value: Any) -> AnyValue:
    made = AnyValue()
    match value:
        case bool():
            made.bool_value = value
        case int():
            made.int_value = value
        case float():
            made.double_value = value
        case str():
            made.string_value = value
        case list():
            made.array_value.SetInParent()
            made.array_value.values.extend(_value(item) for item in value)
        case dict():
            made.kvlist_value.SetInParent()
            _set_all(made.kvlist_value.values, value)
    return made
