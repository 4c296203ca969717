"""Metrics of an evaluator, by partition."""

from prometheus_client import generate_latest
from trio.testing import MockClock

from betrace.service.app import evaluator_metrics
from betrace.service.cluster.evaluator.status import PartitionStatus, Phase


class _Families:
    def __init__(self, statuses):
        self.statuses = statuses

    def collect(self):
        return evaluator_metrics.read(self.statuses)


async def test_counters_are_shown_of_all_partitions_and_gauges_of_owned_ones(
    autojump_clock: MockClock,
) -> None:
    owned = PartitionStatus(0, Phase.CURRENT, epoch=7, lag_messages=3, checkpoint_at=-5.0)
    other = PartitionStatus(1, takeovers=2, fenced=1)
    lines = generate_latest(_Families([owned, other])).decode().splitlines()
    assert 'betrace_partition_owned{partition="0"} 1.0' in lines
    assert 'betrace_partition_owned{partition="1"} 0.0' in lines
    assert 'betrace_partition_epoch{partition="0"} 7.0' in lines
    assert 'betrace_partition_lag_messages{partition="0"} 3.0' in lines
    assert 'betrace_partition_checkpoint_age_seconds{partition="0"} 5.0' in lines
    assert 'betrace_partition_takeovers_total{partition="1"} 2.0' in lines
    assert 'betrace_partition_fenced_total{partition="1"} 1.0' in lines
    assert not any(line.startswith('betrace_partition_epoch{partition="1"}') for line in lines)
