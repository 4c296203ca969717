"""What an evaluator reports about its partitions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where an evaluator is in the life of a partition."""

    WAITING = "waiting"
    """Another evaluator has the lease."""

    TAKING_OVER = "taking_over"
    """Has the lease; fences the former owner and loads a checkpoint."""

    REPLAYING = "replaying"
    """Reads what was appended since the checkpoint."""

    CURRENT = "current"
    """Has applied everything that was in the log when it took over."""

    HANDING_OVER = "handing_over"
    """Finishes, because another evaluator should own the partition."""


@dataclass(slots=True)
class PartitionStatus:
    """A partition at this evaluator. Counters are since the start of the process."""

    partition: int
    phase: Phase = Phase.WAITING
    owner: str = ""
    """The node that has the lease, as far as this node knows."""

    epoch: int = 0
    """The number of the epoch that this node opened last."""

    applied: int = 0
    """The sequence of the last message of the log that was applied."""

    stored: int = 0
    """The sequence up to which results are stored in the output."""

    log_time_ns: int = 0
    lag_messages: int = 0
    lag_seconds: float = 0.0
    """Age of the last message that was read, while later ones are unread; otherwise 0."""

    checkpoint_at: float | None = None
    """`trio.current_time` of the last checkpoint that was saved or loaded."""

    checkpoint_sequence: int = 0
    checkpoint_bytes: int = 0
    checkpoint_failures: int = 0
    unusable_checkpoints: int = 0
    """Checkpoints that were damaged, missing, or contradicted the log."""

    takeovers: int = 0
    takeover_seconds: float = 0.0
    """From the lease of the last takeover to being current."""

    fenced: int = 0
    """Appends refused because another evaluator had taken the partition over."""

    gaps: int = 0
    """Places of the log where messages are missing."""

    waiting: str | None = None
    """Why nothing is applied now, for example because no query node answers; None if work goes
    on."""

    failures: int = 0
    """How often the partition was dropped because of an error."""

    @property
    def owned(self) -> bool:
        """Whether this node has the lease."""
        return self.phase is not Phase.WAITING
