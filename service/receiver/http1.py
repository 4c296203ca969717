"""HTTP/1.1 messages as bytes (RFC 9112), without I/O: heads and chunked bodies are parsed by
llhttp, which ``httptools`` wraps; responses are rendered here.

llhttp runs in its strict mode, which refuses what request smuggling needs: Content-Length together
with Transfer-Encoding, several or invalid lengths, folded lines, bare LF, space before a colon,
chunk sizes that overflow. :func:`parse_head` checks what llhttp leaves to its caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

import httptools

from betrace.service.config.base import KIB
from betrace.service.receiver.responses import HttpResponse

HEAD_END = b"\r\n\r\n"
MAX_HEAD_BYTES: Final = 32 * KIB
MAX_HEADERS: Final = 100
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\n"  # what HTTP/1.1 sees of it; RFC 9113, 3.4

_TOO_LARGE = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
_CHUNKED_HEAD = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class NotHttpError(Exception):
    """Received bytes are not a valid request: an HTTP status, and what is wrong."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def too_large_head() -> NotHttpError:
    """The error for a head, or for data between the parts of a chunked body, that is too large."""
    return NotHttpError(
        _TOO_LARGE, f"send at most {MAX_HEADERS} headers, of {MAX_HEAD_BYTES} bytes together"
    )


class RequestHead:
    """The head of a request; also the object that llhttp calls while parsing it.

    ``path`` is the request target without its query, percent-encoded as received; names in
    ``headers`` are lower case. ``length`` is the length of the body in bytes, None for a chunked
    body. ``persistent`` and ``expects_continue`` are what the client asks for.
    """

    __slots__ = (
        "expects_continue",
        "headers",
        "length",
        "method",
        "path",
        "persistent",
        "target",
    )

    def __init__(self) -> None:
        self.method = ""
        self.target = b""
        self.path = ""
        self.headers: list[tuple[bytes, bytes]] = []
        self.length: int | None = 0
        self.persistent = True
        self.expects_continue = False

    def with_length(self, length: int) -> RequestHead:
        """A copy with another length of the body; it shares the headers."""
        other = RequestHead()
        other.method, other.target, other.path = self.method, self.target, self.path
        other.headers, other.length = self.headers, length
        other.persistent, other.expects_continue = self.persistent, self.expects_continue
        return other

    def on_url(self, url: bytes) -> None:
        """Called by the parser."""
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self.headers.append((name.lower(), value))


def parse_head(block: bytes) -> RequestHead:
    """Parse the head in ``block``, which ends with the empty line. Raises :exc:`NotHttpError`."""
    head = RequestHead()
    parser = httptools.HttpRequestParser(head)
    try:
        parser.feed_data(block)
    except httptools.HttpParserUpgrade:
        pass  # an offer, which a server may ignore (RFC 9110, 7.8)
    except httptools.HttpParserError as error:
        raise NotHttpError(400, f"this is not an HTTP/1.1 request: {error}") from None
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise NotHttpError(505, f"HTTP/{version} is not supported on this port; use HTTP/1.1")
    if len(head.headers) > MAX_HEADERS:
        raise too_large_head()
    head.method = parser.get_method().decode("ascii")
    path = head.target.partition(b"?")[0]
    if path[:1] != b"/" and b"://" in path:
        try:
            path = httptools.parse_url(head.target).path or b"/"
        except httptools.HttpParserError:
            raise NotHttpError(400, "the request target is not a URL") from None
    head.path = path.decode("latin-1")
    hosts = 0
    for name, value in head.headers:
        if name == b"content-length":
            head.length = int(value)
        elif name == b"host":
            hosts += 1
        elif name == b"connection":
            head.persistent &= b"close" not in value.lower()
        elif name == b"expect":
            head.expects_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked" or version == "1.0":
                raise NotHttpError(
                    400, "the only Transfer-Encoding is chunked, with HTTP/1.1; use it or none"
                )
            head.length = None
    if version == "1.0":
        head.persistent = head.expects_continue = False
    elif hosts != 1:
        raise NotHttpError(400, f"HTTP/1.1 needs one Host header; this request has {hosts}")
    return head


class ChunkedBody:
    """Decodes the chunked transfer coding. ``data`` is the body so far, ``complete`` whether it is
    complete. Extensions and trailers are dropped."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.complete = False
        self._silent = 0  # bytes since the last one of the body
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._parser.feed_data(_CHUNKED_HEAD)

    def release(self) -> None:
        """Drop the body and the parser. Parser and body refer to each other, so without this their
        memory would be kept until the next full garbage collection."""
        self._parser = None
        self.data = bytearray()

    def feed(self, received: bytes) -> bytes:
        """Parse received bytes, and return what follows the end of the body.

        The parser does not report where a message ends, and would parse what follows as the next
        message. A message can only end with CRLF CRLF, so the parser is fed up to each CRLF CRLF in
        turn, and the first three bytes singly, because part of one may have come in an earlier
        call.

        Raises :exc:`NotHttpError`.
        """
        parser = self._parser
        if parser is None:
            raise RuntimeError("this body was released")
        view = memoryview(received)
        start = 0
        while start < len(view) and not self.complete:
            end = start + 1
            if start >= 3:
                found = received.find(HEAD_END, start - 3)
                end = found + 4 if found >= 0 else len(view)
            self._silent += end - start
            try:
                parser.feed_data(view[start:end])
            except httptools.HttpParserError as error:
                raise NotHttpError(400, f"the chunked body is malformed: {error}") from None
            if self._silent > MAX_HEAD_BYTES:
                raise too_large_head()
            start = end
        return received[start:]

    def on_body(self, part: bytes) -> None:
        """Called by the parser."""
        self._silent = 0
        self.data += part

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.complete = True


class DateLine:
    """The Date header, rendered once a second."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        """The header line for the current time."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._line = b"date: %s\r\n" % formatdate(second, usegmt=True).encode()
        return self._line


_date = DateLine()


class Renderer:
    """Renders responses. The last plain one is kept, because most requests get the same answer."""

    def __init__(self) -> None:
        self._kept: tuple[HttpResponse | None, bytes, bytes] = (None, b"", b"")

    def __call__(self, response: HttpResponse, *, close: bool, bodiless: bool = False) -> bytes:
        """The response as bytes. ``close`` announces the end of the connection; ``bodiless`` omits
        the body but not its length, as required for HEAD."""
        date = _date.line()
        plain = not close and not bodiless
        kept, at, data = self._kept
        if plain and kept is response and at is date:
            return data
        parts = [_STATUS_LINES[response.status], date]
        for name, value in response.headers:
            if name != b"connection":
                parts += (name, b": ", value, b"\r\n")
        parts.append(b"connection: close\r\n\r\n" if close else b"\r\n")
        if not bodiless:
            parts.append(response.body)
        data = b"".join(parts)
        if plain:
            self._kept = response, date, data
        return data


render = Renderer()
