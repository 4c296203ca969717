"""Signals: the records that a trace broke a rule, or that it no longer does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MODE = "mode"  # keys of a signal's context that the API shows as fields
MISSING_PARENTS = "missing_parents"
SERVICE = "service"


class Kind(StrEnum):
    RAISED = "raised"
    RETRACTED = "retracted"


def rule_version(condition: str) -> str:
    """The version of a rule: a hash of its condition (16 hex digits of SHA-256)."""
    return hashlib.sha256(condition.encode()).hexdigest()[:16]


def signal_id(
    tenant: str, rule_id: str, version: str, trace_id: str, kind: Kind, episode: int = 0
) -> str:
    """The id of a signal: 32 hex digits, always the same for the same breach.

    The first 128 bits of SHA-256 over the parts, each preceded by its length so that different
    tuples never join to the same text. ``episode`` counts the earlier retractions of the breach
    (docs/decisions/0011-raised-again.md); 0 is omitted.
    """
    parts: tuple[str, ...] = (tenant, rule_id, version, trace_id, str(kind))
    if episode:
        parts += (str(episode),)
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def incomplete_text(missing: int) -> str:
    """Says that the parents of some spans are missing."""
    parents = "1 parent" if missing == 1 else f"{missing} parents"
    return f"the trace is incomplete: {parents} never came"


@dataclass(frozen=True, slots=True)
class Signal:
    """One entry of the ledger. Times are nanoseconds since 1970, ids lower-case hex.

    ``counts`` maps each check of the rule (its text) to the number of matching spans; ``evidence``
    maps it to the ids of up to five of them, the earliest. ``reason`` says why a retraction was
    made, or that the trace is partial. For a long trace, ``context`` is the window of the latest
    spans: ``window`` is its number, ``first`` and ``last`` are the numbers of its spans by arrival,
    and ``spans`` are their ids. Of a rule with ``for each``, its ``groups`` say how many were
    ``broken``, ``of`` how many, and give up to five ``examples`` (``key``, ``clause``, ``spans``).
    ``context`` also has what :attr:`mode`, :attr:`missing_parents` and :attr:`service` return.
    ``episode`` counts how often the breach had been retracted before, from 0; a signal and its
    retraction have the same.
    """

    id: str
    tenant: str
    rule_id: str
    rule_version: str
    severity: str
    kind: Kind
    clause: str  # always | never
    trace_id: str
    detected_at: int
    early: bool
    counts: dict[str, int]
    evidence: dict[str, list[str]]
    message: str
    labels: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    context: dict[str, Any] | None = None
    episode: int = 0

    @property
    def mode(self) -> str:
        """``shadow`` if the rule was in shadow mode, else ``alert``."""
        return str((self.context or {}).get(MODE, "alert"))

    @property
    def shadow(self) -> bool:
        """Whether the signal is only recorded and shown."""
        return self.mode == "shadow"

    @property
    def missing_parents(self) -> int:
        """How many parents were missing when the trace was closed; 0 if none was, or if the signal
        was raised before."""
        return int((self.context or {}).get(MISSING_PARENTS, 0))

    @property
    def service(self) -> str | None:
        """The service of the trace's root span or, if that had not arrived, of its first span;
        None if they name no service, and for signals of version 0.2.0 and older."""
        return (self.context or {}).get(SERVICE)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, ``detected_at`` still in nanoseconds."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Signal:
        """The signal from the values of :meth:`to_json`. Raises LookupError, TypeError or
        ValueError for anything else."""
        return cls(**values | {"kind": Kind(values["kind"])})


def raised_id(signal: Signal) -> str:
    """The id of the raised signal that a retraction retracts; a raised signal's own id."""
    return signal_id(
        signal.tenant,
        signal.rule_id,
        signal.rule_version,
        signal.trace_id,
        Kind.RAISED,
        signal.episode,
    )
