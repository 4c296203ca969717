import base64
import gzip
import json
import sqlite3

import pytest

from betrace.service.storage.dead_letters import (
    MAX_LIMIT,
    DeadLetterError,
    DeadLetterStore,
    NewLetter,
)


class Clock:
    def __init__(self):
        self.now = 1_700_000_000 * 10**9

    def __call__(self):
        self.now += 1
        return self.now


def letter(payload=b"x", stage="rule-evaluation", tenant="acme", **changes):
    values = {
        "kind": "due",
        "weight": 3,
        "error": "boom",
        "transient": False,
        "attempts": 4,
        "next_retry_ns": None,
    }
    return NewLetter(tenant=tenant, stage=stage, payload=payload, **values | changes)


@pytest.fixture
def opened(tmp_path):
    stores = []

    def open_store(max_bytes=1 << 20):
        store = DeadLetterStore(tmp_path / "d.sqlite", tmp_path / "exported", max_bytes, Clock())
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        store.close()


def test_a_letter_is_there_after_a_restart(opened):
    store = opened()
    assert store.add([letter(b"payload", next_retry_ns=7)]) == [True]
    store.close()
    again = opened()
    (found,) = again.page()
    assert (found.tenant, found.stage, found.kind, found.weight) == (
        "acme",
        "rule-evaluation",
        "due",
        3,
    )
    assert (found.error, found.transient, found.attempts, found.next_retry_ns) == (
        "boom",
        False,
        4,
        7,
    )
    assert again.get(found.id) == (found, b"payload")
    assert again.payload_bytes == 7
    assert again.counts()["rule-evaluation"].weight == 3


def test_the_same_item_is_kept_once_and_its_failures_add_up(opened):
    store = opened()
    assert store.add([letter(b"a"), letter(b"b"), letter(b"a", error="worse")]) == [
        True,
        True,
        False,
    ]
    first, second = store.page()
    assert (first.attempts, first.error, second.attempts) == (8, "worse", 4)
    assert first.last_failed_ns >= first.first_failed_ns
    assert store.payload_bytes == 2


def test_another_stage_or_tenant_or_kind_is_another_letter(opened):
    store = opened()
    letters = [letter(), letter(stage="projection"), letter(tenant="b"), letter(kind="decided")]
    assert store.add(letters) == [True] * 4


def test_pages_with_filters(opened):
    store = opened()
    store.add([letter(bytes([n]), tenant="ab"[n % 2]) for n in range(10)])
    store.add([letter(b"other", stage="projection")])
    seen, after = [], 0
    while page := store.page(tenant="b", limit=2, after=after):
        seen += [found.id for found in page]
        after = page[-1].id
    assert seen == [2, 4, 6, 8, 10]
    assert [found.id for found in store.page(stage="projection")] == [11]
    assert store.page(stage="projection", tenant="b") == []
    assert store.get(99) is None


def test_due_letters_come_earliest_first(opened):
    store = opened()
    store.add(
        [
            letter(b"late", next_retry_ns=30),
            letter(b"early", next_retry_ns=10),
            letter(b"never"),
            letter(b"middle", next_retry_ns=20),
            letter(b"elsewhere", stage="projection", next_retry_ns=5),
        ]
    )
    assert store.due("rule-evaluation", 25, 10) == [2, 4]
    assert store.due("rule-evaluation", 25, 1) == [2]
    assert store.due("rule-evaluation", 25, 10, [2]) == [4]
    assert store.due("rule-evaluation", 9, 10) == []
    many = list(range(100, 50_000))
    assert store.due("rule-evaluation", 25, 10, many) == [2, 4]


def test_retry_makes_letters_due(opened):
    store = opened()
    store.add([letter(b"a"), letter(b"b", tenant="b"), letter(b"c", stage="projection")])
    assert store.retry([1, 99]) == 1
    assert store.due("rule-evaluation", 2**62, 10) == [1]
    assert store.retry(tenant="b") == 1
    assert store.retry(stage="projection") == 1
    assert store.retry() == 3


def test_a_failure_of_a_retry_is_noted(opened):
    store = opened()
    store.add([letter()])
    assert store.failed_again(1, "again", transient=True, attempts=2, next_retry_ns=5)
    (found,) = store.page()
    assert (found.error, found.transient, found.attempts, found.next_retry_ns) == (
        "again",
        True,
        6,
        5,
    )
    assert not store.failed_again(2, "", transient=True, attempts=1, next_retry_ns=None)


def test_deleted_letters_are_gone_with_their_bytes(opened):
    store = opened()
    store.add([letter(b"aa"), letter(b"bbb", stage="projection"), letter(b"c")])
    assert store.delete([1, 2, 99]) == {"rule-evaluation": (1, 3), "projection": (1, 3)}
    assert [found.id for found in store.page()] == [3]
    assert store.payload_bytes == 1


def test_the_largest_page_says_whether_there_are_more(opened):
    store = opened(1 << 24)
    store.add([letter(str(n).encode()) for n in range(MAX_LIMIT + 5)])
    assert len(store.page(limit=MAX_LIMIT)) == MAX_LIMIT
    assert len(store.page(limit=MAX_LIMIT + 1)) == MAX_LIMIT + 1
    assert len(store.page(limit=10 * MAX_LIMIT)) == MAX_LIMIT + 1


def test_beyond_the_limit_the_oldest_are_exported_before_they_are_dropped(opened, tmp_path):
    store = opened(max_bytes=1000)
    for number in range(12):
        store.add([letter(bytes([number]) * 100)])
    assert store.payload_bytes <= 1000
    kept = {found.id for found in store.page()}
    exported = []
    for path in sorted((tmp_path / "exported").iterdir()):
        assert path.name.endswith(".jsonl.gz")
        with gzip.open(path) as file:
            exported += [json.loads(line) for line in file]
    assert {found["id"] for found in exported} | kept == set(range(1, 13))
    assert not {found["id"] for found in exported} & kept
    assert max(kept) == 12
    for found in exported:
        assert base64.b64decode(found["payload"]) == bytes([found["id"] - 1]) * 100
        assert found["error"] == "boom"
    assert store.exported == len(exported) == len(store.take_exported())
    assert store.take_exported() == []


def test_a_letter_larger_than_the_limit_is_kept_alone(opened):
    store = opened(max_bytes=1000)
    store.add([letter(b"small")])
    store.add([letter(b"x" * 5000)])
    (found,) = store.page()
    assert found.bytes == 5000


def test_when_letters_cannot_be_exported_none_is_dropped_and_none_is_added(opened, tmp_path):
    (tmp_path / "exported").write_text("in the way")
    store = opened(max_bytes=1000)
    store.add([letter(b"a" * 900)])
    with pytest.raises(DeadLetterError, match="check the disk"):
        store.add([letter(b"b" * 900)])
    (found,) = store.page()
    assert found.bytes == 900
    (tmp_path / "exported").unlink()
    assert store.add([letter(b"b" * 900)]) == [True]
    assert store.payload_bytes == 900


def test_adding_is_all_or_nothing(opened):
    store = opened()
    with pytest.raises(DeadLetterError):
        store.add([letter(b"good"), letter(b"bad", weight="a lot")])
    assert store.page() == []
    assert store.payload_bytes == 0


def test_a_file_of_a_newer_program_is_refused(opened, tmp_path):
    opened().close()
    with sqlite3.connect(tmp_path / "d.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(DeadLetterError, match="newer program"):
        opened()


def test_a_closed_store_says_so(opened):
    store = opened()
    store.close()
    store.close()
    with pytest.raises(DeadLetterError):
        store.add([letter()])


@pytest.mark.parametrize("keep", [0, 5000])
def test_a_damaged_file_is_reported_with_its_path_and_the_remedy(opened, tmp_path, keep):
    path = tmp_path / "d.sqlite"
    store = opened()
    store.add([letter(bytes([n]) * 1000) for n in range(20)])
    store.close()
    data = path.read_bytes()
    path.write_bytes(data[:keep] + b"?" * (len(data) - keep))

    def use():
        store = opened()
        try:
            store.page()
        finally:
            store.close()

    with pytest.raises(DeadLetterError, match=r"d\.sqlite: .*: the file is damaged; restore it"):
        use()
