"""How many examples hypothesis tries."""

from __future__ import annotations

from hypothesis import settings


def examples(number: int) -> int:
    """Return the ``max_examples`` of a test that needs ``number`` of them where others have 100;
    fewer in ``make check``, more in long runs (``BETRACE_EXAMPLES``)."""
    return max(5, number * settings.default.max_examples // 100)
