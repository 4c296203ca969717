"""HPACK (RFC 7541) for clients that send the same headers again and again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from hpack import Decoder, HeaderTuple

_REMEMBERED: Final = 16


class RepeatingDecoder(Decoder):
    """A decoder that remembers header blocks for as long as its dynamic table does not change. From
    the second request of a connection on, most exporters send only indexes into it.

    ``content-length`` is left out: ``h2`` would compare it with the DATA that it sees, which here is
    empty.
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
        before = self._table()
        headers = [h for h in super().decode(block, raw) if h[0] != b"content-length"]
        if self._table() != before or len(self._blocks) >= _REMEMBERED:
            self._blocks.clear()
        if self._table() == before:
            self._blocks[block] = headers
        return headers

    def _table(self) -> tuple[int, int, int]:
        """What differs once the dynamic table has changed: entries come in at its front."""
        table = self.header_table
        entries = table.dynamic_entries
        return id(entries[0]) if entries else 0, len(entries), table.maxsize
