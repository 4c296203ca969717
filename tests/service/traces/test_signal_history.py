"""What was stored before a crash and is not known of the traces read back."""

import hashlib
from dataclasses import replace
from itertools import permutations

import numpy as np
import orjson
import pytest

from betrace.service.pipeline.stages.evaluate import decide_due
from betrace.service.signals import Kind, signal_id
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.ledger.record import Record
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.traces.layout import E_CHECK, E_COUNT, ENTRY_COLUMNS
from betrace.service.traces.signal_history import Raised, RaisedBefore, next_steps
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
    before = RaisedBefore()
    before.note(signals)
    return before.of("acme")


def test_signals_are_counted_by_their_ids_in_any_order():
    trace = raised(1).trace_id
    history = [raised(1, kind, n) for n in range(3) for kind in (Kind.RAISED, Kind.RETRACTED)]
    for count in range(1, 7):
        for some in permutations(history[:count], min(count, 3)):
            told = noted(*some, *history[:count], some[0])
            assert told == {trace: {KEY: Raised(count, "never")}}


def test_what_was_raised_early_is_found_again_and_needs_no_note():
    assert noted(raised(1, early=True)) == {}
    assert noted(replace(raised(1), tenant="other")) == {}


def test_it_is_saved_and_reduced_to_what_is_wanted():
    before = RaisedBefore()
    before.note(map(raised, range(10, 20)))
    other = RaisedBefore()
    other.restore(before.saved())
    traces = other.of("acme")
    assert traces == before.of("acme")
    assert len(other) == 10
    keep = {raised(12).trace_id, raised(15).trace_id}
    other.keep(lambda tenant, trace_id: tenant == "acme" and trace_id in keep)
    assert traces.keys() == keep  # tables share it
    other.keep(lambda tenant, trace_id: False)
    assert len(other) == 0
    assert other.saved() == {}


def test_verdicts_go_a_step_further_only_where_they_change():
    known = {("a", "1"), ("b", "1"), ("c", "2")}
    told = {
        ("a", "1"): Raised(1, "never"),
        ("b", "1"): Raised(2, "always"),
        ("c", "1"): Raised(1, "never"),  # under a version that is gone
        ("gone", "1"): Raised(1, "never"),
    }
    assert next_steps(told, {("a", "1"): "never"}, known) == {}
    assert next_steps(told, {("b", "1"): "never", ("c", "2"): "never"}, known) == {
        ("a", "1"): Raised(2, "never"),
        ("b", "1"): Raised(3, "never"),
    }
    assert next_steps({}, {("c", "2"): "always"}, known) == {("c", "2"): Raised(1, "always")}


def kinds(signals):
    return [(s.rule_id, s.kind, s.episode) for s in signals]


@pytest.mark.parametrize("steps", range(5))
def test_what_stands_is_retracted_and_what_was_retracted_raised_anew(steps):
    breach, kept = due(1), due(1)
    kept.entries = np.zeros((1, ENTRY_COLUMNS), np.int64)
    kept.entries[0, E_CHECK], kept.entries[0, E_COUNT] = 0, 2
    kept.starts = np.array([0, 1], np.int64)
    for each in (breach, kept):
        each.told = {0: {KEY: Raised(steps, "never")}} if steps else {}
    (signal,) = decide_due(breach, 5).signals
    assert signal.id == raised(1, episode=steps // 2).id
    assert (signal.kind, signal.episode) == (Kind.RAISED, steps // 2)
    found = decide_due(kept, 5).signals
    if steps % 2:
        (signal,) = found
        assert signal.id == raised(1, Kind.RETRACTED, steps // 2).id
        assert signal.clause == "never"
        assert signal.reason
    else:
        assert found == []


def test_the_first_raising_has_the_id_of_the_specification():
    parts = ("t", "r", "v", "0" * 32, "raised")
    text = "".join(f"{len(part)}:{part}" for part in parts)
    plain = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert signal_id("t", "r", "v", "0" * 32, Kind.RAISED) == plain
    ids = {signal_id("t", "r", "v", "0" * 32, kind, n) for kind in Kind for n in range(20)}
    assert len(ids) == 40


def test_another_version_of_a_rule_that_stands_is_not_raised_or_retracted():
    traces = due(1)
    traces.told = {0: {(RULE.id, "another version"): Raised(1, "never")}}
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
    ledger.add_outgoing([third])  # perhaps the ledger has it
    assert since(recorded, 20 * minute) == [third, third, second]
    ledger.close()
    assert record.last_entries() == recorded  # as far as is known
    files.close()
