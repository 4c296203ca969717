"""The cache of open files keeps to its bound and never closes a file in use."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from betrace.service.storage.spanlog import open_files as openfiles
from betrace.service.storage.spanlog.open_files import OpenFiles, affordable, raise_limit


def make(directory: Path, count: int) -> list[Path]:
    paths = [directory / str(i) for i in range(count)]
    for path in paths:
        path.write_text(path.name)
    return paths


def test_the_least_recently_used_file_is_closed(tmp_path: Path) -> None:
    files = OpenFiles(2)
    a, b, c = make(tmp_path, 3)
    with files.use(a) as first:
        pass
    for path in (b, a, c):
        with files.use(path):
            pass
    assert len(files) == 2
    with files.use(a) as again:
        assert again == first
        assert os.pread(again, 9, 0) == b"0"
    files.close()


def test_a_file_in_use_stays_open(tmp_path: Path) -> None:
    files = OpenFiles(1)
    with ExitStack() as stack:
        descriptors = [stack.enter_context(files.use(path)) for path in make(tmp_path, 3)]
        assert [os.pread(d, 9, 0) for d in descriptors] == [b"0", b"1", b"2"]
        files.close()
        assert [os.pread(d, 9, 0) for d in descriptors] == [b"0", b"1", b"2"]
    assert len(files) == 0
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pread(descriptor, 1, 0)


def test_forgetting_closes(tmp_path: Path) -> None:
    files = OpenFiles(4)
    (path,) = make(tmp_path, 1)
    with files.use(path) as descriptor:
        pass
    files.forget(path)
    files.forget(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), OpenFiles(1).use(tmp_path / "none"):
        pass


@pytest.mark.parametrize(("soft", "kept"), [(4, 1), (1024, 128), (20_000, 1024), (-1, 1024)])
def test_an_eighth_of_the_limit_is_kept_open(
    monkeypatch: pytest.MonkeyPatch, soft: int, kept: int
) -> None:
    monkeypatch.setattr(openfiles.resource, "getrlimit", lambda _: (soft, -1))
    assert affordable() == kept


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ((1024, 20_000), (20_000, 20_000)),
        ((1024, -1), (65_536, -1)),
        ((1024, 1024), None),
        ((-1, -1), None),
        ((100_000, 200_000), None),
    ],
)
def test_the_soft_limit_is_raised_never_lowered(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: tuple[int, int] | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(openfiles.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(openfiles.resource, "setrlimit", lambda _, pair: asked.append(pair))
    raise_limit()
    assert asked == ([wanted] if wanted else [])


def test_a_system_that_refuses_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(openfiles.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(openfiles.resource, "setrlimit", refuse)
    raise_limit()
