"""Quotas that several edges share by demand."""

from __future__ import annotations

import random

import pytest
import trio

from betrace.service.cluster.edge.quota_exchange import (
    DIVIDE_SECONDS,
    FORGET_SECONDS,
    REPORT_SECONDS,
    DemandShares,
)
from betrace.service.tenancy.quotas import SpanQuotas
from tests.support.edges import edge_settings, post, running_edge
from tests.support.spans import S, body

RATE = 1000
REQUEST = 20  # spans


class Edges:
    """Edges whose reports arrive at once, with a clock of their own."""

    def __init__(self, number: int, burst_seconds: float = 10) -> None:
        self.now = 0.0
        self.quotas = [
            SpanQuotas(RATE, burst_seconds, clock=lambda: self.now) for _ in range(number)
        ]
        self.shares = [DemandShares(each, f"e{i}") for i, each in enumerate(self.quotas)]
        self.admitted: list[tuple[float, int]] = []
        self._reported = [0.0] * number
        for shares in self.shares:
            self._publish(shares)
        for shares in self.shares:
            shares.divide(0)

    def _publish(self, sender: DemandShares) -> None:
        for shares in self.shares:
            shares.receive(sender.report(), self.now)

    def send(self, edge: int, requests: int) -> None:
        for _ in range(requests):
            if self.quotas[edge].admit("t", REQUEST) is None:
                self.admitted.append((self.now, REQUEST))

    def advance(self, seconds: float) -> None:
        """Let time pass, in steps of DIVIDE_SECONDS; edges report at different times."""
        for _ in range(round(seconds / DIVIDE_SECONDS)):
            self.now += DIVIDE_SECONDS
            for number, shares in enumerate(self.shares):
                due = self.now - self._reported[number] >= REPORT_SECONDS + 0.01 * number
                if due:
                    shares.measure(self.now - self._reported[number])
                    self._reported[number] = self.now
                    self._publish(shares)
                if due or shares.changed:
                    shares.divide(self.now)

    def spans(self, start: float, end: float) -> int:
        return sum(spans for at, spans in self.admitted if start <= at < end)


def test_edges_admit_in_proportion_to_their_demand() -> None:
    edges = Edges(3)
    for _ in range(600):
        edges.send(0, 30)  # 6000 spans/s
        edges.send(1, 10)
        edges.advance(0.1)
    parts = [quotas._parts["t"] for quotas in edges.quotas]
    assert parts == pytest.approx([0.75, 0.25, 0.05 / 3], abs=0.01)
    assert edges.spans(40, 60) == pytest.approx(20 * RATE, rel=0.03)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [2, 3, 8])
def test_edges_exceed_a_quota_by_ten_percent_at_most(seed: int, number: int) -> None:
    """Demand far above the quota that moves between edges at random."""
    rng = random.Random(seed)
    edges = Edges(number)
    weights = [1.0] * number
    for step in range(600):
        if step % rng.choice([5, 20, 100]) == 0:
            weights = [rng.choice([0, 0, 1, 5]) for _ in range(number)]
            weights[rng.randrange(number)] = 5
        for edge, weight in enumerate(weights):
            edges.send(edge, round(4 * weight))
        edges.advance(0.1)
    # The first seconds may use the burst, as in a single process.
    assert edges.spans(0, 10) <= 1.1 * 20 * RATE
    for start in range(20, 50):
        assert edges.spans(start, start + 10) <= 1.1 * 10 * RATE


def test_demand_that_stays_within_the_quota_is_not_refused() -> None:
    edges = Edges(4)
    sent = 0
    for _ in range(300):
        edges.send(0, 3)  # 600 spans/s
        edges.send(1, 1)
        sent += 4 * REQUEST
        edges.advance(0.1)
    assert edges.spans(0, 100) == sent


def test_edges_that_are_gone_are_forgotten() -> None:
    edges = Edges(2)
    gone = edges.shares.pop()
    edges.advance(FORGET_SECONDS - 0.5)
    assert edges.shares[0].edges == 2
    edges.advance(2)
    assert edges.shares[0].edges == 1
    edges.send(0, 500)
    assert edges.spans(0, 100) == RATE * 10
    assert gone.edges == 2


def test_a_new_edge_admits_little_until_it_knows_the_others() -> None:
    quotas = SpanQuotas(RATE, 10, clock=lambda: 0.0)
    shares = DemandShares(quotas, "new")
    admitted = sum(quotas.admit("t", REQUEST) is None for _ in range(1000))
    assert admitted * REQUEST == RATE
    assert b'"hello":true' in shares.report(hello=True)


def test_a_report_that_cannot_be_read_is_ignored(caplog) -> None:
    shares = DemandShares(SpanQuotas(), "a")
    for data in (b"", b"{}", b"[]", b'{"edge": 1, "demand": 2, "hello": 3}'):
        assert not shares.receive(data, 0)
    assert shares.edges == 1
    assert "cannot be read" in caplog.text
    assert shares.receive(DemandShares(SpanQuotas(), "b").report(hello=True), 0)
    assert not shares.receive(shares.report(hello=True), 0)
    assert shares.edges == 2


def test_demand_counts_refused_requests() -> None:
    quotas = SpanQuotas(100, 1, {"free": 0}, clock=lambda: 0.0)
    assert quotas.take_demand() == {}
    quotas.divide({}, 1.0)
    quotas.admit("free", 10)
    assert quotas.admit("t", 150) is None
    quotas.settle("t", -20)
    assert quotas.admit("t", 30) is not None
    assert quotas.admit("t", 0) is not None
    assert quotas.take_demand() == {"t": 150 - 20 + 30 + 150}
    assert quotas.take_demand() == {}


async def test_edges_tell_each_other_their_demand(cluster, client, http, tmp_path):
    quota = {"spans_per_second": 1000, "burst_seconds": 1}
    first = edge_settings(cluster, tmp_path / "a", quotas=quota)
    second = edge_settings(cluster, tmp_path / "b", quotas=quota)
    async with running_edge(first) as (one, url, _), running_edge(second) as (two, _, _):
        shares = one._quotas._shares, two._quotas._shares
        with trio.fail_after(60):
            while [each.edges for each in shares] != [2, 2]:
                await trio.sleep(0.01)
            while two._quotas._shares._quotas._parts.get("default") != pytest.approx(0.025):
                assert (await post(http, url, body(S(1)))).status_code == 200
                await trio.sleep(0.05)
