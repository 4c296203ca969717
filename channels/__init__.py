"""Bounded channels and the stages between them: the parts of a pipeline on Trio."""

from betrace.channels.batcher import Batcher, Pace, Pacing
from betrace.channels.breaker import Breaker, BreakerOpen, BreakerTimeout
from betrace.channels.breaker_options import (
    BreakerOptions,
    BreakerSnapshot,
    BreakerState,
    Transition,
)
from betrace.channels.channel import ReceiveChannel, SendChannel, open_channel
from betrace.channels.errors import ExpectedError, TransientError, is_expected
from betrace.channels.stage import Stage
from betrace.channels.stage_options import StageOptions, StageStatistics
from betrace.channels.state import ChannelStatistics, PeakReader
from betrace.channels.supervisor import supervise
from betrace.channels.tap import DropReason, Tap, TapStatistics
from betrace.channels.threads import ThreadRunner, ThreadStatistics, ThreadTimeout

__all__ = [
    "Batcher",
    "Breaker",
    "BreakerOpen",
    "BreakerOptions",
    "BreakerSnapshot",
    "BreakerState",
    "BreakerTimeout",
    "ChannelStatistics",
    "DropReason",
    "ExpectedError",
    "Pace",
    "Pacing",
    "PeakReader",
    "ReceiveChannel",
    "SendChannel",
    "Stage",
    "StageOptions",
    "StageStatistics",
    "Tap",
    "TapStatistics",
    "ThreadRunner",
    "ThreadStatistics",
    "ThreadTimeout",
    "TransientError",
    "Transition",
    "is_expected",
    "open_channel",
    "supervise",
]
