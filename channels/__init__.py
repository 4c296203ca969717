"""Bounded channels and the stages between them: the parts of a pipeline on Trio."""

from .batcher import Batcher
from .channel import ReceiveChannel, SendChannel, open_channel
from .errors import ExpectedError, TransientError, is_expected
from .stage import Stage, StageStatistics
from .state import ChannelStatistics, PeakReader
from .supervisor import supervise
from .threads import ThreadRunner, ThreadStatistics, ThreadTimeout

__all__ = [
    "Batcher",
    "ChannelStatistics",
    "ExpectedError",
    "PeakReader",
    "ReceiveChannel",
    "SendChannel",
    "Stage",
    "StageStatistics",
    "ThreadRunner",
    "ThreadStatistics",
    "ThreadTimeout",
    "TransientError",
    "is_expected",
    "open_channel",
    "supervise",
]
