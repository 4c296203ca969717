"""A request on its way from the receiver through the pipeline, and its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio


@dataclass(frozen=True, slots=True)
class Done:
    """The request's spans are in the span log at ``position``; ``rejected`` spans were dropped, and
    ``message`` says why."""

    spans: int
    rejected: int = 0
    message: str = ""
    position: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """The request was not accepted. ``status`` is 400 (cannot be decoded), 403 (tenant deleted),
    413 (too large after decompression) or 503 (cannot be written now); ``message`` says what to
    do."""

    status: int
    message: str


class Reply:
    """The outcome of a request: set once by the pipeline, awaited by the receiver."""

    __slots__ = ("_event", "_outcome")

    def __init__(self) -> None:
        self._event: trio.Event | None = None  # of the receiver, if it waits
        self._outcome: Done | Refused | None = None

    @property
    def known(self) -> bool:
        """Whether the outcome is set."""
        return self._outcome is not None

    def set(self, outcome: Done | Refused) -> None:
        """Set the outcome. Raises :exc:`RuntimeError` the second time."""
        if self._outcome is not None:
            raise RuntimeError("the outcome of this request is already set")
        self._outcome = outcome
        if self._event is not None:
            self._event.set()

    async def wait(self) -> Done | Refused:
        """Wait for the outcome. Returns without a checkpoint if it is known."""
        if self._outcome is None:
            self._event = trio.Event()
            await self._event.wait()
        assert self._outcome is not None
        return self._outcome


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way through the pipeline, with the body as received, still compressed.

    ``content_type`` is protobuf or json; ``encoding`` is empty, gzip, zstd or deflate;
    ``received_ns`` is wall-clock nanoseconds; ``weight`` is its estimated number of spans.
    ``on_release`` is called once with tenant and weight by :meth:`release`; ``seconds`` is the CPU
    time that decoding took, if it was measured. ``aside`` is set when it no longer belongs to the
    channel, because it waits among the requests that take long.
    """

    tenant: str
    content_type: str
    encoding: str
    body: bytes | memoryview
    received_ns: int
    weight: int
    reply: Reply
    on_release: Callable[[str, int], object] | None = None
    seconds: float = 0.0
    aside: bool = False

    @property
    def finished(self) -> bool:
        """Whether the stage has nothing more to do with it."""
        return self.aside or self.reply.known

    def release(self) -> None:
        """Free the capacity that the request takes. Idempotent."""
        if self.on_release is not None:
            self.on_release(self.tenant, self.weight)
            self.on_release = None
