"""Suggests a known word for one that is probably misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SIMILARITY = 0.7  # difflib's ratio, 0 to 1


def close_match(word: str, known: Iterable[str]) -> str | None:
    """The known word most similar to ``word``, ignoring case; None if none is similar."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word[:80].lower(), names, n=1, cutoff=_SIMILARITY)
    return names[found[0]] if found else None
