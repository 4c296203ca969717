"""Files of an earlier version, in tests/data, can still be read.

``traces.checkpoint`` is a checkpoint with traces under two versions of the rules, a reopened trace,
signals from before a restart, and frames that were folded in part. ``due-traces.bin`` are due
traces as they are in a dead letter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from betrace.service.traces.checkpoint import (
    Snapshot,
    checkpoint_files,
    read_checkpoint,
    write_checkpoint,
)
from betrace.service.traces.due import Context
from betrace.service.traces.layout import E_CHECK, E_COUNT, FLAGS, REOPENED
from betrace.service.traces.partial_folds import PartialFolds
from betrace.service.traces.serialize import from_bytes
from betrace.service.traces.signal_history import LedgerHistory, RuleSignals
from betrace.service.traces.tenant_traces import TenantTraces

pytestmark = pytest.mark.kernel

DATA = Path(__file__).parents[2] / "data"
# The rules of the checkpoint that traces 1 and 3 broke, with the clause.
BROKEN = {"r0": "never", "r1": "always", "r2": "never"}


def restored() -> tuple[Snapshot, TenantTraces, LedgerHistory, PartialFolds]:
    saved = read_checkpoint(DATA / "traces.checkpoint")
    history, folds = LedgerHistory(), PartialFolds()
    history.restore(saved.ledger_history)
    folds.restore(saved.partial_folds)
    (tenant,) = saved.tenants
    traces = TenantTraces.restored(
        tenant, ledger_history=history.of("t"), partial_folds=folds.of("t")
    )
    return saved, traces, history, folds


def test_a_checkpoint_of_an_earlier_version_is_restored():
    saved, traces, history, folds = restored()
    assert saved.progress == {"t": (10, [])}
    assert [table.rules.version for table in traces.tables] == ["v1", "v2"]
    assert (traces.open_count, traces.closed_count) == (6, 1)
    assert {"shop", "pay"} >= set(traces.services[1:])
    assert len(history) == 4
    assert {r: s for (r, _), s in history.of("t")["01" * 16].items()} == {
        rule: RuleSignals(1, clause) for rule, clause in BROKEN.items()
    }
    assert len(folds.of("t")) == 2
    rows = saved.partial_folds["t"][1][1]
    assert rows == list(range(61, 91))


def test_traces_of_an_earlier_version_are_decided():
    _, traces, _, _ = restored()
    due = traces.close_due(now=10**18, idle_ns=0)
    found = {each.trace_id(k): (each, k) for each in due for k in range(len(each))}
    assert len(found) == 6
    each, k = found["03" * 16]
    assert each.rows[k, FLAGS] & REOPENED
    assert {r: s for (r, _), s in each.signal_history[k].items()} == {
        rule: RuleSignals(1, clause) for rule, clause in {**BROKEN, "r4": "never"}.items()
    }
    each, k = found["04" * 16]
    counts = {each.rules.check_names[row[E_CHECK]]: int(row[E_COUNT]) for row in matches(each, k)}
    assert counts == {"db.*": 20, "*": 20}


def matches(due, k):
    return due.entries[due.starts[k] : due.starts[k + 1]]


def test_a_restored_checkpoint_is_written_again_byte_for_byte(tmp_path):
    saved, traces, history, folds = restored()
    again = Snapshot(
        saved.taken_ns,
        saved.progress,
        [traces.snapshot()],
        ledger_history=history.saved(),
        partial_folds=folds.saved(),
    )
    write_checkpoint(tmp_path, again)
    (path,) = checkpoint_files(tmp_path)
    assert path.read_bytes() == (DATA / "traces.checkpoint").read_bytes()


def test_due_traces_of_an_earlier_version_are_read():
    due = from_bytes((DATA / "due-traces.bin").read_bytes())
    assert [due.trace_id(k) for k in range(3)] == [f"{n:032x}" for n in (2, 3, 4)]
    assert due.rules.check_names == ("loop",)
    assert due.contexts == {1: Context(3, 201, (-5, 2**63 - 1))}
    assert due.signal_history == {
        2: {("a", "v1"): RuleSignals(1, "never"), ("b", "v1"): RuleSignals(4, "always")}
    }
    assert (due.received_ns, due.spans) == (77, 5)
    assert due.spilled is not None
    assert np.array_equal(due.spilled, np.arange(20).reshape(2, 10))
