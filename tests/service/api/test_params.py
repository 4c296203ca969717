import pytest

from betrace.service.api.errors import ApiError
from betrace.service.api.params import (
    LIMIT,
    SINCE,
    read_bool,
    read_choice,
    read_hex,
    read_integer,
    read_params,
    read_text,
)


def test_readers_accept_valid_and_reject_invalid_text():
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
        ([("zzzz", "5")], "unknown parameter 'zzzz'", "use one of: limit, since"),
        ([("limit", "5"), ("limit", "6")], "limit is given twice", "once"),
        ([("limit", "0")], "limit is '0'", "limit must be an integer from 1 to 1000"),
        ([("since", "x")], "since is 'x'", "since must be a time such as 2025-"),
    ],
)
def test_invalid_parameters_are_explained(given_pairs, message, hint):
    with pytest.raises(ApiError) as caught:
        read_params((LIMIT, SINCE), given_pairs)
    assert caught.value.status == 400
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_defaults():
    assert read_params((LIMIT, SINCE), []) == {"limit": 100, "since": None}
