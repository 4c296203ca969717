"""A request between the edge and the pipeline, and how its outcome comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from betrace.service.receiver.shares import Shares


@dataclass(frozen=True, slots=True)
class Done:
    """The request's spans are in the span log, at ``position``; ``rejected`` of them were left out,
    and why."""

    spans: int
    rejected: int = 0
    message: str = ""
    position: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """The request was not accepted: ``status`` is 400 (it cannot be decoded), 403 (its tenant is
    deleted), 413 (too large when decompressed) or 503 (it cannot be written now); ``message`` says
    what to do."""

    status: int
    message: str


class Reply:
    """The outcome of a request: set once by the pipeline, awaited by the edge."""

    __slots__ = ("_event", "_outcome")

    def __init__(self) -> None:
        self._event = trio.Event()
        self._outcome: Done | Refused | None = None

    def set(self, outcome: Done | Refused) -> None:
        """Tell the outcome. Raises :exc:`RuntimeError` the second time."""
        if self._outcome is not None:
            raise RuntimeError("the outcome of this request was already told")
        self._outcome = outcome
        self._event.set()

    async def wait(self) -> Done | Refused:
        """The outcome, as soon as it is known."""
        await self._event.wait()
        assert self._outcome is not None
        return self._outcome


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way through the pipeline: the body as it came, still compressed.

    ``content_type`` is protobuf or json; ``encoding`` is empty, gzip, zstd or deflate;
    ``received_ns`` is wall-clock nanoseconds; ``weight`` is its estimated number of spans, which
    its tenant holds of ``shares`` until :meth:`release`.
    """

    tenant: str
    content_type: str
    encoding: str
    body: bytes | memoryview
    received_ns: int
    weight: int
    reply: Reply
    shares: Shares | None = None

    def release(self) -> None:
        """It takes no room any more. Twice does no harm."""
        if self.shares is not None:
            self.shares.give_back(self.tenant, self.weight)
            self.shares = None
