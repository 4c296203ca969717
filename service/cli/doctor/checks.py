"""``betrace doctor``: finds what would prevent the service from working, and what to do about it.

It changes nothing: stores are opened for reading, and a file written to measure the disk is
deleted again. The service may be running; then it is asked for its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from betrace.service.cli.doctor import cluster, machine, stores
from betrace.service.cli.doctor.finding import FAILED, NOTE, OK, WARNING, Finding
from betrace.service.config.load import ConfigError, load
from betrace.service.config.settings import Settings

_CHECKS: tuple[tuple[str, Callable[[Settings], Iterator[Finding]]], ...] = (
    ("secrets", machine.secrets),
    ("data directory", machine.directory),
    ("disk", machine.disk),
    ("service", machine.service),
    ("ports", machine.ports),
    ("limits", machine.limits),
    ("clock", machine.clock),
    ("rules", stores.rules),
    ("span log", stores.span_log),
    ("checkpoint", stores.checkpoint),
    ("ledger", stores.ledger),
    ("DuckDB", stores.duckdb_files),
    ("waiting", stores.waiting),
    ("cluster", cluster.cluster),
)
# Those that can read everything, however long it takes.
_THOROUGH: dict[str, Callable[[Settings, bool], Iterator[Finding]]] = {
    "span log": stores.span_log,
    "DuckDB": stores.duckdb_files,
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order of the checks."""

    findings: list[Finding]

    @property
    def good(self) -> bool:
        """Whether nothing needs attention."""
        return all(finding.status in (OK, NOTE) for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"good": self.good, "checks": [each.to_json() for each in self.findings]}

    def lines(self) -> Iterator[str]:
        """For people."""
        for each in self.findings:
            yield f"{each.status:<8} {each.check:<15} {each.found}"
            if each.remedy:
                yield f"{'':<24} → {each.remedy}"
        number = sum(each.status not in (OK, NOTE) for each in self.findings)
        yield f"{number} to look at" if number else "all is well"


def diagnose(config: Path | None, given: Mapping[str, Any], everything: bool = False) -> Diagnosis:
    """Check everything with the settings that ``serve`` would load from ``config``, the environment
    and ``given``. With ``everything``, all of the span log and of DuckDB's files is read. A check
    that raises becomes a finding."""
    try:
        settings = load(config, given)
    except ConfigError as error:
        found = [Finding("configuration", FAILED, line) for line in str(error).splitlines()]
        return Diagnosis(found)
    origin = "the defaults" if config is None else str(config)
    findings = [Finding("configuration", OK, f"{origin}, variables and options agree")]
    for name, check in _CHECKS:
        try:
            thorough = _THOROUGH.get(name) if everything else None
            findings += check(settings) if thorough is None else thorough(settings, True)
        except Exception as error:  # the other checks still run
            text = f"could not be checked: {type(error).__name__}: {error}"
            findings.append(Finding(name, WARNING, text, "look into what the message names"))
    return Diagnosis(findings)
