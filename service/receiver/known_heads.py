"""Request heads that were parsed and admitted before.

A client sends the same head with every request, except for the digits of Content-Length. Parsing
and checking a head costs more than anything else that is done with a small request before it is
decoded, so what was found is kept, by the bytes of the head without those digits.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import replace
from typing import Final

from betrace.service.receiver.heads import Head
from betrace.service.receiver.http1 import RequestHead

MOST_HEADS: Final = 1024
MOST_BYTES: Final = 1024
"""Longer heads are not kept."""

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,12})\r\n", re.IGNORECASE)

_NAME = re.compile(rb"content-length", re.IGNORECASE)


class KnownHeads:
    """The heads used last, with their request and what admission made of it."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[RequestHead, Head]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, block: bytes) -> tuple[RequestHead, Head] | None:
        """The request of a head, and what admission made of it, if such a head is known."""
        found = _LENGTH.search(block)
        if found is None:
            return None
        known = self._known.get(block[: found.start(1)] + block[found.end(1) :])
        if known is None:
            return None
        length = int(found[1])
        request, admitted = known
        if request.length == length:
            return known
        return request.with_length(length), replace(admitted, length=length)

    def keep(self, block: bytes, request: RequestHead, admitted: Head) -> None:
        """Keep an admitted head. One without exactly one Content-Length is not kept, because it
        would not be clear what is left out of it."""
        found = _LENGTH.search(block)
        if found is None or len(block) > MOST_BYTES or len(_NAME.findall(block)) != 1:
            return
        self._known[block[: found.start(1)] + block[found.end(1) :]] = request, admitted
        if len(self._known) > MOST_HEADS:
            self._known.popitem(last=False)
