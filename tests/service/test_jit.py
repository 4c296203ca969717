"""Where compiled kernels are cached, and that nobody else can plant code there."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from betrace.service import jit


def test_kernels_are_cached_next_to_the_package_if_it_is_writable() -> None:
    assert jit._cache_directory().parent == Path(jit.__file__).parent / "__pycache__"


@pytest.fixture
def read_only(monkeypatch: Any) -> None:
    """As if the package could not be written."""
    package = Path(jit.__file__).parent
    real = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: not Path(path).is_relative_to(package) and real(path, mode),
    )


@pytest.fixture
def removed_at_exit(monkeypatch: Any) -> list[Path]:
    registered: list[Path] = []
    monkeypatch.setattr(
        jit.atexit, "register", lambda _, path, ignore_errors: registered.append(path)
    )
    return registered


def private(path: Path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) == 0o700 and path.stat().st_uid == os.geteuid()


@pytest.mark.usefixtures("read_only")
def test_otherwise_in_the_users_cache(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = jit._cache_directory()
    assert folder.parent == tmp_path / "cache" / "betrace"
    assert private(folder.parent)
    assert jit._cache_directory() == folder  # a second start finds the kernels
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert jit._cache_directory().parent == tmp_path / "home" / ".cache" / "betrace"


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize("planted", ["writable", "link", "file", "foreign", "nowhere"])
def test_a_cache_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: Any, removed_at_exit: list[Path], planted: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "betrace"
    if planted == "writable":
        path.mkdir()
        path.chmod(0o777)
    elif planted == "link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    elif planted == "file":
        path.write_text("")
    elif planted == "foreign":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    folder = jit._cache_directory().parent
    assert folder != path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert removed_at_exit == [folder]
    folder.rmdir()


@pytest.mark.usefixtures("read_only")
def test_without_a_home_directory(monkeypatch: Any, removed_at_exit: list[Path]) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    folder = jit._cache_directory().parent
    assert removed_at_exit == [folder]
    folder.rmdir()
