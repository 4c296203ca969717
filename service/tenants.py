"""The names of tenants."""

from __future__ import annotations

import re

DEFAULT_TENANT = "default"
TENANT_RULE = (
    "a tenant name is 1 to 63 characters a-z, 0-9, '-' and '_', and starts with a letter or a digit"
)

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


def is_tenant_name(text: str) -> bool:
    """Whether ``text`` is a valid tenant name (see ``TENANT_RULE``)."""
    return _NAME.fullmatch(text) is not None
