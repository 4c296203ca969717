"""One call of a gRPC connection."""

from __future__ import annotations

import trio

from betrace.service.receiver.bodies import Body
from betrace.service.receiver.grpc.framing import MessageReader, RpcStatus
from betrace.service.receiver.heads import Head


class GrpcCall:
    """A call in progress. ``deadline`` is when the connection must check it, ``timeout`` when its
    client gives up, both on Trio's clock."""

    __slots__ = (
        "body",
        "deadline",
        "h2_knows",
        "head",
        "id",
        "message",
        "method",
        "processing",
        "received",
        "scope",
        "status",
        "timeout",
        "unsent",
        "watched",
    )

    def __init__(self, id: int, method: str, deadline: float, timeout: float, limit: int) -> None:
        """``limit`` is the size of the largest message in bytes."""
        self.id = id
        self.method = method
        self.deadline = min(deadline, timeout)
        self.timeout = timeout
        self.message = MessageReader(limit)
        self.head: Head | None = None  # of an export that is admitted
        self.body: Body | None = None  # the memory that its message holds
        self.received = False  # the client has ended its side
        self.h2_knows = False  # ... and h2 knows it
        self.processing = False
        self.scope: trio.CancelScope | None = None  # of its wait for the pipeline
        self.unsent = b""  # waits for the client's window
        self.status: RpcStatus | None = None  # is sent after that
        self.watched = b""  # the health that was sent last

    def release(self) -> None:
        """Release the memory of its message."""
        if self.body is not None:
            self.body.__exit__()
            self.body = None
