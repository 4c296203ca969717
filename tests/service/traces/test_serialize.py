"""Due traces as bytes, and back."""

import io

import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import given, settings

from betrace.service.traces.due import Context
from betrace.service.traces.serialize import FORMAT, SerialError, from_bytes, to_bytes
from betrace.service.traces.signal_history import RuleSignals
from betrace.service.traces.verdicts import decide_due
from tests.support.engine import Engine
from tests.support.examples import examples
from tests.support.failing_stores import due
from tests.support.strategies import encode, rules, splits, traces

pytestmark = pytest.mark.kernel


def assert_same(one, other):
    assert (one.tenant, one.closed, one.received_ns, one.spans) == (
        other.tenant,
        other.closed,
        other.received_ns,
        other.spans,
    )
    for name in ("rows", "names", "entries", "starts"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert list(one.services) == list(other.services)
    assert one.contexts == other.contexts
    assert one.signal_history == other.signal_history
    assert [r.definition() for r in one.rules.rules] == [r.definition() for r in other.rules.rules]
    assert one.rules.version == other.rules.version
    assert (one.spilled is None) == (other.spilled is None)
    if one.spilled is not None:
        assert np.array_equal(one.spilled, other.spilled)


def test_everything_except_the_ticket_is_restored():
    given = due(1, 2, 3)
    given.spilled = np.arange(20, dtype=np.int64).reshape(2, 10)
    given.contexts = {1: Context(3, 201, (-5, 2**63 - 1))}
    given.signal_history = {
        2: {("a", "v1"): RuleSignals(1, "never"), ("b", "v1"): RuleSignals(4, "always")}
    }
    given.received_ns, given.spans, given.ticket = 77, 5, 9
    found = from_bytes(to_bytes(given))
    assert_same(found, given)
    assert found.ticket == 0


@settings(max_examples=examples(30))
@given(traces().flatmap(lambda spans: splits(spans)), rules())
def test_restored_traces_get_the_same_verdicts(parts, rule):
    engine = Engine([rule])
    seen = []
    decide = engine._decide
    engine._decide = lambda due: (seen.append(due), decide(due))
    for part in parts:
        engine.send(encode(part))
    engine.close()
    for each in seen:
        found = from_bytes(to_bytes(each))
        assert_same(found, each)
        assert decide_due(found, 5).signals == decide_due(each, 5).signals


def packed(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return zstandard.compress(file.getvalue())


def changed(**changes):
    raw = zstandard.decompress(to_bytes(due(1)))
    with np.load(io.BytesIO(raw)) as file:
        arrays = dict(file)
    header = orjson.loads(arrays["header"].tobytes()) | changes
    arrays["header"] = np.frombuffer(orjson.dumps(header), np.uint8)
    return packed(**arrays)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not zstd",
        zstandard.compress(b"not npz"),
        to_bytes(due(1))[:-3],
        packed(rows=np.zeros(3)),
        packed(header=np.frombuffer(b"no json", np.uint8)),
        changed(format=FORMAT + 1),
        changed(rules=[{"id": "x", "condition": "((("}]),
        changed(checks=["something else"]),
        changed(contexts=5),
    ],
)
def test_other_bytes_are_rejected(data):
    with pytest.raises(SerialError):
        from_bytes(data)


def test_bytes_without_rules_are_rejected():
    raw = zstandard.decompress(to_bytes(due(1)))
    with np.load(io.BytesIO(raw)) as file:
        arrays = dict(file)
    header = orjson.loads(arrays["header"].tobytes())
    del header["rules"]
    arrays["header"] = np.frombuffer(orjson.dumps(header), np.uint8)
    with pytest.raises(SerialError, match="rules"):
        from_bytes(packed(**arrays))
