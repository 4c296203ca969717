"""The index of stored traces as an evaluator sees it: requests to a query node.

An answer counts only if the query node has applied enough of what this partition had decided.
Otherwise :exc:`~betrace.service.pipeline.history.HistoryUnavailable` is raised, and the partition
waits: late spans are never judged as if their trace had no earlier ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from betrace.service.cluster.query.index_messages import (
    MOST_TRACES,
    IndexAnswer,
    IndexMessageError,
    IndexRequest,
    Raised,
    pack_request,
    unpack_answer,
)
from betrace.service.pipeline.history import HistoryUnavailable
from betrace.service.storage.duck.queries import TraceRow
from betrace.service.storage.jetstream.errors import NatsUnavailable

Ask = Callable[[bytes], bytes]
"""Sends a request and returns the answer. Blocks; raises
:exc:`betrace.service.storage.jetstream.errors.NatsUnavailable`."""


class RemoteTraceIndex:
    """Implements :class:`betrace.service.pipeline.history.TraceIndex` for one partition.

    ``needed`` returns the ``OUT`` sequence that must be applied at the query node. While that is 0,
    ``inherited`` may return another partition and the sequence that is needed of that one. Query
    nodes apply a partition's output only after that of its parent. Methods block and raise
    :exc:`~betrace.service.pipeline.history.HistoryUnavailable`.
    """

    def __init__(
        self,
        partition: int,
        ask: Ask,
        needed: Callable[[], int],
        inherited: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> None:
        self._partition = partition
        self._ask = ask
        self._needed = needed
        self._inherited = inherited
        self._lock = threading.Lock()
        self._last: tuple[int, str, frozenset[str], IndexAnswer] | None = None

    def find_traces(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, TraceRow]:
        """The traces that are stored, by id."""
        return self._find(tenant, trace_ids).rows

    def raised_of(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, list[Raised]]:
        """As :meth:`betrace.service.storage.duck.store.DuckStore.raised_of`."""
        raised = self._find(tenant, trace_ids).raised
        return {trace_id: raised[trace_id] for trace_id in trace_ids if trace_id in raised}

    def _find(self, tenant: str, trace_ids: Sequence[str]) -> IndexAnswer:
        """What is stored about traces. The last answer is used again while no more is needed,
        because a caller asks for rows and then for signals."""
        partition, needed = self._partition, self._needed()
        if not needed:
            partition, needed = self._inherited() or (partition, needed)
        with self._lock:
            last = self._last
        if last is not None and last[:2] == (needed, tenant) and last[2].issuperset(trace_ids):
            return last[3]
        found = IndexAnswer(needed)
        left = list(trace_ids)
        while left:
            some = left[:MOST_TRACES]
            answer = self._request(IndexRequest(partition, needed, tenant, some))
            left = left[answer.answered :]
            found.rows.update(answer.rows)
            found.raised.update(answer.raised)
        with self._lock:
            self._last = needed, tenant, frozenset(trace_ids), found
        return found

    def _request(self, request: IndexRequest) -> IndexAnswer:
        try:
            answer = unpack_answer(self._ask(pack_request(request)))
        except NatsUnavailable as error:
            raise HistoryUnavailable(f"no query node answers: {error}") from error
        except IndexMessageError as error:
            raise HistoryUnavailable(str(error)) from error
        if answer.problem is not None or answer.applied < request.upto or not answer.answered:
            raise HistoryUnavailable(
                f"the query node that answered has applied OUT of partition {request.partition} up "
                f"to {answer.applied}, but {request.upto} is needed"
                + (f" ({answer.problem})" if answer.problem else "")
            )
        return answer
