"""Where a tenant's files lie: in a directory of its name under the data directory.

Some directories there are everyone's. A tenant of such a name has its files in ``<name>.tenant``,
which no other tenant can be called: what is one tenant's can be deleted as a whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from betrace.service.tenants import TENANT_RULE, is_tenant_name

SHARED = frozenset(
    {"archive", "checkpoints", "dead-letters-exported", "export", "fallback", "ledger", "rules"}
)
"""Directories in the data directory that belong to no tenant, though one may be called so."""
_SUFFIX = ".tenant"


def tenant_directory(data: Path, tenant: str) -> Path:
    """The directory of ``tenant``; :exc:`ValueError` where the name could lead elsewhere."""
    if not is_tenant_name(tenant):
        raise ValueError(f"bad tenant name {tenant!r}: {TENANT_RULE}")
    return data / (tenant + _SUFFIX if tenant in SHARED else tenant)


def tenant_archive(archive: Path, tenant: str) -> Path:
    """The directory of a tenant's Parquet files in the archive."""
    return archive / f"tenant={tenant}"


def tenants_with(data: Path, name: str) -> list[str]:
    """The tenants, sorted, whose directory holds a file or folder called ``name``."""
    if not data.is_dir():
        return []
    found = []
    for entry in os.scandir(data):
        tenant = entry.name.removesuffix(_SUFFIX)
        ours = is_tenant_name(tenant) and tenant_directory(data, tenant).name == entry.name
        if ours and entry.is_dir() and (data / entry.name / name).exists():
            found.append(tenant)
    return sorted(found)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file ``path`` by ``data``: after a crash it holds the old bytes or the new."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)
