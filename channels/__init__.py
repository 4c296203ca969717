"""Bounded channels and the stages between them: the parts of a pipeline on Trio."""

from .batcher import Batcher, Pace
from .breaker import (
    Breaker,
    BreakerOpen,
    BreakerSettings,
    BreakerSnapshot,
    BreakerState,
    BreakerTimeout,
    Transition,
)
from .channel import ReceiveChannel, SendChannel, open_channel
from .errors import ExpectedError, TransientError, is_expected
from .shutdown import Step, shut_down
from .stage import Stage, StageStatistics
from .state import ChannelStatistics, PeakReader
from .supervisor import supervise
from .tap import DropReason, Tap, TapStatistics
from .threads import ThreadRunner, ThreadStatistics, ThreadTimeout

__all__ = [
    "Batcher",
    "Breaker",
    "BreakerOpen",
    "BreakerSettings",
    "BreakerSnapshot",
    "BreakerState",
    "BreakerTimeout",
    "ChannelStatistics",
    "DropReason",
    "ExpectedError",
    "Pace",
    "PeakReader",
    "ReceiveChannel",
    "SendChannel",
    "Stage",
    "StageStatistics",
    "Step",
    "Tap",
    "TapStatistics",
    "ThreadRunner",
    "ThreadStatistics",
    "ThreadTimeout",
    "TransientError",
    "Transition",
    "is_expected",
    "open_channel",
    "shut_down",
    "supervise",
]
