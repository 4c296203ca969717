"""HPACK (RFC 7541) for clients that send the same headers again and again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from hpack import Decoder, HeaderTuple

_REMEMBERED: Final = 16


class RepeatingDecoder(Decoder):
    """A decoder that remembers header blocks for as long as its dynamic table does not change. From
    the second request of a connection on, most exporters send only indexes into it.

    ``content-length`` is left out, because ``h2`` would compare it with the DATA that it sees, and
    it sees none.
    """

    def __init__(self, max_header_list_size: int) -> None:
        super().__init__(max_header_list_size)
        self._blocks: dict[bytes, list[HeaderTuple]] = {}

    def decode(self, data: bytes, raw: bool = False) -> Iterable[HeaderTuple]:
        """See :meth:`hpack.Decoder.decode`."""
        block = bytes(data)
        known = self._blocks.get(block)
        if known is not None:
            return known
        table = self.header_table
        entries = table.dynamic_entries
        first = entries[0] if entries else None  # new entries come before it
        count, size = len(entries), table.maxsize
        headers = [h for h in super().decode(block, raw) if h[0] != b"content-length"]
        same = first is (entries[0] if entries else None)
        same = same and count == len(entries) and size == table.maxsize
        if not same or len(self._blocks) >= _REMEMBERED:
            self._blocks.clear()
        if same:
            self._blocks[block] = headers
        return headers
