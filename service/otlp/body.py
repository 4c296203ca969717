"""Decoding a request body: undo its content encoding, then turn JSON into protobuf."""

from __future__ import annotations

from betrace.service.otlp.encoding import Body, BodyTooLarge, EncodingError, decode_body
from betrace.service.otlp.json import OtlpJsonError, to_protobuf


class BadBody(ValueError):  # noqa: N818 - named for what it is, HTTP 400
    """A body that cannot be decoded; the message says why and what to do."""


def protobuf_body(body: Body, content_type: str, encoding: str, max_bytes: int) -> Body | bytes:
    """Return ``body`` as an uncompressed protobuf ``ExportTraceServiceRequest``.

    Protobuf bodies are decompressed but not parsed: :func:`~betrace.service.otlp.wire.scan_bodies`
    reports what is wrong with them.

    Args:
      content_type: ``json`` or ``protobuf``.
      encoding: the ``Content-Encoding``, in any case; "" for none.
      max_bytes: limit on the decompressed size.

    Raises:
      BodyTooLarge: more than ``max_bytes`` when decompressed.
      BadBody: not valid in its encoding, or not OTLP JSON.
    """
    try:
        decoded = decode_body(body, encoding, max_bytes)
        return to_protobuf(decoded) if content_type == "json" else decoded
    except BodyTooLarge:
        raise
    except (EncodingError, OtlpJsonError) as error:
        raise BadBody(str(error)) from error
