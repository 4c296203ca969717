from hypothesis import given
from hypothesis import strategies as st

from betrace.service.receiver.shares import Shares


def test_a_single_tenant_may_take_all_but_the_reserve():
    shares = Shares(100, 0.9)
    while shares.admits("a", 10):
        shares.take("a", 10)
    assert shares.taken("a") == 90
    assert shares.admits("b", 10)
    shares.take("b", 10)
    assert not shares.admits("b", 1)
    assert not shares.admits("c", 1)


def test_above_half_a_tenant_with_more_than_an_equal_share_is_refused():
    shares = Shares(100, 0.9)
    shares.take("a", 48)
    assert shares.admits("a", 2)  # shares do not matter yet
    shares.take("b", 10)
    assert not shares.admits("a", 1)
    assert shares.admits("b", 10)
    assert not shares.admits("b", 36)


def test_the_caller_may_know_the_total_better():
    shares = Shares(100, 0.9)
    shares.take("a", 1)
    assert not shares.admits("a", 1, total=95)
    assert shares.admits("b", 1, total=95)
    assert not shares.admits("b", 6, total=95)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=60))
def test_everything_taken_fits_and_is_returned(steps):
    shares = Shares(100, 0.9)
    taken = []
    for tenant, amount in steps:
        if shares.admits(tenant, amount):
            shares.take(tenant, amount)
            taken.append((tenant, amount))
        assert shares.total == sum(amount for _, amount in taken) <= 100
    for tenant, amount in taken:
        shares.release(tenant, amount)
    assert (shares.total, len(shares)) == (0, 0)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=200))
def test_a_tenant_with_nothing_is_admitted_while_others_take_all_they_can(amounts):
    shares = Shares(1000, 0.9)
    for i, amount in enumerate(amounts * 20):
        if shares.admits(f"hog{i % 3}", amount):
            shares.take(f"hog{i % 3}", amount)
    assert shares.admits("quiet", 100)
