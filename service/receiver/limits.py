"""Time limits and sizes that the connections of both ingestion listeners keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from betrace.service.config.base import MIB

# After a refusal the rest of the body is read and dropped, within these limits: closing a
# connection with unread data resets it, and the client may lose the response (RFC 9112, 9.6).
LINGER_BYTES: Final = 32 * MIB
LINGER_SECONDS: Final = 2.0
SEND_SECONDS: Final = 10.0
# When the service stops, a request may be on its way on a connection that looks idle.
RETIRE_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a connection may be idle, and that a request's head and its body may take. A TLS
    handshake has as much time as a head. ``body_bytes`` is the size of the largest body."""

    idle: float
    head: float
    body: float
    body_bytes: int
