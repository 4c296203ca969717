"""Times and durations as text."""

import datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from betrace.service.times import MAX_NS, read_duration, read_time, write_time

NOW = 1_700_000_000_000_000_000


def outcome(reader, text):
    """What a reader returns, or the text of its error."""
    try:
        return reader(text)
    except ValueError as error:
        return str(error)


@given(st.integers(0, MAX_NS))
@example(0)
@example(MAX_NS)
def test_a_written_time_reads_back(ns):
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
        ("1970-01-01T02:00:00 02:00", 0),  # an unescaped +
        ("1969-12-31T22:30:00-01:30", 0),
        ("2024-02-29T00:00:00Z", 1_709_164_800_000_000_000),
        ("123", 123),
        ("now", NOW),
        ("-1h", NOW - 3_600_000_000_000),
        ("-1.5s", NOW - 1_500_000_000),
        ("-36500d", 0),
    ],
)
def test_accepted_forms_of_a_time(text, ns):
    assert read_time(text, lambda: NOW) == ns


INVALID_TIMES = """
x 2024-13-01T00:00:00Z 2023-02-29T00:00:00Z 2024-01-01 2024-01-01T00:00:00 1969-12-31T23:59:59Z
9999-01-01T00:00:00Z - -1 -1y 1e3 ² ٣ 9999999999999999999 99999999999999999999999999
2024-01-01T00:00:00.0000000001Z 2024-01-01T00:00:00+2:00
"""


@pytest.mark.parametrize("text", ["", *INVALID_TIMES.split()])
def test_invalid_times(text):
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
def test_invalid_durations(text):
    with pytest.raises(ValueError, match=r"^must be "):
        read_duration(text)
