"""The names of tenants."""

from __future__ import annotations

import re

DEFAULT_TENANT = "default"
TENANT_RULE = (
    "a tenant name is 1 to 63 characters a-z, 0-9, '-' and '_', and starts with a letter or a digit"
)

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_SEPARATOR = "="  # not part of any name, and valid in keys of buckets


def is_tenant_name(text: str) -> bool:
    """Whether ``text`` is a valid tenant name (see ``TENANT_RULE``)."""
    return _NAME.fullmatch(text) is not None


def log_name(tenant: str, generation: int) -> str:
    """The name of a tenant in the log of a cluster. A tenant that was deleted and created again has
    another ``generation``, and therefore another name."""
    return f"{tenant}{_SEPARATOR}{generation}" if generation else tenant


def split_log_name(name: str) -> tuple[str, int]:
    """The tenant and the generation of a :func:`log_name`."""
    tenant, separator, generation = name.partition(_SEPARATOR)
    return tenant, int(generation) if separator else 0
