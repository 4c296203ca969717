import datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from betrace.service.api.params import (
    LIMIT,
    MAX_NS,
    SINCE,
    read_bool,
    read_choice,
    read_duration,
    read_hex,
    read_integer,
    read_params,
    read_text,
    read_time,
    write_time,
)
from betrace.service.receiver.responses import ApiError

NOW = 1_700_000_000_000_000_000


def outcome(reader, text):
    """What a reader gives, or the text of its error."""
    try:
        return reader(text)
    except ValueError as error:
        return str(error)


@given(st.integers(0, MAX_NS))
@example(0)
@example(MAX_NS)
def test_times_survive_writing_and_reading(ns):
    text = write_time(ns)
    assert read_time(text) == ns
    assert len(text) == 30
    assert text.endswith("Z")


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1970-01-01t00:00:01.000000001z", 1_000_000_001),
        ("1970-01-01T02:00:00+02:00", 0),
        ("1970-01-01T02:00:00 02:00", 0),  # a + that was not escaped
        ("1969-12-31T22:30:00-01:30", 0),
        ("2024-02-29T00:00:00Z", 1_709_164_800_000_000_000),
        ("123", 123),
        ("now", NOW),
        ("-1h", NOW - 3_600_000_000_000),
        ("-1.5s", NOW - 1_500_000_000),
        ("-36500d", 0),
    ],
)
def test_ways_to_write_a_time(text, ns):
    assert read_time(text, lambda: NOW) == ns


NO_TIMES = """
x 2024-13-01T00:00:00Z 2023-02-29T00:00:00Z 2024-01-01 2024-01-01T00:00:00 1969-12-31T23:59:59Z
9999-01-01T00:00:00Z - -1 -1y 1e3 ² ٣ 9999999999999999999 99999999999999999999999999
2024-01-01T00:00:00.0000000001Z 2024-01-01T00:00:00+2:00
"""


@pytest.mark.parametrize("text", ["", *NO_TIMES.split()])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match=r"^must be "):
        read_time(text, lambda: NOW)


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_a_clear_error(text):
    result = outcome(read_time, text)
    assert result.startswith("must be ") if isinstance(result, str) else 0 <= result <= MAX_NS


@given(st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(2200, 1, 1)))
def test_times_agree_with_the_standard_library(moment):
    moment = moment.replace(tzinfo=datetime.UTC)
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    assert read_time(moment.isoformat()) == since // datetime.timedelta(microseconds=1) * 1000


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("5ns", 5),
        ("1us", 1000),
        ("250ms", 250_000_000),
        ("1.5s", 1_500_000_000),
        ("2m", 120 * 10**9),
        ("1h", 3600 * 10**9),
        ("7d", 7 * 86_400 * 10**9),
        ("0.1ns", 0),
    ],
)
def test_durations(text, ns):
    assert read_duration(text) == ns


@pytest.mark.parametrize("text", ["", "5", "s", "-5s", "5 s", "1e3s", ".5s", "999999999999d", "٣s"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match=r"^must be "):
        read_duration(text)


def test_other_readers():
    assert read_integer(1, 10)("10") == 10
    assert read_bool("true") is True
    assert read_bool("false") is False
    assert read_choice("a", "b")("b") == "b"
    assert read_hex(4)("00Ab") == "00ab"
    assert read_text("é") == "é"
    for reader, bad in [
        (read_integer(1, 10), "0"),
        (read_integer(1, 10), "11"),
        (read_integer(1, 10), "-1"),
        (read_integer(1, 10), "²"),
        (read_bool, "True"),
        (read_choice("a"), "A"),
        (read_hex(4), "00a"),
        (read_hex(4), "00ag"),
        (read_text, ""),
        (read_text, "x" * 1001),
    ]:
        with pytest.raises(ValueError, match=r"^must "):
            reader(bad)


@pytest.mark.parametrize(
    ("given_pairs", "message", "hint"),
    [
        ([("limt", "5")], "unknown parameter 'limt'", "did you mean limit?"),
        ([("zzzz", "5")], "unknown parameter 'zzzz'", "known are: limit, since"),
        ([("limit", "5"), ("limit", "6")], "limit is given twice", "once"),
        ([("limit", "0")], "limit is '0'", "limit must be an integer from 1 to 1000"),
        ([("since", "x")], "since is 'x'", "since must be a time, such as 2025-"),
    ],
)
def test_bad_parameters_are_explained(given_pairs, message, hint):
    with pytest.raises(ApiError) as caught:
        read_params((LIMIT, SINCE), given_pairs)
    assert caught.value.status == 400
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_defaults():
    assert read_params((LIMIT, SINCE), []) == {"limit": 100, "since": None}
