"""Signals stored before a crash that the restored traces do not know, and the next signals."""

import hashlib
from dataclasses import replace
from itertools import permutations

import numpy as np
import orjson
import pytest

from betrace.service.signals import Kind, signal_id
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.ledger.record import Record
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.traces.layout import E_CHECK, E_COUNT, ENTRY_COLUMNS
from betrace.service.traces.signal_history import LedgerHistory, RuleSignals, next_signals
from betrace.service.traces.verdicts import decide_due
from tests.support.failing_stores import RULES, due, signal

pytestmark = pytest.mark.kernel

RULE = RULES.rules[0]


KEY = (RULE.id, RULE.version)


def raised(number, kind=Kind.RAISED, episode=0, **changes):
    """A signal of the rule of ``due``."""
    plain = signal(number)
    return replace(
        plain,
        id=signal_id(plain.tenant, RULE.id, RULE.version, plain.trace_id, kind, episode),
        rule_id=RULE.id,
        rule_version=RULE.version,
        kind=kind,
        clause="never",
        episode=episode,
        **changes,
    )


def noted(*signals):
    history = LedgerHistory()
    history.note(signals)
    return history.of("acme")


def test_signals_are_counted_once_in_any_order():
    trace = raised(1).trace_id
    signals = [raised(1, kind, n) for n in range(3) for kind in (Kind.RAISED, Kind.RETRACTED)]
    for count in range(1, 7):
        for some in permutations(signals[:count], min(count, 3)):
            history = noted(*some, *signals[:count], some[0])
            assert history == {trace: {KEY: RuleSignals(count, "never")}}


def test_signals_raised_early_are_not_noted():
    assert noted(raised(1, early=True)) == {}
    assert noted(replace(raised(1), tenant="other")) == {}


def test_the_ledger_history_is_saved_and_reduced_to_wanted_traces():
    history = LedgerHistory()
    history.note(map(raised, range(10, 20)))
    other = LedgerHistory()
    other.restore(history.saved())
    traces = other.of("acme")
    assert traces == history.of("acme")
    assert len(other) == 10
    keep = {raised(12).trace_id, raised(15).trace_id}
    other.keep(lambda tenant, trace_id: tenant == "acme" and trace_id in keep)
    assert traces.keys() == keep  # tables share it
    other.keep(lambda tenant, trace_id: False)
    assert len(other) == 0
    assert other.saved() == {}


def test_a_rule_emits_a_signal_only_when_its_verdict_changes():
    known = {("a", "1"), ("b", "1"), ("c", "2")}
    history = {
        ("a", "1"): RuleSignals(1, "never"),
        ("b", "1"): RuleSignals(2, "always"),
        ("c", "1"): RuleSignals(1, "never"),  # in a version that no longer exists
        ("gone", "1"): RuleSignals(1, "never"),
    }
    assert next_signals(history, {("a", "1"): "never"}, known) == {}
    assert next_signals(history, {("b", "1"): "never", ("c", "2"): "never"}, known) == {
        ("a", "1"): RuleSignals(2, "never"),
        ("b", "1"): RuleSignals(3, "never"),
    }
    assert next_signals({}, {("c", "2"): "always"}, known) == {("c", "2"): RuleSignals(1, "always")}


def kinds(signals):
    return [(s.rule_id, s.kind, s.episode) for s in signals]


@pytest.mark.parametrize("emitted", range(5))
def test_active_signals_are_retracted_and_retracted_ones_raised_again(emitted):
    breach, kept = due(1), due(1)
    kept.entries = np.zeros((1, ENTRY_COLUMNS), np.int64)
    kept.entries[0, E_CHECK], kept.entries[0, E_COUNT] = 0, 2
    kept.starts = np.array([0, 1], np.int64)
    for each in (breach, kept):
        each.signal_history = {0: {KEY: RuleSignals(emitted, "never")}} if emitted else {}
    (signal,) = decide_due(breach, 5).signals
    assert signal.id == raised(1, episode=emitted // 2).id
    assert (signal.kind, signal.episode) == (Kind.RAISED, emitted // 2)
    assert signal.message == "no-loop: condition met: fewer than 2 loop, found 0"
    found = decide_due(kept, 5).signals
    if emitted % 2:
        (signal,) = found
        assert signal.id == raised(1, Kind.RETRACTED, emitted // 2).id
        assert signal.clause == "never"
        assert signal.message == "no-loop: no longer broken (loop: 2)"
        assert signal.reason
    else:
        assert found == []


def test_the_first_signal_has_the_documented_id():
    parts = ("t", "r", "v", "0" * 32, "raised")
    text = "".join(f"{len(part)}:{part}" for part in parts)
    plain = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert signal_id("t", "r", "v", "0" * 32, Kind.RAISED) == plain
    ids = {signal_id("t", "r", "v", "0" * 32, kind, n) for kind in Kind for n in range(20)}
    assert len(ids) == 40


def test_a_rule_that_is_active_in_another_version_is_not_raised_or_retracted():
    traces = due(1)
    traces.signal_history = {0: {(RULE.id, "another version"): RuleSignals(1, "never")}}
    assert decide_due(traces, 5).signals == []


def test_the_record_combines_the_ledger_and_its_fallback_files(tmp_path):
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
    ledger.add_outgoing([third])  # perhaps the ledger has it
    assert since(recorded, 20 * minute) == [third, third, second]
    ledger.close()
    assert record.last_entries() == recorded  # the last known ones
    files.close()
