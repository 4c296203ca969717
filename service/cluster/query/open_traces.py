"""Traces that are still open, which only the owner of their partition has in memory.

A query node asks the owner by NATS request and reply. The request is JSON, and the answer is the
trace as bytes (:mod:`betrace.service.traces.serialize`), empty if the owner does not have it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import orjson

from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.traces.due import DueTraces
from betrace.service.traces.serialize import SerialError, from_bytes, to_bytes

_log = logging.getLogger("service.query")

ANSWER_SECONDS = 2.0


def open_traces_answer(
    look_up: Callable[[int, str, str], DueTraces | NotOwned | None],
) -> Callable[[str, bytes], bytes | None]:
    """What answers requests at an evaluator (:data:`betrace.service.cluster.requests.Answer`).
    ``look_up(partition, tenant, trace id)`` returns a trace in memory, or :data:`NOT_OWNED` if
    another evaluator has the partition, who then answers."""

    def answer(subject: str, data: bytes) -> bytes | None:
        request = unpack_open_request(data)
        partition = int(subject.rpartition(".")[2])
        found = look_up(partition, request.tenant, request.trace_id)
        return None if isinstance(found, NotOwned) else pack_open_answer(found)

    return answer


def open_trace_subject(prefix: str, partition: int | str) -> str:
    """Where the owner of a partition answers; of ``*``, all of them."""
    return f"{prefix}.trace.{partition}"


class NotOwned(Enum):
    """The partition has another owner."""

    NOT_OWNED = "not owned"


NOT_OWNED = NotOwned.NOT_OWNED


@dataclass(frozen=True, slots=True)
class OpenTraceRequest:
    """Asks for a trace, 32 hex digits."""

    tenant: str
    trace_id: str


def pack_open_request(request: OpenTraceRequest) -> bytes:
    """The bytes of a request."""
    return orjson.dumps([request.tenant, request.trace_id])


def unpack_open_request(data: bytes) -> OpenTraceRequest:
    """The inverse of :func:`pack_open_request`. Raises :exc:`ValueError`."""
    tenant, trace_id = orjson.loads(data)
    return OpenTraceRequest(str(tenant), str(trace_id))


def pack_open_answer(found: DueTraces | None) -> bytes:
    """The bytes of an answer. Blocks for a millisecond or more."""
    return b"" if found is None else to_bytes(found)


class RemoteOpenTraces:
    """Looks up open traces at their owners. ``ask`` sends a request to a partition's owner and
    returns the answer; it blocks and raises
    :exc:`betrace.service.storage.jetstream.errors.NatsUnavailable`. ``partition_of`` returns the
    partition of a tenant's trace (16 bytes)."""

    def __init__(
        self, ask: Callable[[int, bytes], bytes], partition_of: Callable[[str, bytes], int]
    ) -> None:
        self._ask = ask
        self._partition_of = partition_of
        self.log_name: Callable[[str], str] = lambda tenant: tenant
        """Returns the name that a tenant has in the logs."""

    def look_up(self, tenant: str, trace_id: str) -> DueTraces | None:
        """A copy of the trace; None if its owner does not have it, or does not answer. Blocks."""
        partition = self._partition_of(tenant, bytes.fromhex(trace_id))
        request = pack_open_request(OpenTraceRequest(self.log_name(tenant), trace_id))
        try:
            data = self._ask(partition, request)
            return replace(from_bytes(data), tenant=tenant) if data else None
        except (NatsUnavailable, SerialError) as error:
            _log.debug("the owner of partition %d does not answer: %s", partition, error)
            return None
