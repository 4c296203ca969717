"""The index of stored traces at a query node, which evaluators ask for traces of late spans."""

from __future__ import annotations

import logging
from collections.abc import Callable

from betrace.service.cluster.query.applied import AppliedPositions
from betrace.service.cluster.query.index_messages import (
    IndexAnswer,
    IndexMessageError,
    IndexRequest,
    pack_answer,
    unpack_request,
)
from betrace.service.cluster.query.tenant_names import TenantNames
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.queries import BadQuery
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore

_log = logging.getLogger("service.index")


def index_subject(prefix: str) -> str:
    """Where the query nodes of a cluster answer."""
    return f"{prefix}.index"


class TraceIndexServer:
    """Answers requests from DuckDB. Blocks; may be called from any thread.

    ``names`` knows the deleted tenants. ``waiting`` says whether rows that count as applied are
    still in fallback files.
    """

    def __init__(
        self,
        store: DuckStore,
        positions: AppliedPositions,
        names: TenantNames,
        waiting: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._positions = positions
        self._names = names
        self._waiting = waiting
        self.requests = 0
        """Requests answered, also with a problem."""
        self.behind = 0
        """Requests that could not be answered, because not enough was applied."""

    def answer(self, subject: str, data: bytes) -> bytes:
        """The answer to a request (:data:`betrace.service.cluster.requests.Answer`)."""
        self.requests += 1
        try:
            request = unpack_request(data)
            found = self._find(request)
        except IndexMessageError as error:
            return pack_answer(IndexAnswer(0, problem=str(error)), [])
        return pack_answer(found, request.traces)

    def _find(self, request: IndexRequest) -> IndexAnswer:
        applied = self._positions.get(request.partition)
        tenant = self._names.tenant(request.tenant)
        if problem := self._problem(request.tenant, tenant, applied, request.upto):
            self.behind += 1
            return IndexAnswer(applied, problem=problem)
        if tenant is None:
            return IndexAnswer(applied, len(request.traces))
        try:
            rows = self._store.find_traces(tenant, request.traces)
            raised = self._store.raised_of(tenant, request.traces)
        except (StoreError, PoolTimeout, BadQuery, ValueError) as error:
            _log.warning("the index cannot answer an evaluator: %s", error)
            return IndexAnswer(applied, problem=str(error))
        return IndexAnswer(applied, len(request.traces), rows, dict(raised))

    def _problem(self, name: str, tenant: str | None, applied: int, upto: int) -> str:
        """Why the index does not have everything up to a position of ``OUT``."""
        if applied < upto:
            return "OUT is not applied far enough"
        if self._names.unknown([name]):
            return "the tenant was created again, and its former data are not deleted yet"
        if tenant in self._store.incomplete:
            return f"the DuckDB file of {tenant} is rebuilt"
        if self._waiting():
            return "DuckDB did not answer, and rows wait in fallback files"
        return ""
