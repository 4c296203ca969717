"""How much a connection may ask for that is no work: pings, settings, resets, empty frames."""

from __future__ import annotations

from typing import Final

from h2.errors import ErrorCodes

from betrace.service.receiver.grpc.frames import (
    DATA,
    GOAWAY,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Http2Error,
)

BURST: Final = 1000.0
PER_SECOND: Final = 100.0
PER_ANSWER: Final = 5.0  # an answered call pays for what usually goes with it

# A ping or a change of settings costs an answer, a reset a started call.
COSTS: Final = {
    DATA: 1.0,  # without a payload
    PRIORITY: 1.0,
    RST_STREAM: 5.0,
    SETTINGS: 20.0,
    PING: 10.0,
    GOAWAY: 1.0,
    WINDOW_UPDATE: 1.0,
}
_UNKNOWN: Final = 1.0


class Budget:
    """A token bucket for control frames (CVE-2019-9512, -9515, -9518, CVE-2023-44487): 1000, and
    100 more each second, so 10 pings a second, 100 at once."""

    __slots__ = ("_left", "_time")

    def __init__(self, now: float) -> None:
        self._left = BURST
        self._time = now

    def answered(self) -> None:
        """A call was answered."""
        self._left = min(BURST, self._left + PER_ANSWER)

    def spend(self, kind: int, now: float) -> None:
        """A frame of ``kind`` has come. Raises :exc:`Http2Error` when there were too many."""
        self._left -= COSTS.get(kind, _UNKNOWN)
        if self._left < 0:
            self._left = min(BURST, self._left + (now - self._time) * PER_SECOND)
            self._time = now
        if self._left < 0:
            # grpc-core and grpc-go look for this text, and ping half as often from then on.
            text = "too_many_pings" if kind == PING else f"too many frames of type {kind}"
            raise Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, text)
