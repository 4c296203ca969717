"""``betrace rules``: check rule files, test rules on a trace, mute rules, and find a service's rule
files."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from betrace.service.cli.api_client import ServiceApi, user_name
from betrace.service.cli.common import (
    FOUND,
    HELP,
    Failure,
    Server,
    json_option,
    print_json,
    print_lines,
    server_options,
    tenant_option,
    warn,
)
from betrace.service.cli.rule_library import library
from betrace.service.rules.definition import SKIP, Problem, Rule, RuleFileError
from betrace.service.rules.plans import plan
from betrace.service.rules.units import unit_warnings
from betrace.service.rules.yaml_file import load_file

if TYPE_CHECKING:
    from betrace.service.config.settings import Settings
    from betrace.service.traces.trial import Verdict

MAX_TRACE_BYTES = 256 * 1024 * 1024
_GZIP = b"\x1f\x8b"
# JSON text has none of these; protobuf has the tag of a span's trace id and its length.
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")

# In the data directory: the path of the rule directory that the last service used. Other commands
# on the data read it, because --rules of `serve` is not in their configuration.
_RECORD = "rules-directory"
_SHARED_RECORD = "rules-for-all-tenants"

Json = dict[str, Any]


@click.group(context_settings=HELP)
def rules() -> None:
    """Check rule files, test rules on a trace, and mute rules.

    \b
    Example:
      betrace rules check rules/*.yaml
    """


@rules.command("check")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@json_option
def rules_check(files: Sequence[str], as_json: bool) -> None:
    """Check rule files and run their examples. Exit code 1 if something is wrong.

    A directory stands for all rule files in it.

    \b
    Example:
      betrace rules check rules/payments.yaml
    """
    report = check_files([Path(name) for name in files])
    if as_json:
        print_json(report.to_json(), indent=2)
    else:
        print_lines(report.lines())
    sys.exit(FOUND if report.problems else 0)


@rules.command("test")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--trace",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A trace in OTLP, as JSON or protobuf, optionally compressed with gzip.",
)
@click.option("--rule", "rule_id", metavar="ID", help="Test only this rule of the file.")
@json_option
def rules_test(file: Path, trace: Path, rule_id: str | None, as_json: bool) -> None:
    """Test rules on a trace, and explain the result. Exit code 1 if the trace breaks a rule.

    The trace is taken as complete. The answer of `GET /api/v1/traces/{id}` can be used as it is.

    \b
    Example:
      curl -s http://127.0.0.1:8090/api/v1/traces/$ID >trace.json
      betrace rules test rules/payments.yaml --trace trace.json
    """
    judgements = judge(file, trace, rule_id)
    if as_json:
        print_json([judgement.to_json() for judgement in judgements], indent=2)
    else:
        print_lines(line for judgement in judgements for line in judgement.lines())
    sys.exit(FOUND if any(judgement.verdict.breach for judgement in judgements) else 0)


@rules.command("mute")
@click.argument("rule_id", metavar="ID")
@click.option("--for", "duration", required=True, metavar="TIME", help="How long, such as 2h.")
@click.option("--reason", required=True, help="Why; shown to everyone who sees the rule.")
@tenant_option
@server_options
def rules_mute(
    rule_id: str, duration: str, reason: str, tenant: str | None, server: Server, as_json: bool
) -> None:
    """Mute a rule of a running service for a time.

    Its signals are recorded and shown as muted, but not sent to webhooks.

    \b
    Example:
      betrace rules mute payment-fraud-check --for 2h --reason "provider maintenance"
    """
    api = ServiceApi(server, "/api/v1/rules", tenant=tenant, who=user_name())
    body = {"for": duration, "reason": reason}
    mute = api.ask("PUT", f"/{quote(rule_id, safe='')}/mute", json=body)
    if as_json:
        print_json(mute)
    else:
        print_lines([f"{rule_id} is muted until {mute['until'][:19]}Z"])


@rules.command("unmute")
@click.argument("rule_id", metavar="ID")
@tenant_option
@server_options
def rules_unmute(rule_id: str, tenant: str | None, server: Server, as_json: bool) -> None:
    """End the mute of a rule. Exit code 1 if it is not muted.

    \b
    Example:
      betrace rules unmute payment-fraud-check
    """
    api = ServiceApi(server, "/api/v1/rules", tenant=tenant, who=user_name())
    ended = api.find("DELETE", f"/{quote(rule_id, safe='')}/mute") is not None
    if as_json:
        print_json({"unmuted": ended})
    elif ended:
        print_lines([f"{rule_id} is no longer muted"])
    else:
        warn(f"{rule_id} is not muted")
    sys.exit(0 if ended else FOUND)


rules.add_command(library)


@dataclass(frozen=True, slots=True)
class Report:
    """The problems of rule files, and how many rules are valid."""

    files: tuple[Path, ...]
    rules: int
    problems: tuple[Problem, ...]
    plans: tuple[tuple[str, str], ...] = ()
    """How each rule is decided that counts alone do not decide: its id and a sentence."""
    examples: int = 0
    """Examples that were run."""
    warnings: tuple[Problem, ...] = ()

    def lines(self) -> Iterator[str]:
        """The problems, the warnings, the plans, then a summary."""
        for problem in self.problems:
            yield from str(problem).split("\n")
        for warning in self.warnings:
            first, *rest = str(warning).split("\n")
            yield f"warning: {first}"
            yield from rest
        for rule_id, how in self.plans:
            yield f"{rule_id}: {how}"
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        if not self.problems:
            counts = [f"{self.rules} rule{'s' * (self.rules != 1)}"]
            if self.examples:
                counts.append(f"{self.examples} example{'s' * (self.examples != 1)}")
            yield f"{files}, {', '.join(counts)}: all good"
        else:
            count = len(self.problems)
            yield f"{files}: {count} problem{'s' * (count > 1)}"

    def to_json(self) -> Json:
        """The report. Lines and columns count within the file, and are null if unknown. ``plans``
        are there only if there is one."""
        plans = {"plans": dict(self.plans)} if self.plans else {}
        return {
            "valid": not self.problems,
            "files": [str(path) for path in self.files],
            "rules": self.rules,
            "examples": self.examples,
            "problems": [_problem_json(problem) for problem in self.problems],
            "warnings": [_problem_json(warning) for warning in self.warnings],
            **plans,
        }


def _problem_json(problem: Problem) -> Json:
    return {
        "file": problem.source,
        "line": problem.line,
        "column": problem.column,
        "rule": problem.rule_id,
        "message": problem.message,
        "hint": problem.hint,
    }


def check_files(names: Sequence[Path]) -> Report:
    """Check rule files, and the rule files in directories and their subdirectories.

    The examples in valid files are run. Raises :exc:`Failure` for a directory without rule files.
    """
    paths = [path for name in names for path in _rule_files(name)]
    rules: list[Rule] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for path in paths:
        try:
            found = load_file(path)
        except RuleFileError as error:
            problems += error.problems
            continue
        rules += found
        problems += _run_examples(found, str(path))
        warnings += unit_warnings(found, str(path))
    plans = tuple((rule.id, how) for rule in rules if (how := _plan(rule)) is not None)
    examples = sum(len(rule.examples) for rule in rules)
    return Report(tuple(paths), len(rules), tuple(problems), plans, examples, tuple(warnings))


def _plan(rule: Rule) -> str | None:
    """How a rule is decided, if that takes more than its counts."""
    if rule.syntax.relational:
        return plan(rule.syntax)
    if rule.incomplete == SKIP:
        return "reads a trace back from the span log when it closes, if it seems to break the rule"
    return None


def _run_examples(rules: Sequence[Rule], source: str) -> list[Problem]:
    if not any(rule.examples for rule in rules):
        return []  # the engine takes a second to load
    from betrace.service.traces.example_runs import check_examples

    return check_examples(rules, source)


def _rule_files(name: Path) -> list[Path]:
    if not name.is_dir():
        return [name]
    found = [
        path
        for path in sorted(name.rglob("*"))
        if path.suffix in (".yaml", ".yml")
        and not any(part.startswith(".") for part in path.relative_to(name).parts)
    ]
    if not found:
        raise Failure(f"{name} has no rule files; their names end in .yaml")
    return found


@dataclass(frozen=True, slots=True)
class RuleResult:
    """A rule and its verdict on a trace."""

    rule: Rule
    verdict: Verdict

    def lines(self) -> Iterator[str]:
        """The verdict and its reason, the counts, and the spans."""
        rule, verdict = self.rule, self.verdict
        outcome = "is broken" if verdict.breach else "is kept"
        if verdict.undecided is not None:
            outcome = "is undecided"
        if verdict.skipped is not None:
            outcome = "is skipped"
        disabled = ", not enabled" * (not rule.enabled)
        yield f"{rule.id} ({rule.severity}{disabled}) {outcome}: {rule.name}"
        if verdict.breach:
            yield f"  {verdict.message}"
        if verdict.undecided is not None:
            yield f"  because {verdict.undecided}"
        if verdict.skipped is not None:
            yield f"  because {verdict.skipped}"
        if verdict.groups is not None:
            yield f"  for {verdict.groups['broken']} of {verdict.groups['of']} groups, such as"
            for example in verdict.groups["examples"]:
                keys = ", ".join(f"{name} {value}" for name, value in example["key"].items())
                yield f"    {keys}{': ' * bool(keys)}spans {', '.join(example['spans'])}"
        width = max((len(check) for check in verdict.counts), default=0)
        for check, count in verdict.counts.items():
            spans = ", ".join(verdict.evidence.get(check, []))
            more = " …" * (count > len(verdict.evidence.get(check, [])))
            shown = f"  spans {spans}{more}" if spans else ""
            yield f"  {check:{width}}  {count}{shown}"

    def to_json(self) -> Json:
        """The verdict, with the rule's severity and name."""
        rule = {"name": self.rule.name, "severity": self.rule.severity}
        return {**self.verdict.to_json(), **rule, "enabled": self.rule.enabled}


def judge(rule_file: Path, trace_file: Path, rule_id: str | None = None) -> list[RuleResult]:
    """The verdict of each rule in ``rule_file``, or of ``rule_id`` alone, on the complete trace in
    ``trace_file``. Rules that are not enabled are tested too.

    Raises :exc:`Failure`.
    """
    from betrace.service.rules.compile import compile_rules
    from betrace.service.traces.trial import Trial, TrialError

    try:
        rules = load_file(rule_file)
    except RuleFileError as error:
        raise Failure(f"{error}\ncorrect it: betrace rules check {rule_file}") from error
    if rule_id is not None:
        known = ", ".join(rule.id for rule in rules[:20])
        rules = [rule for rule in rules if rule.id == rule_id]
        if not rules:
            raise Failure(f"{rule_file} has no rule '{rule_id}'; its rules are {known}")
    trial = Trial(compile_rules([replace(rule, enabled=True) for rule in rules]))
    try:
        trial.add(_protobuf(trace_file))
        verdicts = trial.verdicts()
    except TrialError as error:
        raise Failure(
            f"{trace_file} cannot be tested: {error}; give the spans of one trace in OTLP"
        ) from error
    return [RuleResult(rule, verdict) for rule, verdict in zip(rules, verdicts, strict=True)]


def _protobuf(path: Path) -> bytes:
    """The trace in a file as an OTLP export request in protobuf."""
    from betrace.service.otlp.body import BadBody, protobuf_body
    from betrace.service.otlp.encoding import BodyTooLarge

    try:
        with path.open("rb") as file:
            body = file.read(MAX_TRACE_BYTES + 1)
    except OSError as error:
        raise Failure(
            f"{path} cannot be read ({error.strerror}); name a file with a trace"
        ) from error
    try:
        encoding = "gzip" if body.startswith(_GZIP) else ""
        body = protobuf_body(body, "protobuf", encoding, MAX_TRACE_BYTES)
        text = body and not _CONTROL.search(body)
        return protobuf_body(body, "json", "", MAX_TRACE_BYTES) if text else body
    except BodyTooLarge as error:
        raise Failure(
            f"{path} is larger than {MAX_TRACE_BYTES >> 20} MiB; give less of it"
        ) from error
    except BadBody as error:
        raise Failure(
            f"{path} is not a trace in OTLP JSON: {error}; "
            "save the answer of GET /api/v1/traces/{id}, for example"
        ) from error


def rules_directory(settings: Settings) -> Path:
    """The directory of the rules that decide about the data of ``settings``: the configured one,
    or else the one that the last service on this data directory used."""
    if settings.rules.directory:
        return Path(settings.rules.directory)
    data = settings.storage.path
    try:
        return Path((data / _RECORD).read_text("utf-8"))
    except OSError:
        return data / "rules"


def shared_rules_directory(settings: Settings) -> Path | None:
    """The directory of the rules for all tenants, found like :func:`rules_directory`; None without
    one."""
    if settings.rules.shared is not None:
        return settings.rules.shared
    try:
        return Path((settings.storage.path / _SHARED_RECORD).read_text("utf-8"))
    except OSError:
        return None


def record_rules_directory(settings: Settings) -> None:
    """Record the rule directories of a service that starts. A failure is ignored, because the
    records only serve other commands."""
    data = settings.storage.path
    directory = Path(settings.rules.directory) if settings.rules.directory else data / "rules"
    with suppress(OSError):
        (data / _RECORD).write_text(str(directory.absolute()), "utf-8")
        shared = settings.rules.shared
        if shared is None:
            (data / _SHARED_RECORD).unlink(missing_ok=True)
        else:
            (data / _SHARED_RECORD).write_text(str(shared.absolute()), "utf-8")
