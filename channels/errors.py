"""Errors that a pipeline expects, as opposed to bugs."""

from __future__ import annotations


class ExpectedError(Exception):
    """An error that a handler expects: it is counted and handled, without a traceback."""


class TransientError(ExpectedError):
    """An expected error that may go away, so that trying again later makes sense."""


def is_expected(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Return whether the error is of one of the kinds; for a group, whether all its errors are."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_expected(member, kinds) for member in error.exceptions)
    return isinstance(error, kinds)
