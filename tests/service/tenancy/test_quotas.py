import pytest

from betrace.service.tenancy.quotas import SpanQuotas


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_without_quota_nothing_is_limited_or_remembered():
    quotas = SpanQuotas()
    assert quotas.admit("a", 10**9) is None
    assert quotas.admit("a", 10**9) is None


def test_a_debt_is_paid_at_the_rate_of_the_tenant():
    clock = Clock()
    quotas = SpanQuotas(100, 10, {"rich": 1000, "free": 0}, clock=clock)
    assert quotas.admit("a", 1200) is None  # more than the burst of 1000: passes once
    assert quotas.admit("a", 1) == pytest.approx(2.0)
    assert quotas.admit("b", 1) is None
    assert quotas.admit("free", 10**9) is None
    assert quotas.admit("free", 1) is None
    clock.now = 1.0
    assert quotas.admit("a", 0) == pytest.approx(1.0)
    clock.now = 2.5
    assert quotas.admit("a", 0) is None
    assert quotas.admit("rich", 20_000) is None
    assert quotas.admit("rich", 1) == pytest.approx(10.0)


def test_a_bucket_never_holds_more_than_its_burst():
    clock = Clock()
    quotas = SpanQuotas(10, 1, clock=clock)
    quotas.admit("a", 1)
    clock.now = 1000.0
    assert quotas.admit("a", 10) is None
    assert quotas.admit("a", 0) == 0.0


def test_an_estimate_is_corrected():
    clock = Clock()
    quotas = SpanQuotas(10, 1, clock=clock)
    quotas.admit("a", 30)
    quotas.settle("a", -25)
    assert quotas.admit("a", 0) is None
    quotas.settle("a", 10)
    assert quotas.admit("a", 0) == pytest.approx(0.5)
    quotas.settle("unseen", 0)
    assert SpanQuotas().settle("a", 5) is None


def test_the_least_recently_used_bucket_is_dropped():
    quotas = SpanQuotas(10, 1, tracked=2, clock=Clock())
    for tenant in ("a", "b", "a", "c"):
        quotas.admit(tenant, 5 if tenant == "a" else 20)
    assert quotas.admit("c", 0) is not None
    assert quotas.admit("b", 0) is None  # forgotten, and with it its debt
    assert quotas.admit("a", 0) == 0.0


def test_quotas_can_change():
    quotas = SpanQuotas(clock=Clock())
    quotas.configure(10, 1, {})
    quotas.admit("a", 20)
    assert quotas.admit("a", 0) == pytest.approx(1.0)
    quotas.configure(20, 1, {})
    assert quotas.admit("a", 0) == pytest.approx(0.5)
