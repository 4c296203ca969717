"""span-ingestion on an edge: decode, validate, split by partition, append to the partitions' logs,
answer the client.

A request is answered with 200 when every partition that it has spans for has acknowledged them. It
is not atomic: when it is refused, some partitions may have its spans. The client sends all of them
again, and spans that are repeated count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.edge.group_commit import BUSY, GroupCommit
from betrace.service.cluster.edge.tenants import IngestTenants
from betrace.service.otlp.split import BodyPart, TooMuchCopied, split
from betrace.service.pipeline.batch_audit import BatchAudit
from betrace.service.pipeline.request import Done, Refused, Request
from betrace.service.pipeline.scanning import (
    IngestCounts,
    Outcome,
    Scanned,
    are_small,
    scan_requests,
    scanned_outcome,
)
from betrace.service.storage.jetstream.generations import Generation

_COPIES = (
    "The resource attributes of the request are too large to be copied to all partitions that it "
    "has spans for. Send fewer spans with large resources in one request (a smaller batch)."
)
CREATED_ANEW = "the tenant was created a moment ago; send the spans again"


def group_bytes(max_payload: int) -> int:
    """The largest group that fits into a message of ``max_payload`` bytes even if it cannot be
    compressed: zstd adds at most one byte in 256, and there are headers."""
    return max_payload - max_payload // 128 - 1024


@dataclass(slots=True, eq=False)
class _Unanswered:
    """A request, and how many of its parts are being written."""

    request: Request
    outcome: Outcome
    left: int = 0
    refused: Refused | None = None


@dataclass(frozen=True, slots=True)
class _Split:
    """Parts of requests of one tenant: ``requests`` are the numbers of those that each has spans
    of."""

    tenant: str
    received_ns: int
    parts: list[tuple[BodyPart, list[int]]]


class EdgeIngest:
    """The handler of the span-ingestion stage of an edge. Each call waits for the log, so the stage
    needs many workers. ``partitions`` returns the current ones; ``audit`` records each accepted
    request, and ``tenants`` knows their names in the log."""

    def __init__(
        self,
        commit: GroupCommit,
        threads: ThreadRunner,
        partitions: Callable[[], Generation],
        max_body_bytes: int,
        audit: BatchAudit | None = None,
        tenants: IngestTenants | None = None,
    ) -> None:
        self._tenants = tenants
        self._commit = commit
        self._threads = threads
        self._partitions: Final = partitions
        self._max_body: Final = max_body_bytes
        self._most_span: Final = commit.most_part_bytes
        self._audit = audit
        self.counts = IngestCounts()

    async def handle(self, requests: list[Request]) -> None:
        """Append the spans of requests to the log, and answer each request when its own are
        stored."""
        if are_small(requests):
            splits, outcomes = self._split(requests)
        else:
            splits, outcomes = await self._threads.run(self._split, requests)
        waiting = list(map(_Unanswered, requests, outcomes))
        unanswered = len(requests)
        all_answered = trio.Event()

        def written(concerned: list[_Unanswered], refused: Refused | None) -> None:
            nonlocal unanswered
            for each in concerned:
                each.left -= 1
                each.refused = each.refused or refused
                if not each.left:
                    self._answer(each)
                    unanswered -= 1
            if not unanswered:
                all_answered.set()

        for found in splits:
            name = self._log_name(found, waiting)
            for part, concerned in self._taken(found, waiting):
                for each in concerned:
                    each.left += 1
                self._commit.add(name, found.received_ns, part, partial(written, concerned))
        for each in waiting:
            if not each.left:
                self._answer(each)
                unanswered -= 1
        if unanswered:
            await all_answered.wait()

    def _log_name(self, found: _Split, waiting: list[_Unanswered]) -> str:
        """The tenant's name in the log. If the tenant was deleted since its requests were received,
        nothing of them is stored."""
        tenants = self._tenants
        if tenants is None:
            return found.tenant
        if tenants.was_deleted(found.tenant):
            concerned = [waiting[number] for _, numbers in found.parts for number in numbers]
            for each in concerned:
                each.refused = tenants.refusal(found.tenant, each.request.received_ns)
            if any(each.refused is not None for each in concerned):
                for each in concerned:  # they may share parts
                    each.refused = each.refused or Refused(503, CREATED_ANEW)
        return tenants.log_name(found.tenant)

    def _taken(
        self, found: _Split, waiting: list[_Unanswered]
    ) -> Iterator[tuple[BodyPart, list[_Unanswered]]]:
        """The parts that are to be written, with their requests. A request that one of its
        partitions would refuse is refused as a whole; its spans are written only where they share a
        part with others."""
        parts = [(part, [waiting[number] for number in numbers]) for part, numbers in found.parts]
        if not self._commit.has_room([part for part, _ in parts]):
            for _, concerned in parts:
                for each in concerned:
                    each.refused = each.refused or Refused(503, BUSY)
            return
        for part, concerned in parts:
            refused = self._commit.refusal(part.partition)
            if refused is not None:
                for each in concerned:
                    each.refused = each.refused or refused
        for part, concerned in parts:
            others = [each for each in concerned if each.refused is None]
            if others:
                yield part, others

    def _answer(self, waiting: _Unanswered) -> None:
        outcome = waiting.refused or waiting.outcome
        self.counts.answer(waiting.request, outcome)
        if self._audit is not None and isinstance(outcome, Done):
            self._audit.accepted(waiting.request, outcome)
        waiting.request.release()

    async def refuse(self, request: Request, error: Exception, attempts: int) -> None:
        """Refuse a request that the stage failed on; the client still has it and may retry."""
        self.counts.failed(request, error)
        await trio.lowlevel.checkpoint()

    def _split(self, requests: list[Request]) -> tuple[list[_Split], list[Outcome]]:
        scanned, outcomes = scan_requests(requests, self._max_body)
        found = []
        for each in scanned:
            for number, row in zip(each.numbers, each.batch.bodies.tolist(), strict=True):
                outcomes[number] = scanned_outcome(row)
            found += self._split_batch(each, requests, outcomes)
        return found, outcomes

    def _split_batch(
        self, scanned: Scanned, requests: list[Request], outcomes: list[Outcome]
    ) -> list[_Split]:
        batch, numbers = scanned.batch, scanned.numbers
        try:
            current = self._partitions()
            parts, too_large = split(batch, current.count, self._most_span, current.first)
        except TooMuchCopied:
            return self._split_each(scanned, requests, outcomes)
        for body in too_large:
            outcomes[numbers[body]] = Refused(
                413,
                "A span of the request, with its resource and scope, is larger than "
                f"{self._most_span} bytes. Shorten its attributes or events (operators: raise "
                "max_payload of the NATS servers).",
            )
        received_ns = max(requests[number].received_ns for number in numbers)
        named = [(part, [numbers[body] for body in part.bodies]) for part in parts]
        return [_Split(batch.tenant, received_ns, named)]

    def _split_each(
        self, scanned: Scanned, requests: list[Request], outcomes: list[Outcome]
    ) -> list[_Split]:
        """Split the requests of a batch one by one, because together they are too large."""
        numbers = scanned.numbers
        if len(numbers) == 1:
            outcomes[numbers[0]] = Refused(413, _COPIES)
            return []
        found = []
        for number in numbers:
            outcome = outcomes[number]
            if isinstance(outcome, Done) and outcome.spans:
                (alone,), _ = scan_requests([requests[number]], self._max_body)
                found += self._split_batch(Scanned(alone.batch, [number]), requests, outcomes)
        return found
