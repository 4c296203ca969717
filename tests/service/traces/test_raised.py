"""What was stored before a crash and is not known of the traces read back."""

from dataclasses import replace

import numpy as np
import orjson
import pytest

from service.ledger.sqlite import SqliteLedger
from service.record import Record
from service.signals import Kind, signal_id
from service.stages.evaluate import decide_due
from service.storage.fallback import FallbackFiles
from service.traces.layout import E_CHECK, E_COUNT, ENTRY_COLUMNS
from service.traces.raised import RaisedBefore
from tests.service.stages.faults import RULES, due, signal

pytestmark = pytest.mark.kernel

RULE = RULES.rules[0]


def raised(number, kind=Kind.RAISED, **changes):
    """A signal of the rule of ``due``."""
    plain = signal(number)
    return replace(
        plain,
        id=signal_id(plain.tenant, RULE.id, RULE.version, plain.trace_id, kind),
        rule_id=RULE.id,
        rule_version=RULE.version,
        kind=kind,
        clause="never",
        **changes,
    )


def attached(*signals, traces=(1, 2)):
    before = RaisedBefore()
    before.note(signals)
    found = due(*traces)
    before.attach(found)
    return found.raised, before


def test_traces_are_told_once_what_stands_of_them():
    told, before = attached(raised(2), raised(3))
    assert told == {1: {(RULE.id, RULE.version, "never")}}
    again = due(2)
    before.attach(again)
    assert again.raised == {}
    assert len(before) == 1


def test_what_was_retracted_or_raised_early_needs_no_retraction():
    assert attached(raised(1), raised(1, Kind.RETRACTED))[0] == {}
    assert attached(raised(1, early=True))[0] == {}
    assert attached(replace(raised(1), tenant="other"))[0] == {}


def test_it_is_saved_and_reduced_to_what_is_wanted():
    _, before = attached(*map(raised, range(10, 20)))
    other = RaisedBefore()
    other.restore(before.saved())
    assert other.saved() == before.saved()
    keep = {raised(12).trace_id, raised(15).trace_id}
    other.keep(lambda tenant, trace_id: tenant == "acme" and trace_id in keep)
    assert other.saved()["acme"].keys() == keep
    other.keep(lambda tenant, trace_id: False)
    assert len(other) == 0
    assert other.saved() == {}


def test_a_stored_breach_that_does_not_hold_is_retracted():
    traces = due(1)
    traces.raised = {0: frozenset([(RULE.id, RULE.version, "never")])}
    (breach,) = decide_due(traces, 5).signals
    assert breach.kind is Kind.RAISED  # it holds still, and is the same signal

    traces.entries = np.zeros((1, ENTRY_COLUMNS), np.int64)
    traces.entries[0, E_CHECK], traces.entries[0, E_COUNT] = 0, 2
    traces.starts = np.array([0, 1], np.int64)
    (retraction,) = decide_due(traces, 5).signals
    assert retraction.kind is Kind.RETRACTED
    assert retraction.id == raised(1, Kind.RETRACTED).id
    assert retraction.clause == "never"
    assert retraction.reason

    traces.raised = {0: frozenset([(RULE.id, "another version", "never")])}
    assert decide_due(traces, 5).signals == []


def test_the_record_is_the_ledger_and_its_fallback_files(tmp_path):
    ledger = SqliteLedger(tmp_path / "ledger.sqlite")
    files = FallbackFiles(tmp_path / "files", 1 << 20)
    record = Record(ledger, files)
    minute = 60 * 10**9
    old, first, second, third = (raised(n, detected_at=n * 10 * minute) for n in range(4))
    ledger.record([old, first])
    recorded = record.last_entries()
    ledger.record([second])
    files.append([orjson.dumps(third.to_json()), b"damaged", orjson.dumps(old.to_json())])

    def since(*given):
        return [signal for page in record.since(*given) for signal in page]

    assert since(recorded, 20 * minute) == [third, second]
    assert since({}, 0) == [third, old, old, first, second]
    ledger.close()
    assert record.last_entries() == recorded  # as far as is known
    files.close()
