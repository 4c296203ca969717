"""The log knows under which rules each frame was appended, whatever happens to its files."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.service.storage.disk import Buffer, Disk
from betrace.service.storage.spanlog.errors import LogWriteError
from betrace.service.storage.spanlog.frames import Frame, unpack_position
from betrace.service.storage.spanlog.log import LogSyncError, SpanLog
from betrace.service.storage.spanlog.rule_markers import NAME, LoggedRules
from tests.support.examples import examples

DAY = 86_400 * 10**9
A, B = (LoggedRules(name, name.encode() * 100) for name in "ab")


def frame(size: int = 10, day: int = 20_000) -> Frame:
    return Frame("protobuf", "", day * DAY, b"x" * size, 1)


def append(log: SpanLog, rules: LoggedRules | None, count: int = 1, size: int = 10) -> list[int]:
    return log.append("shop", [frame(size)] * count, rules)


def found(log: SpanLog, positions: Sequence[int]) -> str:
    """The versions at positions; those of the definitions must agree."""
    text = ""
    for position in positions:
        rules = log.rules_at("shop", position)
        assert log.rules_version_at("shop", position) == (rules and rules.version)
        assert rules in (A, B, None)
        text += rules.version if rules else "-"
    return text


def rules_file(directory: Path) -> Path:
    return directory / "shop/log" / NAME


def test_frames_keep_the_rules_they_were_appended_under(tmp_path: Path) -> None:
    with SpanLog(tmp_path) as log:
        assert log.rules_at("shop", 5) is None
        positions = append(log, None) + append(log, A, 2) + append(log, B) + append(log, A)
        assert found(log, positions) == "-aaba"
        assert log.rules_at("other", positions[-1]) is None
    with SpanLog(tmp_path) as log:
        assert found(log, positions) == "-aaba"
        positions += append(log, None)
        assert found(log, positions) == "-aabaa"
    with SpanLog(tmp_path, read_only=True) as log:
        assert found(log, positions) == "-aabaa"


def test_a_marker_is_written_only_when_rules_change(tmp_path: Path) -> None:
    sizes = []
    for rules in (A, A, B, B, A):
        with SpanLog(tmp_path) as log:
            append(log, rules, 3)
            append(log, rules)
        sizes.append(rules_file(tmp_path).stat().st_size)
    assert [size // sizes[0] for size in sizes] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("cut", [1, 30, 70])
def test_a_marker_that_a_crash_cut_off_is_written_again(tmp_path: Path, cut: int) -> None:
    with SpanLog(tmp_path) as log:
        positions = append(log, A)
        append(log, B)
    (segment,) = (tmp_path / "shop/log").rglob("*.seg")
    os.truncate(segment, segment.stat().st_size - frame().stored_bytes)
    os.truncate(rules_file(tmp_path), rules_file(tmp_path).stat().st_size - cut)
    with SpanLog(tmp_path) as log:
        positions += append(log, B) + append(log, A)
        assert found(log, positions) == "aba"
    with SpanLog(tmp_path) as log:
        assert found(log, positions) == "aba"


def test_a_damaged_marker_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with SpanLog(tmp_path) as log:
        positions = append(log, A) + append(log, B) + append(log, A)
    data = bytearray(rules_file(tmp_path).read_bytes())
    data[len(data) // 2] ^= 1
    rules_file(tmp_path).write_bytes(data)
    with SpanLog(tmp_path) as log:
        assert found(log, positions) == "aaa"
        assert found(log, append(log, B)) == "b"
    assert "are damaged" in caplog.text
    caplog.clear()
    rules_file(tmp_path).write_bytes(bytes(data[:-1]) + b"?")
    with SpanLog(tmp_path) as log:
        log.rules_at("shop", 1)
    assert "are damaged" in caplog.text


def test_markers_of_a_lost_end_do_not_apply_to_new_frames(tmp_path: Path) -> None:
    """As after the restoration of a backup, into which later markers were copied than frames."""
    with SpanLog(tmp_path) as log:
        positions = append(log, A)
        append(log, B, 3)
        append(log, A, 3)
        append(log, B, 3)
    (segment,) = (tmp_path / "shop/log").rglob("*.seg")
    os.truncate(segment, unpack_position(positions[0])[1] + frame().stored_bytes)
    with SpanLog(tmp_path) as log:
        positions += append(log, A, 20)
        assert found(log, positions) == "a" * 21
    with SpanLog(tmp_path) as log:
        assert found(log, positions) == "a" * 21


def test_markers_are_released_with_the_frames_that_need_them(tmp_path: Path) -> None:
    with SpanLog(tmp_path, segment_bytes=4096) as log:
        positions = append(log, A, size=3000) + append(log, B, size=3000)
        positions += append(log, B, size=3000) + append(log, A, size=3000)
        before = rules_file(tmp_path).stat().st_size
        log.release("shop", [1, 2])
        assert found(log, positions[2:]) == "ba"
        assert rules_file(tmp_path).stat().st_size < before
        positions += append(log, A, size=3000) + append(log, B, size=3000)
        log.release("shop", [3, 4, 5])
    with SpanLog(tmp_path) as log:
        assert found(log, positions[-1:]) == "b"
        log.delete_tenant("shop")
        assert found(log, append(log, A)) == "a"


def test_a_refused_append_leaves_no_marker_that_matters(tmp_path: Path) -> None:
    room = [10**6]

    def write(descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "full")
        written = os.pwritev(descriptor, [bytes(buffers[0])[: room[0]]], offset)
        room[0] -= written
        return written

    with SpanLog(tmp_path, disk=Disk(write=write)) as log:
        positions = append(log, A)
        for left in (0, 20, 80, 130):  # within the marker, within the frame
            room[0] = left
            with pytest.raises(LogWriteError):
                append(log, B, size=1000)
        room[0] = 10**6
        positions += append(log, A) + append(log, B)
        assert found(log, positions) == "aab"
    with SpanLog(tmp_path) as log:
        assert found(log, positions) == "aab"


def test_markers_are_synced_and_written_again_if_that_fails(tmp_path: Path) -> None:
    failing = [False]
    synced = set()

    def sync(descriptor: int) -> None:
        if failing[0]:
            raise OSError(errno.EIO, "lost")
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    with SpanLog(tmp_path, disk=Disk(sync=sync)) as log:
        append(log, A)
        log.sync()
        assert str(rules_file(tmp_path)) in synced
        append(log, B)
        failing[0] = True
        with pytest.raises(LogSyncError):
            log.sync()
        failing[0] = False
        size = rules_file(tmp_path).stat().st_size
        positions = append(log, B) + append(log, B)
        assert rules_file(tmp_path).stat().st_size > size
        assert found(log, positions) == "bb"


def test_a_version_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with SpanLog(tmp_path) as log, pytest.raises(ValueError, match="32 bytes"):
        append(log, LoggedRules("x" * 33, b"[]"))


STEPS = st.lists(
    st.one_of(
        st.sampled_from("aabbab"),  # append under these rules
        st.sampled_from(["open", "cut frames", "cut marker", "release"]),
    ),
    max_size=25,
)


@given(STEPS)
@settings(max_examples=examples(60), deadline=None)
def test_any_sequence_of_changes_crashes_and_releases(steps: list[str]) -> None:
    """The model is the list of frames with the rules they were appended under."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        model: list[tuple[int, str]] = []
        log = SpanLog(directory, segment_bytes=4096)
        for step in steps:
            if len(step) == 1:
                positions = log.append("shop", [frame(900)] * 2, {"a": A, "b": B}[step])
                model += [(position, step) for position in positions]
                continue
            if step == "release" and model:
                segments = [segment.number for segment in log.segments("shop")][:-1]
                log.release("shop", segments)
                model = [each for each in model if each[0] >> 32 not in segments]
            elif step != "release":
                log.close()
                if step != "open" and model:
                    _lose_the_last_append(directory, model, marker=step == "cut marker")
                log = SpanLog(directory, segment_bytes=4096)
            assert found(log, [position for position, _ in model]) == "".join(
                version for _, version in model
            )
        log.close()


def _lose_the_last_append(directory: Path, model: list[tuple[int, str]], marker: bool) -> None:
    """As if the process had died before the frame was written, or, with ``marker``, while the
    marker was, if there was one."""
    position, version = model.pop()
    segment, offset = unpack_position(position)
    with suppress(FileNotFoundError):
        (path,) = (directory / "shop/log").rglob(f"{segment:08d}.seg")
        os.truncate(path, offset)
    fresh = not model or model[-1][1] != version
    if marker and fresh and rules_file(directory).exists():
        os.truncate(rules_file(directory), rules_file(directory).stat().st_size - 1)
