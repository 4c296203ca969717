import errno
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.storage.disk import Disk
from betrace.service.storage.fallback_files import FallbackFiles, FallbackFull


def lines(*numbers):
    return [b'{"n": %d}' % number for number in numbers]


def read_all(files, max_lines=3, max_bytes=1 << 20):
    """Everything pending, consumed."""
    found = []
    while (chunk := files.read(max_lines, max_bytes)) is not None:
        found += chunk.lines
        files.consume(chunk)
    return found


def test_lines_come_back_in_order_and_their_files_go(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20, file_bytes=30)
    for number in range(10):
        files.append(lines(number))
    assert files.pending == 90
    assert files.statistics().files == 3
    assert read_all(files) == lines(*range(10))
    assert files.pending == 0
    assert list(tmp_path.iterdir()) == []
    stats = files.statistics()
    assert (stats.appended, stats.consumed, stats.files, stats.lines) == (10, 10, 0, 0)


def test_what_is_read_stays_until_it_is_consumed(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20)
    files.append(lines(1, 2, 3))
    first = files.read(2, 1 << 20)
    assert first.lines == lines(1, 2)
    assert files.read(2, 1 << 20).lines == lines(1, 2)
    files.consume(first)
    files.consume(first)  # a second time changes nothing
    assert files.read(2, 1 << 20).lines == lines(3)
    assert files.statistics().lines == 1
    assert files.names() == [("000001.jsonl", 9)]


def test_a_chunk_is_bounded_by_bytes_but_holds_one_line(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20)
    files.append([b'"' + b"x" * 1000 + b'"', b"1", b"2"])
    assert files.read(10, 100).lines == [b'"' + b"x" * 1000 + b'"']
    files.consume(files.read(10, 100))
    assert files.read(10, 100).lines == [b"1", b"2"]


def test_what_comes_while_reading_goes_behind(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20)
    files.append(lines(1))
    chunk = files.read(10, 1 << 20)
    files.append(lines(2))
    files.consume(chunk)
    assert read_all(files) == lines(2)


def test_pending_files_are_found_after_a_restart(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20, file_bytes=20)
    files.append(lines(1, 2, 3))
    files.append(lines(4))
    files.consume(files.read(1, 1 << 20))
    # no close: the process died
    again = FallbackFiles(tmp_path, 1 << 20)
    assert again.statistics().lines == 4  # what was consumed of a file comes again
    again.append(lines(5))
    assert read_all(again) == lines(1, 2, 3, 4, 5)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_end_is_cut_off_after_a_restart(tmp_path):
    (tmp_path / "000007.jsonl").write_bytes(b"1\n2\n" + b'{"n": ')
    (tmp_path / "000008.jsonl").write_bytes(b'{"torn')
    (tmp_path / "notes.jsonl").write_bytes(b"not ours\n")
    files = FallbackFiles(tmp_path, 1 << 20)
    assert files.statistics().damaged == 2
    files.append([b"3"])
    assert read_all(files) == [b"1", b"2", b"3"]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.jsonl"]


def test_full_files_refuse_and_take_nothing(tmp_path):
    files = FallbackFiles(tmp_path, 40, file_bytes=20)
    files.append(lines(1, 2))
    files.append(lines(3))
    with pytest.raises(FallbackFull, match=r"fallback\.max_bytes"):
        files.append(lines(4, 5))
    files.append(lines(6))
    files.consume(files.read(3, 1 << 20))  # the whole first file
    files.append(lines(7, 8))
    assert read_all(files) == lines(6, 7, 8)


class BadDisk:
    """A disk that fails at one call, after writing a part."""

    def __init__(self):
        self.failing = None
        self.disk = Disk(self.write, self.truncate, self.sync)

    def _fail(self, call):
        if self.failing == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, descriptor, buffers, offset):
        if self.failing == "write":
            os.pwritev(descriptor, [bytes(buffers[0])[:5]], offset)
        self._fail("write")
        return os.pwritev(descriptor, buffers, offset)

    def truncate(self, descriptor, size):
        if self.failing == "truncate":
            raise OSError(errno.EIO, "I/O error")
        os.ftruncate(descriptor, size)

    def sync(self, descriptor):
        self._fail("sync")
        if self.failing == "truncate":
            raise OSError(errno.EIO, "I/O error")
        os.fdatasync(descriptor)


@pytest.mark.parametrize("call", ["write", "sync"])
@pytest.mark.parametrize("before", [0, 1])
def test_after_a_failure_nothing_of_it_is_there(tmp_path, call, before):
    bad = BadDisk()
    files = FallbackFiles(tmp_path, 1 << 20, disk=bad.disk)
    if before:
        files.append(lines(1))
    bad.failing = call
    with pytest.raises(OSError, match="No space"):
        files.append(lines(2, 3))
    bad.failing = None
    files.append(lines(4))
    wanted = lines(*[1] * before, 4)
    again = FallbackFiles(tmp_path, 1 << 20)
    assert again.statistics().lines == len(wanted)
    assert read_all(files) == wanted


def test_a_file_that_cannot_even_be_cut_is_left_alone(tmp_path):
    bad = BadDisk()
    files = FallbackFiles(tmp_path, 1 << 20, disk=bad.disk)
    files.append(lines(1))
    bad.failing = "truncate"
    with pytest.raises(OSError, match="I/O"):
        files.append(lines(2))
    bad.failing = None
    files.append(lines(3))
    assert read_all(files) == lines(1, 3)


def test_a_line_that_is_set_aside_is_kept(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20)
    files.set_aside(b"what is this")
    files.set_aside(b"and this")
    assert (tmp_path / "damaged.txt").read_bytes() == b"what is this\nand this\n"
    assert files.statistics().damaged == 2


def test_a_file_cut_by_someone_else_does_not_stop_the_rest(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20, file_bytes=20)
    files.append(lines(1, 2, 3))
    files.append(lines(4))
    os.truncate(tmp_path / "000001.jsonl", 9)
    assert read_all(files) == lines(1, 4)


def test_threads_may_append_while_another_reads(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20, file_bytes=100)
    writers = [
        threading.Thread(target=lambda k=k: [files.append(lines(k * 100 + n)) for n in range(20)])
        for k in range(3)
    ]
    for writer in writers:
        writer.start()
    found = []
    while any(writer.is_alive() for writer in writers) or files.pending:
        found += read_all(files, 2)
    for k in range(3):
        assert [line for line in found if line in lines(*range(k * 100, k * 100 + 20))] == lines(
            *range(k * 100, k * 100 + 20)
        )
    assert list(tmp_path.iterdir()) == []


def test_closing_is_idempotent(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20)
    files.append(lines(1))
    files.close()
    files.close()
    files.append(lines(2))
    assert read_all(files) == lines(1, 2)


@given(
    st.lists(
        st.one_of(
            st.integers(1, 4).map(lambda n: ("append", n)),
            st.integers(1, 5).map(lambda n: ("read", n)),
            st.just(("restart", 0)),
        ),
        max_size=30,
    )
)
def test_nothing_is_lost_and_the_order_stays(tmp_path_factory, steps):
    directory = tmp_path_factory.mktemp("fallback")
    files = FallbackFiles(directory, 1 << 20, file_bytes=25)
    written, found = 0, []
    for step, number in steps:
        if step == "append":
            files.append(lines(*range(written, written + number)))
            written += number
        elif step == "read":
            chunk = files.read(number, 1 << 20)
            if chunk is not None:
                found += chunk.lines
                files.consume(chunk)
        else:
            files = FallbackFiles(directory, 1 << 20, file_bytes=25)
    found += read_all(files)
    first = dict.fromkeys(found)  # a restart may repeat, but not lose or reorder
    assert list(first) == lines(*range(written))
    assert list(directory.iterdir()) == []


def test_all_lines_can_be_looked_at_without_consuming_them(tmp_path):
    files = FallbackFiles(tmp_path, 1 << 20, file_bytes=30)
    for number in range(10):
        files.append(lines(number))
    files.consume(files.read(1, 1 << 20))
    assert [line for page in files.pages(2) for line in page] == lines(*range(1, 10))
    pages = files.pages(1)
    next(pages)
    read_all(files)  # and with them the files
    assert [line for page in pages for line in page] == lines(2, 3)  # of the file that was open
    files.close()
