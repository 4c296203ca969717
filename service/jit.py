"""How numba kernels are compiled: without the GIL, bounds-checked, cached on disk.

Numba looks only at a kernel's own file to tell whether its cached code is current, but kernels of
other files are compiled into it. So the cache lies in a folder named by a digest of all of them.

``NUMBA_DISABLE_JIT=1`` turns every kernel into ordinary Python, which is how the
tests measure their coverage.
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


def kernel(function: F) -> F:
    """Compile ``function`` in nopython mode; it runs without the GIL and is cached on disk.

    Array accesses are bounds-checked: kernels read bytes from strangers, and a wrong
    index must raise :exc:`IndexError`, never read beyond an array.
    """
    return cast(F, numba.njit(cache=True, nogil=True, boundscheck=True)(function))


def lean_kernel(function: F) -> F:
    """A :func:`kernel` that leaves the reference counts of the arrays it is given alone.

    An ordinary kernel counts a reference to each array argument, atomically, whenever it is
    called, by another kernel too: small kernels that call each other spend most of their time
    on that (the span scanner is 3.7 times as fast without). The price: it can neither allocate
    nor return an array (numba refuses to compile an allocation). Both kinds may call each other.
    """
    njit: Any = numba.njit  # its type leaves _nrt out
    return cast(F, njit(cache=True, nogil=True, boundscheck=True, _nrt=False)(function))
