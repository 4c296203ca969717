"""The errors that the parts of a pipeline foresee, told apart from bugs."""

from __future__ import annotations


class ExpectedError(Exception):
    """An error that a handler foresees: counted and acted on, but no reason for a traceback."""


class TransientError(ExpectedError):
    """An expected error that may go away by itself, so that trying again later makes sense."""


def is_expected(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Return whether the error, or each error of the group that it is, is of one of the kinds."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_expected(member, kinds) for member in error.exceptions)
    return isinstance(error, kinds)
