"""How numba kernels are compiled: without the GIL, bounds-checked, cached on disk.

Numba checks only a kernel's own file to decide whether its cached code is current, but kernels of
other files are compiled into it. The name of the cache folder is therefore a digest of all of them:
kernels must be in the folders ``otlp``, ``rules`` and ``traces``.

``NUMBA_DISABLE_JIT=1`` turns every kernel into ordinary Python; the tests measure their coverage
that way.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import config, types

F = TypeVar("F", bound=Callable[..., Any])


def _cache_directory() -> Path:
    """Next to this package, or, if that is read-only, in the user's cache folder."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for folder in ("otlp", "rules", "traces"):
        for source in sorted((package / folder).glob("*.py")):
            digest.update(source.read_bytes())
    base = package / "__pycache__"
    if not os.access(base if base.exists() else package, os.W_OK):
        base = _user_cache()
    return base / f"kernels-{digest.hexdigest()[:16]}"


def _user_cache() -> Path:
    """``$XDG_CACHE_HOME/betrace`` or ``~/.cache/betrace``, made with mode 0700.

    Cached kernels are code that this process runs. If another user owns the folder or can write to
    it, or if it cannot be made, a fresh private folder is used instead, and removed at exit.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        parent = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
        path = parent / "betrace"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        private = found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o022
        if stat.S_ISDIR(found.st_mode) and private and os.access(path, os.W_OK | os.X_OK):
            return path
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        pass
    fresh = Path(tempfile.mkdtemp(prefix="betrace-kernels-"))
    atexit.register(shutil.rmtree, fresh, ignore_errors=True)
    return fresh


_settings: Any = config
if not _settings.CACHE_DIR:  # NUMBA_CACHE_DIR is not set
    _settings.CACHE_DIR = str(_cache_directory())

kernels: set[str] = set()
"""The names of all kernels of the modules that are imported."""


def cache_directory() -> Path:
    """Where compiled kernels are cached."""
    return Path(_settings.CACHE_DIR)


def is_enabled() -> bool:
    """Whether kernels are compiled at all."""
    return not _settings.DISABLE_JIT


def lean_kernel(function: F) -> F:
    """Compile ``function`` in nopython mode; it runs without the GIL and is cached on disk.

    Array accesses are bounds-checked, because kernels read untrusted bytes: a wrong index must
    raise :exc:`IndexError` and never read beyond an array.

    References to array arguments are not counted. Numba counts one for each array argument,
    atomically, at every call, even between kernels: small kernels that call each other spend most
    of their time on that (the span scanner is 3.7 times as fast without it). In exchange, a kernel
    can neither allocate nor return an array (numba refuses to compile an allocation).
    """
    kernels.add(f"{function.__module__}.{function.__qualname__}")
    njit: Any = numba.njit  # its type leaves _nrt out
    return cast(F, njit(cache=True, nogil=True, boundscheck=True, _nrt=False)(function))


def general_kernel(function: F) -> F:
    """As :func:`lean_kernel`, but compiled once for all constants that kernels pass to it.

    Numba compiles a function again for each combination of constant integers in calls to it. For
    the kernels that read JSON and protobuf this made nothing faster and the first start a third
    slower; the kernels that fold and decide are 7 to 10 % slower without it.
    """
    kernel: Any = lean_kernel(function)
    if hasattr(kernel, "get_call_template"):  # it is an ordinary function with NUMBA_DISABLE_JIT=1
        template = kernel.get_call_template
        unliteral: Any = types.unliteral

        def for_all_constants(args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
            general = {name: unliteral(each) for name, each in kws.items()}
            return template(tuple(unliteral(each) for each in args), general)

        kernel.get_call_template = for_all_constants
    return cast(F, kernel)
