"""The streams, buckets and object store of a cluster: their names, and how they are configured.

A position is ``partition << 48 | sequence``, an int64 like a position in the local span log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.generations import Generations

DEDUPLICATION_SECONDS = 120
"""How long servers remember message ids; they return the first sequence for a repeated id."""

_SEQUENCE_BITS = 48


def pack_log_position(partition: int, sequence: int) -> int:
    """The position of a message of ``SPANS_partition``."""
    return partition << _SEQUENCE_BITS | sequence


def unpack_log_position(position: int) -> tuple[int, int]:
    """The partition and sequence of a position."""
    return position >> _SEQUENCE_BITS, position & ((1 << _SEQUENCE_BITS) - 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of everything that a cluster has in NATS."""

    prefix: str
    generations: Generations
    replicas: int
    partition_bytes: int

    @classmethod
    def of(cls, settings: ClusterSettings, generations: Generations | None = None) -> Layout:
        """The layout of a cluster; without ``generations``, of one that was never resized. The
        names do not depend on them."""
        found = generations or Generations.of(settings.partitions)
        return cls(settings.prefix, found, settings.replicas, settings.partition_bytes)

    @property
    def partitions(self) -> int:
        """The number of partitions, those of former generations included."""
        return self.generations.total

    def spans_stream(self, partition: int) -> str:
        return f"{self.prefix}-SPANS-{partition}"

    def spans_subject(self, partition: int) -> str:
        return f"{self.prefix}.spans.{partition}"

    @property
    def spans_wakeup(self) -> str:
        """Where edges name the partitions that have new messages."""
        return f"{self.prefix}.new.spans"

    def out_stream(self, partition: int) -> str:
        return f"{self.prefix}-OUT-{partition}"

    def out_subject(self, partition: int) -> str:
        return f"{self.prefix}.out.{partition}"

    def epoch_subject(self, partition: int) -> str:
        """The subject of epoch records, which are in the same stream as the other output."""
        return f"{self.prefix}.out.{partition}.epoch"

    def out_wakeup(self, partition: int) -> str:
        return f"{self.prefix}.new.out.{partition}"

    @property
    def quotas_subject(self) -> str:
        """Where edges tell each other the demand of tenants with quotas."""
        return f"{self.prefix}.quotas"

    @property
    def config_bucket(self) -> str:
        """Rules, tenants, and the generations of partitions."""
        return f"{self.prefix}-config"

    @property
    def query_bucket(self) -> str:
        """What query nodes share: how far exports are, alerts, mutes, acknowledgements and rule
        files."""
        return f"{self.prefix}-query"

    @property
    def leases_bucket(self) -> str:
        return f"{self.prefix}-leases"

    @property
    def members_bucket(self) -> str:
        return f"{self.prefix}-members"

    @property
    def checkpoints_store(self) -> str:
        return f"{self.prefix}-checkpoints"

    def streams(self) -> list[dict[str, Any]]:
        """The configuration of every stream; buckets and object stores are streams, too."""
        found = []
        for p in range(self.partitions):
            limit = {"max_bytes": self.partition_bytes or -1}
            found.append(self._stream(self.spans_stream(p), [self.spans_subject(p)]) | limit)
        for p in range(self.partitions):
            subjects = [self.out_subject(p), self.epoch_subject(p)]
            found.append(self._stream(self.out_stream(p), subjects))
        buckets = self.config_bucket, self.query_bucket, self.leases_bucket, self.members_bucket
        for bucket in buckets:
            latest = {"max_msgs_per_subject": 1, "allow_rollup_hdrs": True}
            found.append(self._stream(f"KV_{bucket}", [f"$KV.{bucket}.>"]) | latest)
        store = self.checkpoints_store
        found.append(
            self._stream(f"OBJ_{store}", [f"$O.{store}.C.>", f"$O.{store}.M.>"])
            | {"allow_rollup_hdrs": True}
        )
        return found

    def _stream(self, name: str, subjects: list[str]) -> dict[str, Any]:
        return {
            "name": name,
            "subjects": subjects,
            "retention": "limits",
            "storage": "file",
            "num_replicas": self.replicas,
            "discard": "new",  # a full stream refuses; it never deletes what it acknowledged
            "max_bytes": -1,
            "max_msgs": -1,
            "max_age": 0,
            "max_msg_size": -1,
            "max_consumers": -1,
            "duplicate_window": DEDUPLICATION_SECONDS * 1_000_000_000,
            "allow_direct": True,
        }
