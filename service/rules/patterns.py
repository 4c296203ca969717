"""Searches texts with a tenant's patterns, in bounded time and memory.

RE2 takes time proportional to the text and, for some patterns, to the size of the pattern's program
as well: ``[ab]*a[ab]{250}c`` takes 0.3 s for 64 KiB. Therefore a match looks at a bounded text,
several patterns over the same attribute are searched together (RE2's ``Set``), results for short
texts are remembered, and whoever pays for a search is asked before it starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, Final

import re2

from betrace.service.rules.syntax import And, Attribute, Compare, Node, Not, Or
from betrace.service.rules.values import compile_pattern

MATCH_BYTES: Final = 64 * 1024
"""The default of :func:`match_bytes`."""
FULL_TEXT_PROGRAM: Final = 1500
"""Instructions of the largest program that searches so long a text; a larger one searches
proportionally less, so that the most expensive search of ``MATCH_BYTES`` takes about a second."""
TOO_LONG: Final = "a text is too long to be searched"
"""Why a rule is undecided that depends on an unknown match."""
SECONDS_PER_STEP: Final = 1e-8
"""Of a search that has to follow all states of the program, per byte and instruction."""

_LEAST_IN_SET = 4  # fewer patterns over an attribute are searched one by one
_SET_PROGRAM = 2000  # instructions of the patterns in one set
_SET_TEXT = 4096  # longer texts are searched one pattern at a time, so that searches stay short
_SET_MEMORY = 1 << 20
_REMEMBERED = 4096
_REMEMBERED_SINGLY = 16_384  # more than a rule has patterns
_REMEMBERED_TEXT = 1024  # of longer ones a digest is the key
_PARTIAL = 64

Pay = Callable[[float], object]
"""Called with the most CPU seconds that a search may take, before it; may raise
:exc:`SearchStopped`."""


class SearchStopped(Exception):  # noqa: N818
    """Whoever pays for a search stopped it before it began. ``work`` does the search and remembers
    its result, so that asking again costs nothing."""

    work: Callable[[], object] | None = None


_longest = MATCH_BYTES


def match_bytes() -> int:
    """The length of the longest text that is searched; a match of a longer one is unknown."""
    return _longest


def set_match_bytes(longest: int) -> None:
    """Set :func:`match_bytes` for this process, because a verdict must not depend on who asks."""
    global _longest
    _longest = longest


class PatternSearch:
    """The patterns of one tenant's rules. Not thread-safe: use one thread at a time."""

    def __init__(self, predicates: Iterable[Node | None]) -> None:
        self._of: dict[Attribute, list[str]] = {}
        for predicate in predicates:
            for attribute, pattern in _patterns(predicate):
                of = self._of.setdefault(attribute, [])
                if pattern not in of:
                    of.append(pattern)
        self.count = sum(map(len, self._of.values()))
        """Distinct patterns, by attribute."""
        self._sets: dict[Attribute, list[_Set]] = {}
        self._remembered: dict[tuple[Attribute, str | bytes], frozenset[str]] = {}
        # Of searches that are not complete: how many sets were searched, and what was found.
        self._partial: dict[tuple[Attribute, str | bytes], tuple[int, frozenset[str]]] = {}
        self._single: dict[tuple[str, str | bytes], bool] = {}
        self._digested: tuple[str, bytes] = "", b""

    def search(self, attribute: Attribute, pattern: str, text: str, pay: Pay | None) -> bool | None:
        """Whether ``pattern`` is found in ``text``, the text of ``attribute``; None if the text is
        too long."""
        if len(text) <= _SET_TEXT and len(self._of.get(attribute, ())) >= _LEAST_IN_SET:
            found = self._remembered.get((attribute, self._key(text)))
            if found is None:
                found = self._search_all(attribute, text, pay)
            if found is not None:
                return pattern in found
        key = pattern, self._key(text)
        known = self._single.get(key)
        if known is not None:
            return known
        prepared = _prepare(pattern, text)
        if prepared is None:
            return None
        program, data, seconds = prepared

        def run() -> bool:
            if len(self._single) >= _REMEMBERED_SINGLY:
                self._single.clear()
            found = self._single[key] = program.search(data) is not None
            return found

        _ask(pay, seconds, run)
        return run()

    def _key(self, text: str) -> str | bytes:
        """The text, or its digest if it is long. Results for long texts are remembered too, so that
        a predicate with many patterns advances although its slices of time end within it."""
        if len(text) <= _REMEMBERED_TEXT:
            return text
        if text is not self._digested[0]:
            data = text.encode("utf-8", "surrogatepass")
            self._digested = text, hashlib.blake2b(data, digest_size=16).digest()
        return self._digested[1]

    def _search_set(self, key: tuple[Attribute, str | bytes], each: _Set, data: bytes) -> bool:
        """Search the next set for a text; returns False if its memory ran out."""
        some = each.search(data)
        if some is None:
            return False
        number, found = self._partial[key]
        if len(self._partial) >= _PARTIAL:
            self._partial.clear()
        self._partial[key] = number + 1, found | frozenset(some)
        return True

    def _search_all(
        self, attribute: Attribute, text: str, pay: Pay | None
    ) -> frozenset[str] | None:
        sets = self._sets.get(attribute)
        if sets is None:
            sets = self._sets[attribute] = _sets(self._of[attribute])
        data = text.encode("utf-8", "surrogatepass")
        key = attribute, self._key(text)
        first, found = self._partial.pop(key, (0, frozenset()))
        for number in range(first, len(sets)):
            self._partial[key] = number, found
            run = partial(self._search_set, key, sets[number], data)
            _ask(pay, sets[number].program * len(data) * SECONDS_PER_STEP, run)
            if not run():
                del self._partial[key]
                return None
            _, found = self._partial[key]
        self._partial.pop(key, None)
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        self._remembered[key] = found
        return found


def search(pattern: str, text: str, pay: Pay | None = None) -> bool | None:
    """Whether ``pattern`` is found in ``text``; None if the text is too long for it."""
    prepared = _prepare(pattern, text)
    if prepared is None:
        return None
    program, data, seconds = prepared
    if pay is not None:
        pay(seconds)
    return program.search(data) is not None


def _ask(pay: Pay | None, seconds: float, work: Callable[[], object]) -> None:
    """Ask whoever pays for a search; if they stop it, tell them how to do it."""
    if pay is None:
        return
    try:
        pay(seconds)
    except SearchStopped as stopped:
        stopped.work = work
        raise


def _prepare(pattern: str, text: str) -> tuple[Any, bytes, float] | None:
    """The program, the text as bytes, and the most CPU seconds that the search may take; None if
    the text is too long for the pattern."""
    longest = _longest
    if len(text) > longest:
        return None
    program = compile_pattern(pattern)
    data = text.encode("utf-8", "surrogatepass")
    size = program.programsize
    if len(data) * max(size, FULL_TEXT_PROGRAM) > longest * FULL_TEXT_PROGRAM:
        return None
    return program, data, size * len(data) * SECONDS_PER_STEP


class _Set:
    """Patterns that are searched together."""

    def __init__(self, patterns: list[str], program: int) -> None:
        options = re2.Options()
        options.never_capture = True
        options.log_errors = False
        options.max_mem = _SET_MEMORY
        self.program = program
        self._patterns = patterns
        self._set: Any = re2.Set.SearchSet(options)
        for pattern in patterns:
            self._set.Add(pattern.encode("utf-8", "surrogatepass"))
        # RE2 reports nothing if its memory runs out: then even the empty pattern is not found.
        self._set.Add(b"")
        self._set.Compile()

    def search(self, data: bytes) -> list[str] | None:
        """The patterns that are found; None if memory ran out."""
        numbers = self._set.Match(data)
        last = len(self._patterns)
        if last not in numbers:
            return None
        return [self._patterns[number] for number in numbers if number != last]


def _sets(patterns: list[str]) -> list[_Set]:
    """Sets of bounded size. A pattern that is larger than a set has one of its own."""
    sets: list[_Set] = []
    some: list[str] = []
    size = 0
    for pattern in patterns:
        own = pattern_size(pattern)
        if some and size + own > _SET_PROGRAM:
            sets.append(_Set(some, size))
            some, size = [], 0
        some.append(pattern)
        size += own
    return [*sets, _Set(some, size)]


@lru_cache(maxsize=16_384)
def pattern_size(pattern: str) -> int:
    """Instructions of the RE2 program of a pattern that compiles."""
    size: int = compile_pattern(pattern).programsize
    return size


def patterns_size(predicates: Iterable[Node | None]) -> int:
    """Instructions of the programs of all patterns in these predicates."""
    return sum(pattern_size(text) for each in predicates for _, text in _patterns(each))


def has_pattern(predicate: Node | None) -> bool:
    """Whether a predicate searches a text."""
    return bool(_patterns(predicate))


def _patterns(node: Node | None) -> list[tuple[Attribute, str]]:
    match node:
        case And(items) | Or(items):
            return [found for item in items for found in _patterns(item)]
        case Not(item):
            return _patterns(item)
        case Compare(attribute, "matches", literals):
            return [(attribute, literals[0].text)]
        case _:
            return []
