"""What ``betrace rules`` does: check rule files, and judge a trace that is in a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from betrace.service.rules.definition import Problem, Rule, RuleFileError
from betrace.service.rules.yaml_file import load_file

if TYPE_CHECKING:
    from betrace.service.traces.trial import Verdict

MAX_TRACE_BYTES = 256 * 1024 * 1024
_GZIP = b"\x1f\x8b"
# JSON text has none of these; protobuf has the tag of a span's trace id and its length.
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")

Json = dict[str, Any]


class InputError(Exception):
    """A file that a command was given cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is wrong with rule files, and how many rules are well."""

    files: tuple[Path, ...]
    rules: int
    problems: tuple[Problem, ...]

    def lines(self) -> Iterator[str]:
        """The problems, then a summary."""
        yield from map(str, self.problems)
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        if not self.problems:
            yield f"{files}, {self.rules} rule{'s' * (self.rules != 1)}: all good"
        else:
            count = len(self.problems)
            yield f"{files}: {count} problem{'s' * (count > 1)}"

    def to_json(self) -> Json:
        """The report; lines and columns are those of the file, where they are known."""
        return {
            "valid": not self.problems,
            "files": [str(path) for path in self.files],
            "rules": self.rules,
            "problems": [
                {
                    "file": problem.source,
                    "line": problem.line,
                    "column": problem.column,
                    "rule": problem.rule_id,
                    "message": problem.message,
                    "hint": problem.hint,
                }
                for problem in self.problems
            ],
        }


def check_files(names: Sequence[Path]) -> Report:
    """Check rule files, and those in directories and their folders.

    Raises :exc:`InputError` for a directory without rule files.
    """
    paths = [path for name in names for path in _rule_files(name)]
    rules = 0
    problems: list[Problem] = []
    for path in paths:
        try:
            rules += len(load_file(path))
        except RuleFileError as error:
            problems += error.problems
    return Report(tuple(paths), rules, tuple(problems))


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
        raise InputError(f"{name} has no rule files; they are named *.yaml")
    return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """A rule and its verdict on a trace."""

    rule: Rule
    verdict: Verdict

    def lines(self) -> Iterator[str]:
        """What the rule says and why: which clause, what was counted, which spans."""
        rule, verdict = self.rule, self.verdict
        says = "is broken" if verdict.breach else "is kept"
        disabled = ", not enabled" * (not rule.enabled)
        yield f"{rule.id} ({rule.severity}{disabled}) {says}: {rule.name}"
        if verdict.breach:
            why = "does not hold" if verdict.clause == "always" else "holds"
            yield f"  because its clause '{verdict.clause}' {why}"
        width = max((len(check) for check in verdict.counts), default=0)
        for check, count in verdict.counts.items():
            spans = ", ".join(verdict.evidence.get(check, []))
            more = " …" * (count > len(verdict.evidence.get(check, [])))
            shown = f"  spans {spans}{more}" if spans else ""
            yield f"  {check:{width}}  {count}{shown}"

    def to_json(self) -> Json:
        """The verdict, with the rule's severity and name."""
        rule = {"name": self.rule.name, "severity": self.rule.severity}
        return {**asdict(self.verdict), **rule, "enabled": self.rule.enabled}


def judge(rule_file: Path, trace_file: Path, rule_id: str | None = None) -> list[Judgement]:
    """What each rule of a file, or the one named, says of the trace in the other file, taken as
    complete; also those that are not enabled.

    Raises :exc:`InputError`.
    """
    from betrace.service.rules.compile import compile_rules
    from betrace.service.traces.trial import Trial, TrialError

    try:
        rules = load_file(rule_file)
    except RuleFileError as error:
        raise InputError(f"{error}\ncorrect it: betrace rules check {rule_file}") from error
    if rule_id is not None:
        known = ", ".join(rule.id for rule in rules[:20])
        rules = [rule for rule in rules if rule.id == rule_id]
        if not rules:
            raise InputError(f"{rule_file} has no rule '{rule_id}'; its rules are {known}")
    trial = Trial(compile_rules([replace(rule, enabled=True) for rule in rules]))
    try:
        trial.add(_protobuf(trace_file))
        verdicts = trial.verdicts()
    except TrialError as error:
        raise InputError(
            f"{trace_file} cannot be judged: {error}; give the spans of one trace in OTLP"
        ) from error
    return [Judgement(rule, verdict) for rule, verdict in zip(rules, verdicts, strict=True)]


def _protobuf(path: Path) -> bytes:
    """The trace in a file as an OTLP export request in protobuf."""
    from betrace.service.otlp.body import BadBody, protobuf_body
    from betrace.service.otlp.encoding import BodyTooLarge

    try:
        with path.open("rb") as file:
            body = file.read(MAX_TRACE_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); name a file with a trace"
        ) from error
    try:
        encoding = "gzip" if body.startswith(_GZIP) else ""
        body = protobuf_body(body, "protobuf", encoding, MAX_TRACE_BYTES)
        text = body and not _CONTROL.search(body)
        return protobuf_body(body, "json", "", MAX_TRACE_BYTES) if text else body
    except BodyTooLarge as error:
        raise InputError(
            f"{path} is larger than {MAX_TRACE_BYTES >> 20} MiB; give less of it"
        ) from error
    except BadBody as error:
        raise InputError(
            f"{path} is no trace in OTLP JSON: {error}; "
            "the answer of GET /api/v1/traces/{id} is one"
        ) from error
