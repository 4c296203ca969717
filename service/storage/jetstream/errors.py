"""Errors of the cluster's storage, and how replies of JetStream become errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from betrace.channels import TransientError

# Codes of nats-server (server/errors.json).
_FULL = frozenset({10002, 10023, 10047, 10077})
_WRONG_SEQUENCE = frozenset({10071, 10164})
_IN_PROCESS = 10158
_TOO_LARGE = 10054
_NOT_FOUND = 404


class NatsUnavailable(TransientError):  # noqa: N818
    """NATS did not answer: no connection, no leader, no quorum, or a timeout. If something was
    being written, it may have been written: the outcome is unknown."""


class StreamFull(TransientError):  # noqa: N818
    """The stream or the servers' storage is full. Nothing was written."""


class JetStreamError(Exception):
    """JetStream refused a request, and repeating it would not help."""


class NotInStream(JetStreamError):  # noqa: N818
    """There is no such stream, or no such message in it."""


class MessageTooLarge(JetStreamError):  # noqa: N818
    """The message is larger than the servers' ``max_payload``."""


class WrongLastSequence(JetStreamError):  # noqa: N818
    """The stream does not end with the expected sequence."""


class LogGap(Exception):  # noqa: N818
    """Messages are missing in a log: they were deleted, or the log lost them."""

    def __init__(self, stream: str, expected: int, found: int) -> None:
        super().__init__(
            f"{stream} continues at {found} instead of {expected}: the messages in between were "
            "deleted or lost"
        )
        self.expected = expected
        self.found = found


def reply_error(error: Mapping[str, Any], what: str) -> Exception:
    """The exception for the ``error`` in a JetStream reply; ``what`` names the request."""
    status = int(error.get("code", 0))
    code = int(error.get("err_code", 0))
    text = f"{what}: {error.get('description', 'refused')}"
    if code in _FULL and "no space left" not in text:
        return StreamFull(text)
    if code in _WRONG_SEQUENCE:
        return WrongLastSequence(text)
    if code == _TOO_LARGE:
        return MessageTooLarge(text)
    if status >= 500 or code == _IN_PROCESS:
        return NatsUnavailable(text)
    if status == _NOT_FOUND:
        return NotInStream(text)
    return JetStreamError(f"{text} (error {code})")
