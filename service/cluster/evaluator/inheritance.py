"""How a partition is passed on to those that continue it after the cluster was resized.

The owner of a former partition appends a seal to its log, applies the log up to it, stores all
results, and saves its last state under a name of its own. Then an entry in the configuration bucket
says that the partition is finished. Whoever owns a partition that continues it takes those traces
from that state which now belong there, and reads its own log from the beginning. A state that was
inherited is what an empty one is for the first partitions: any owner can begin with it again.
"""

from __future__ import annotations

import logging

import numpy as np
import trio

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.partition_traces import Wanted
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.otlp.columns import Rows
from betrace.service.otlp.partition import partition_numbers
from betrace.service.storage.jetstream.blobs import BlobCorrupt, BlobMissing
from betrace.service.storage.jetstream.bucket import Conflict
from betrace.service.storage.jetstream.generations import Finished, finished_key
from betrace.service.telemetry import events
from betrace.service.tenants import split_log_name

_log = logging.getLogger("service.cluster.owner")

_RETRY_SECONDS = 0.25


class NotInherited(TransientError):  # noqa: N818
    """The last state of the parent cannot be used; its owner has to save it again."""


def final_state_name(partition: int) -> str:
    """The name of the last state of a partition in the object store."""
    return f"final/{partition}"


async def save_final(parts: OwnerParts, state: PartitionState, output: int) -> None:
    """Save the last state of a sealed partition, all results of which are stored up to message
    ``output`` of its output, and note that it is finished. Waits while NATS is unavailable."""
    partition = state.partition
    data = await parts.threads.run(state.snapshot, output)
    finished = Finished(state.applied, output)
    while True:
        try:
            await parts.blobs.put(final_state_name(partition), data)
            await parts.config.put(finished_key(partition), finished.to_json(), 0)
            break
        except Conflict:  # a former owner did the same
            break
        except TransientError as error:
            _log.debug("partition %d: the last state is not saved: %s", partition, error)
            await trio.sleep(_RETRY_SECONDS)
    parts.partitions.finished.setdefault(partition, finished)  # before the watch says so
    events.PARTITION_FINISHED(partition=partition, sealed=state.applied, bytes=len(data))


async def inherited(parts: OwnerParts, partition: int) -> PartitionState:
    """The state that a partition begins with. Raises :exc:`NotInherited`."""
    state = parts.new_state(partition)
    generations = parts.partitions.generations
    parent = generations.parent(partition)
    if parent is None:
        return state
    own = generations.of_partition(partition)

    def wanted(name: str, ids: Rows) -> Wanted:
        tenant, _ = split_log_name(name)
        return np.asarray(own.first + partition_numbers(tenant, ids, own.count) == partition)

    while True:
        try:
            data = await parts.blobs.get(final_state_name(parent))
            await parts.threads.run(state.inherit, data, wanted)
            return state
        except (BlobMissing, BlobCorrupt, ValueError) as error:
            await _finish_again(parts, parent, error)
        except TransientError as error:
            _log.debug("partition %d cannot begin yet: %s", partition, error)
            await trio.sleep(_RETRY_SECONDS)


async def _finish_again(parts: OwnerParts, parent: int, error: Exception) -> None:
    """Let the parent's owner save its last state again: its log and checkpoints still exist."""
    events.CHECKPOINT_UNUSABLE(name=final_state_name(parent), reason=str(error))
    await parts.config.delete(finished_key(parent))
    raise NotInherited(f"the last state of partition {parent} cannot be used: {error}")
