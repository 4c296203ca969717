import pytest

from betrace.service.receiver.estimates import SpanEstimates
from betrace.service.receiver.heads import Head

QUIET = Head("quiet", "protobuf", "gzip", None)
NOISY = Head("noisy", "protobuf", "gzip", None)


@pytest.mark.parametrize(
    ("content_type", "encoding", "spans"),
    [("protobuf", "", 10), ("protobuf", "gzip", 70), ("json", "", 4), ("json", "zstd", 31)],
)
def test_the_first_guess_depends_on_type_and_encoding(content_type, encoding, spans):
    assert SpanEstimates().estimate(Head("a", content_type, encoding, None), 4000) == spans


def test_estimates_follow_what_bodies_contained():
    estimates = SpanEstimates()
    for _ in range(300):
        estimates.learn(NOISY, 500, 10)
    assert estimates.estimate(NOISY, 5000) == pytest.approx(100, abs=2)
    assert estimates.estimate(Head("noisy", "protobuf", "", None), 4000) == 10
    assert estimates.estimate(NOISY, 0) == 1


def test_estimates_of_one_tenant_do_not_follow_the_spans_of_another():
    estimates = SpanEstimates()
    before = estimates.estimate(QUIET, 5000)
    for _ in range(50):
        estimates.learn(NOISY, 43_000, 600_000)
    assert estimates.estimate(QUIET, 5000) == before < 100


def test_a_span_is_never_smaller_than_a_byte():
    estimates = SpanEstimates()
    for _ in range(300):
        estimates.learn(NOISY, 1, 1000)
    assert estimates.estimate(NOISY, 5000) == 5000


def test_the_estimates_kept_are_bounded(monkeypatch):
    monkeypatch.setattr("betrace.service.receiver.estimates._MOST_ESTIMATES", 3)
    estimates = SpanEstimates()
    for number in range(10):
        estimates.learn(Head(f"t{number}", "protobuf", "", None), 1, 1)
    assert len(estimates) == 3
