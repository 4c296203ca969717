"""``betrace replay``: evaluate the span log again."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from betrace.service.cli.common import (
    FOUND,
    Failure,
    Moment,
    json_option,
    print_json,
    print_lines,
    printable,
    settings_options,
    warn,
)
from betrace.service.cli.replay_copy import copied_log

if TYPE_CHECKING:
    from betrace.service.config.settings import Settings
    from betrace.service.pipeline.recovery.replay import Replay
    from betrace.service.rules.compile import CompiledRules
    from betrace.service.signals import Signal
    from betrace.service.storage.duck.store import DuckStore
    from betrace.service.storage.ledger.base import Ledger
    from betrace.service.storage.spanlog.log import SpanLog

_REPORT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Interval:
    """When the requests to read were received, in nanoseconds since 1970. ``since`` None means
    from the beginning of the log, ``until`` None means up to ``now``."""

    since: int | None
    until: int | None
    now: int


@dataclass(slots=True)
class _Total:
    """What was read and found."""

    spans: int = 0
    traces: int = 0
    raised: int = 0
    retracted: int = 0
    partial: int = 0
    new: int = 0
    skipped: int = 0
    undecided: int = 0

    def line(self, recorded: bool) -> str:
        text = f"{self.spans} spans, {self.traces} traces: {self.raised} signals"
        if self.retracted:
            text += f", {self.retracted} of them retracted by later spans"
        if self.partial:
            text += f"; {self.partial} are of traces that cross the edge of the interval"
        if self.undecided:
            text += f"; {self.undecided} traces could not be judged by rules"
        if self.skipped:
            text += f"; skipped {self.skipped} damaged places of the log"
        return text + (f"; {self.new} are new in the ledger" if recorded else "")


@click.command()
@click.option(
    "--from",
    "--since",
    "since",
    type=Moment(),
    metavar="T",
    help="Read requests received from this time on; by default, from the beginning of the log.",
)
@click.option(
    "--to",
    "--until",
    "until",
    type=Moment(),
    metavar="T",
    help="Read requests received before this time; by default, up to now.",
)
@click.option(
    "--rules",
    "rules_path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Evaluate these rules: a file for all tenants, or a directory laid out as for `serve`. "
    "By default, the rules of the service that uses the data directory.",
)
@click.option("--dry-run", is_flag=True, help="Only show the signals; do not record them.")
@click.option("--tenant", metavar="NAME", help="Replay only this tenant.")
@settings_options("data")
@json_option
def replay(
    since: int | None,
    until: int | None,
    rules_path: Path | None,
    dry_run: bool,
    tenant: str | None,
    config: Path | None,
    overrides: dict[str, Any],
    as_json: bool,
) -> None:
    """Evaluate the span log again. Exit code 1 if traces break rules.

    T is a date, a time, or how long ago: 2025-01-31, 2025-01-31T12:00:00Z, 90m, 12h, 7d.

    Signals are printed; progress goes to standard error. With --dry-run nothing is written, and
    the service may run. Without it, signals are recorded in the ledger and DuckDB, so the service
    must be stopped. Signals that are already recorded stay as they are.

    Only requests received within the interval are read. Traces that cross its edge are marked
    partial, because a rule may seem broken when the span it needs is outside. Their signals are
    shown but never recorded.

    On a cluster, the spans of the interval are first copied from the NATS servers to a temporary
    directory (TMPDIR). Without --dry-run the signals are recorded in the data directory of a query
    node, which must be stopped.

    \b
    Examples:
      betrace replay --since 7d --rules new.yaml --dry-run
      betrace replay --from 2025-01-31 --to 2025-02-01 --tenant acme
    """
    from betrace.service.config.load import load
    from betrace.service.rules.patterns import set_match_bytes

    settings = load(config, overrides)
    set_match_bytes(settings.rules.match_max_bytes)
    if not settings.storage.path.is_dir() and (settings.cluster is None or not dry_run):
        raise Failure(
            f"there is no data in {settings.storage.path}; name the data directory with --data"
        )
    interval = _Interval(since, until, time.time_ns())
    if since is not None and since >= (until or interval.now):
        raise click.UsageError("--from must be before --to, and before now")
    with ExitStack() as stack:
        log = _open_log(settings, dry_run, interval, tenant, stack)
        tenants = _with_rules(_tenants(log, tenant), _rules(settings, rules_path))
        run = _Run(settings, log, interval, as_json)
        if not dry_run:
            run.open_stores(stack)
        for name, rules in tenants:
            run.tenant(name, rules)
    click.echo(run.total.line(recorded=not dry_run), err=True)
    sys.exit(FOUND if run.total.raised > run.total.retracted else 0)


def _open_log(
    settings: Settings, dry_run: bool, interval: _Interval, tenant: str | None, stack: ExitStack
) -> SpanLog:
    """The span log; on a cluster, a copy of the interval. Without ``dry_run`` the data directory
    is locked."""
    from betrace.service.storage.lockfile import LockedError, LockFile
    from betrace.service.storage.spanlog.log import LOCK_FILE, SpanLog

    path = settings.storage.path
    try:
        if settings.cluster is None:
            return stack.enter_context(SpanLog(path, read_only=dry_run))
        if not dry_run:
            stack.enter_context(LockFile(path / LOCK_FILE))
    except LockedError as error:
        raise Failure(
            f"signals cannot be recorded while the service runs ({error}); "
            "stop it, or only look with --dry-run"
        ) from None
    copy = copied_log(settings.cluster, interval.since, interval.until, tenant)
    return stack.enter_context(copy)


def _tenants(log: SpanLog, wanted: str | None) -> list[str]:
    """The tenants whose log is read."""
    known = log.tenants()
    if wanted is None:
        return known
    if wanted not in known:
        raise Failure(
            f"the tenant {wanted} has no spans; tenants with spans: {', '.join(known) or 'none'}"
        )
    return [wanted]


@dataclass(frozen=True, slots=True)
class _Rules:
    """``place`` names the file or directory; ``of`` returns a tenant's compiled rules, and None
    if the tenant has no enabled rule there."""

    place: Path
    of: Callable[[str], CompiledRules | None]


def _rules(settings: Settings, path: Path | None) -> _Rules:
    """The rules in a file, or those that a service would read. Raises :exc:`Failure` if a rule
    file has errors, because deciding without it would miss signals."""
    from betrace.service.cli.rules import rules_directory, shared_rules_directory
    from betrace.service.rules.compile import compile_rules
    from betrace.service.rules.definition import RuleFileError
    from betrace.service.rules.registry import RuleRegistry, rules_version
    from betrace.service.rules.store import RuleStore
    from betrace.service.rules.yaml_file import load_file

    if path is not None and not path.is_dir():
        try:
            rules = tuple(load_file(path))
        except RuleFileError as error:
            raise Failure(f"{error}\ncorrect it: betrace rules check {path}") from None
        compiled = compile_rules(rules, rules_version(rules))
        return _Rules(path, lambda _: compiled if compiled.rules else None)

    directory = path or rules_directory(settings)
    store = RuleStore(directory, shared_rules_directory(settings))
    if not directory.is_dir():
        raise Failure(
            f"there are no rules in {directory}, so nothing can be checked; "
            "name the service's rule directory, or a rule file, with --rules"
        )
    store.load()
    if store.problems:
        lines = [
            text if text.startswith(where) else f"{where} {text}"
            for where, text in store.problems.items()
        ]
        raise Failure("\n".join([*lines, f"correct this: betrace rules check {directory}"]))
    registry = RuleRegistry(store, settings.caches.rule_sets)

    def of(tenant: str) -> CompiledRules | None:
        compiled = registry.compiled(tenant)
        return compiled if compiled.rules else None

    return _Rules(directory, of)


def _with_rules(tenants: list[str], rules: _Rules) -> list[tuple[str, CompiledRules]]:
    """Each tenant with its rules. Those without rules are reported and left out; raises
    :exc:`Failure` if none has any."""
    found = [(name, rules.of(name)) for name in tenants]
    without = [name for name, compiled in found if compiled is None]
    if tenants and len(without) == len(tenants):
        raise Failure(
            f"{rules.place} has no enabled rules for {', '.join(without)}, so nothing can be "
            "checked; name the service's rule directory, or a rule file, with --rules"
        )
    for name in without:
        warn(f"{rules.place} has no enabled rules for {name}; its spans are not checked")
    return [(name, compiled) for name, compiled in found if compiled is not None]


class _Run:
    """Replays tenants, prints their signals, and records them in the stores once these are open."""

    def __init__(
        self, settings: Settings, log: SpanLog, interval: _Interval, as_json: bool
    ) -> None:
        self._settings = settings
        self._log = log
        self._interval = interval
        self._as_json = as_json
        self._stores: tuple[Ledger, DuckStore] | None = None
        self.total = _Total()

    def open_stores(self, stack: ExitStack) -> None:
        """Open the ledger and DuckDB; ``stack`` closes them."""
        from betrace.service.pipeline.recovery.lost_ledger import refuse_if_lost
        from betrace.service.storage.duck.store import DuckStore
        from betrace.service.storage.ledger.open import open_ledger
        from betrace.service.storage.local_stores import open_local_stores

        data = self._settings.storage.path
        store = stack.enter_context(DuckStore(data))
        refuse_if_lost(data, store, open_local_stores(data, self._settings, stack).ledger)
        ledger = open_ledger(self._settings)
        stack.callback(ledger.close)
        self._stores = ledger, store

    def tenant(self, name: str, rules: CompiledRules) -> None:
        """Replay one tenant's log."""
        from betrace.service.pipeline.recovery.replay import SECOND, Replay, Stretch
        from betrace.service.traces.window import Windows

        traces = self._settings.traces
        interval = self._interval
        run = Replay(
            self._log,
            Stretch(name, interval.since, interval.until),
            rules,
            self._settings.ingest.max_body_bytes,
            Windows(traces.long_lived_spans, traces.window_spans, traces.window_overlap),
            most_open=traces.max_open,
            relational_spans_max=traces.relational_spans_max,
        )
        edge = run.over_the_edge(interval.now - int(traces.idle_seconds * SECOND))
        with _progress(name, run, interval):
            for signals in run.signals(interval.now):
                self._take(signals, edge)
        self.total.spans += run.spans
        self.total.traces += run.traces
        self.total.skipped += sum(each.tenant == name for each in self._log.skipped)
        self.total.undecided += run.undecided

    def _take(self, signals: list[Signal], edge: set[str]) -> None:
        from betrace.service.signals import Kind

        for signal in signals:
            partial = signal.trace_id in edge
            self.total.partial += partial
            if signal.kind is Kind.RAISED:
                self.total.raised += 1
            else:
                self.total.retracted += 1
            if self._as_json:
                print_json(signal.to_json() | {"partial": partial})
            else:
                print_lines([_line(signal, partial)])
        whole = [signal for signal in signals if signal.trace_id not in edge]
        if self._stores is not None and whole:
            ledger, store = self._stores
            size = self._settings.ledger.batch_signals
            for first in range(0, len(whole), size):
                self.total.new += sum(ledger.record(whole[first : first + size]))
            store.add_missing(whole[0].tenant, whole)


def _line(signal: Signal, partial: bool) -> str:
    caveat = "  (partial: the trace crosses the edge of the interval)" * partial
    return (
        f"{signal.kind}  {signal.tenant}  {signal.trace_id}  {signal.severity}  "
        f"{signal.message}{caveat}"
    )


@contextmanager
def _progress(tenant: str, run: Replay, interval: _Interval) -> Iterator[None]:
    """Print the progress on standard error, about once a second."""
    done = threading.Event()

    def line() -> str:
        counts = f"{run.spans} spans, {run.traces} traces"
        if interval.since is None:
            return counts
        length = (interval.until or interval.now) - interval.since
        share = (run.at_ns - interval.since) / max(1, length) if run.at_ns else 0.0
        return f"{share:.0%}, {counts}"

    def report() -> None:
        while not done.wait(_REPORT_SECONDS):
            click.echo(f"{printable(tenant)}: {line()}", err=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
