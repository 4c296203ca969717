"""How numba kernels are compiled: without the GIL, bounds-checked, cached on disk.

Numba checks only a kernel's own file to decide whether its cached code is current, but kernels of
other files are compiled into it. The name of the cache folder is therefore a digest of all of them:
kernels must be in the folders ``otlp``, ``rules`` and ``traces``.

``NUMBA_DISABLE_JIT=1`` turns every kernel into ordinary Python; the tests measure their coverage
that way.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import config

F = TypeVar("F", bound=Callable[..., Any])


def _cache_directory() -> Path:
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for folder in ("otlp", "rules", "traces"):
        for source in sorted((package / folder).glob("*.py")):
            digest.update(source.read_bytes())
    base = package / "__pycache__"
    if not os.access(base if base.exists() else package, os.W_OK):
        base = Path(tempfile.gettempdir()) / f"betrace-{os.getuid()}"
    return base / f"kernels-{digest.hexdigest()[:16]}"


_settings: Any = config
if not _settings.CACHE_DIR:  # NUMBA_CACHE_DIR is not set
    _settings.CACHE_DIR = str(_cache_directory())


def lean_kernel(function: F) -> F:
    """Compile ``function`` in nopython mode; it runs without the GIL and is cached on disk.

    Array accesses are bounds-checked, because kernels read untrusted bytes: a wrong index must
    raise :exc:`IndexError` and never read beyond an array.

    References to array arguments are not counted. Numba counts one for each array argument,
    atomically, at every call, even between kernels: small kernels that call each other spend most
    of their time on that (the span scanner is 3.7 times as fast without it). In exchange, a kernel
    can neither allocate nor return an array (numba refuses to compile an allocation).
    """
    njit: Any = numba.njit  # its type leaves _nrt out
    return cast(F, njit(cache=True, nogil=True, boundscheck=True, _nrt=False)(function))
