"""``betrace replay``: the span log evaluated again."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from betrace.service.cli.api_client import Failure

if TYPE_CHECKING:
    from betrace.service.config.settings import Settings
    from betrace.service.pipeline.recovery.replay import Replay
    from betrace.service.rules.compile import CompiledRules
    from betrace.service.signals import Signal
    from betrace.service.storage.duck.store import DuckStore
    from betrace.service.storage.ledger.record import SignalLedger
    from betrace.service.storage.spanlog.log import SpanLog

FOUND = 1
_REPORT_SECONDS = 1.0
_DAY_CHARACTERS = len("2025-01-31")


class _Time(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Nanoseconds since 1970."""
        from betrace.service.times import read_time

        if isinstance(value, int):
            return value
        text = str(value)
        if len(text) == _DAY_CHARACTERS and text.count("-") == 2:
            text += "T00:00:00Z"
        try:
            return read_time(text)
        except ValueError:
            self.fail(
                f"{value!r} is no time: write a date (2025-01-31, from 0:00 UTC), a time "
                "(2025-01-31T12:00:00Z), or how long ago (-90m, -12h, -7d)",
                param,
                ctx,
            )


@dataclass(slots=True)
class _Total:
    """What was read and found."""

    spans: int = 0
    traces: int = 0
    raised: int = 0
    retracted: int = 0
    partial: int = 0
    new: int = 0
    tenants: list[str] = field(default_factory=list)
    skipped: int = 0

    def line(self, recorded: bool) -> str:
        told = f"{self.spans} spans, {self.traces} traces: {self.raised} signals"
        if self.retracted:
            told += f", {self.retracted} of them retracted by later spans"
        if self.partial:
            told += f"; {self.partial} are of traces that reach over the edge of the interval"
        if self.skipped:
            told += f"; {self.skipped} damaged places of the log were passed over"
        return told + (f"; {self.new} are new in the ledger" if recorded else "")


@click.command()
@click.option("--from", "since", type=_Time(), required=True, metavar="T", help="Received from.")
@click.option("--to", "until", type=_Time(), metavar="T", help="Received before; else until now.")
@click.option(
    "--rules",
    "rule_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Decide by these rules, not by each tenant's own.",
)
@click.option("--dry-run", is_flag=True, help="Only show the signals, record none.")
@click.option("--tenant", metavar="NAME", help="Only this tenant.")
@click.option("--data", metavar="DIR", help="Where data is kept (storage.path).")
@click.option("--config", type=click.Path(path_type=Path), help="A config.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def replay(
    since: int,
    until: int | None,
    rule_file: Path | None,
    dry_run: bool,
    tenant: str | None,
    data: str | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Evaluate the span log again; exit code 1 if traces break rules.

    Signals are printed, progress is on standard error. With --dry-run nothing is written, and the
    service may run. Without, signals are recorded in the ledger and DuckDB, for which the service
    must be stopped; those that are there already stay as they are.

    Requests received within the interval are read, no others. Traces that reach over its edge
    are marked partial: a rule may seem broken for want of a span outside. Such signals are shown
    and never recorded.

    \b
    Examples:
      betrace replay --from -7d --rules new.yaml --dry-run
      betrace replay --from 2025-01-31 --to 2025-02-01 --tenant acme
    """
    from betrace.service.config.load import load

    given = {} if data is None else {"storage.path": data}
    settings = load(config, given)
    if not settings.storage.path.is_dir():
        raise Failure(
            f"there is no data in {settings.storage.path}; name its directory with --data"
        )
    now = time.time_ns()
    if since >= (until or now):
        raise click.UsageError("--from must be before --to, and before now")
    with ExitStack() as stack:
        run = _Run(settings, since, until, dry_run, as_json, now, stack)
        rules = _rules(rule_file)
        for name in run.tenants(tenant):
            run.tenant(name, rules)
    click.echo(run.total.line(recorded=not dry_run), err=True)
    sys.exit(FOUND if run.total.raised > run.total.retracted else 0)


def _rules(path: Path | None) -> CompiledRules | None:
    from betrace.service.rules.compile import compile_rules
    from betrace.service.rules.definition import RuleFileError
    from betrace.service.rules.registry import rules_version
    from betrace.service.rules.yaml_file import load_file

    if path is None:
        return None
    try:
        rules = tuple(load_file(path))
    except RuleFileError as error:
        raise Failure(f"{error}\nput the rules right; `betrace rules check` says more") from None
    return compile_rules(rules, rules_version(rules))


class _Run:
    """The stores, as far as they are needed, and what was found."""

    def __init__(
        self,
        settings: Settings,
        since: int,
        until: int | None,
        dry_run: bool,
        as_json: bool,
        now: int,
        stack: ExitStack,
    ) -> None:
        from betrace.service.rules.registry import RuleRegistry
        from betrace.service.rules.store import RuleStore
        from betrace.service.storage.duck.store import DuckStore
        from betrace.service.storage.ledger.open import open_ledger
        from betrace.service.storage.lockfile import LockedError
        from betrace.service.storage.spanlog.log import SpanLog

        data = settings.storage.path
        self._settings = settings
        self._since, self._until, self._now = since, until, now
        self._as_json = as_json
        self.total = _Total()
        self._ledger: SignalLedger | None = None
        self._store: DuckStore | None = None
        try:
            self._log: SpanLog = stack.enter_context(SpanLog(data, read_only=dry_run))
        except LockedError as error:
            raise Failure(
                f"signals cannot be recorded while the service runs ({error}); "
                "stop it, or only look with --dry-run"
            ) from None
        if not dry_run:
            self._ledger = open_ledger(settings)
            stack.callback(self._ledger.close)
            self._store = stack.enter_context(DuckStore(data))
        directory = settings.rules.directory
        store = RuleStore(Path(directory) if directory else data / "rules")
        store.load()
        for problem in store.problems.values():
            click.echo(f"betrace: a rule file is not taken: {problem}", err=True)
        self._registry = RuleRegistry(store, settings.caches.rule_sets)

    def tenants(self, wanted: str | None) -> list[str]:
        """Whose log is read."""
        known = self._log.tenants()
        if wanted is not None and wanted not in known:
            raise Failure(
                f"the tenant {wanted} has no spans; there are: {', '.join(known) or 'none'}"
            )
        return known if wanted is None else [wanted]

    def tenant(self, name: str, rules: CompiledRules | None) -> None:
        """Replay one tenant's log."""
        from betrace.service.pipeline.recovery.replay import SECOND, Replay, Stretch
        from betrace.service.traces.window import Windows

        traces = self._settings.traces
        run = Replay(
            self._log,
            Stretch(name, self._since, self._until),
            rules or self._registry.compiled(name),
            self._settings.ingest.max_body_bytes,
            Windows(traces.long_lived_spans, traces.window_spans, traces.window_overlap),
            most_open=traces.max_open,
        )
        edge = run.over_the_edge(self._now - int(traces.idle_seconds * SECOND))
        skipped = len(self._log.skipped)
        with _progress(name, run, self._since, self._until or self._now):
            for signals in run.signals(self._now):
                self._take(signals, edge)
        total = self.total
        total.tenants.append(name)
        total.spans += run.spans
        total.traces += run.traces
        total.skipped += len(self._log.skipped) - skipped

    def _take(self, signals: list[Signal], edge: set[str]) -> None:
        from betrace.service.signals import Kind

        whole = [signal for signal in signals if signal.trace_id not in edge]
        for signal in signals:
            partial = signal.trace_id in edge
            self.total.partial += partial
            if signal.kind is Kind.RAISED:
                self.total.raised += 1
            else:
                self.total.retracted += 1
            click.echo(_shown(signal, partial, self._as_json))
        if self._ledger is not None and self._store is not None and whole:
            size = self._settings.ledger.batch_signals
            for first in range(0, len(whole), size):
                self.total.new += sum(self._ledger.record(whole[first : first + size]))
            self._store.add_missing(whole[0].tenant, whole)


def _shown(signal: Signal, partial: bool, as_json: bool) -> str:
    if as_json:
        return json.dumps(signal.to_json() | {"partial": partial}, ensure_ascii=False)
    caveat = "  (partial: it reaches over the edge of the interval)" * partial
    return (
        f"{signal.kind}  {signal.tenant}  {signal.trace_id}  {signal.severity}  "
        f"{signal.message}{caveat}"
    )


@contextmanager
def _progress(tenant: str, run: Replay, since: int, until: int) -> Iterator[None]:
    """Tell on standard error how far it is, about once a second."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(_REPORT_SECONDS):
            share = (run.at_ns - since) / max(1, until - since) if run.at_ns else 0.0
            click.echo(f"{tenant}: {share:.0%}, {run.spans} spans, {run.traces} traces", err=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
