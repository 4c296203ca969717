"""Where a tenant's files are: in a directory with the tenant's name, in the data directory.

Some directories there are shared. The files of a tenant with such a name are in ``<name>.tenant``,
which is not a valid tenant name. So the files of one tenant can be deleted as a whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from betrace.service.tenants import TENANT_RULE, is_tenant_name

SHARED = frozenset(
    {"archive", "checkpoints", "dead-letters-exported", "export", "fallback", "ledger", "rules"}
)
"""Shared directories in the data directory; a tenant may have the same name."""
_SUFFIX = ".tenant"


def tenant_directory(data: Path, tenant: str) -> Path:
    """The directory of ``tenant``. Raises :exc:`ValueError` for an invalid name."""
    if not is_tenant_name(tenant):
        raise ValueError(f"bad tenant name {tenant!r}: {TENANT_RULE}")
    return data / (tenant + _SUFFIX if tenant in SHARED else tenant)


def tenant_archive(archive: Path, tenant: str) -> Path:
    """The directory of a tenant's Parquet files in the archive."""
    return archive / f"tenant={tenant}"


def tenants_with(data: Path, name: str) -> list[str]:
    """The tenants, sorted, whose directory contains a file or directory called ``name``."""
    if not data.is_dir():
        return []
    found = []
    for entry in os.scandir(data):
        tenant = entry.name.removesuffix(_SUFFIX)
        valid = is_tenant_name(tenant) and tenant_directory(data, tenant).name == entry.name
        if valid and entry.is_dir() and (data / entry.name / name).exists():
            found.append(tenant)
    return sorted(found)
