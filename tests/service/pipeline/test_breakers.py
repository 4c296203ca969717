import pytest
import trio

from betrace.channels import BreakerOpen, BreakerState
from betrace.service.config.settings import Settings
from betrace.service.pipeline import breakers
from betrace.service.pipeline.breakers import Breakers, PoisonError


@pytest.fixture
def all_three():
    return Breakers(Settings().breakers)


@pytest.mark.parametrize(
    ("action", "state"),
    [
        ("trip", BreakerState.OPEN),
        ("force-open", BreakerState.FORCED_OPEN),
        ("disable", BreakerState.DISABLED),
        ("reset", BreakerState.CLOSED),
    ],
)
async def test_actions(all_three, action, state):
    assert action in breakers.ACTIONS
    all_three.act("ledger", action)
    assert all_three["ledger"].state is state
    assert all_three["duckdb"].state is BreakerState.CLOSED
    wanted = "ok" if state is BreakerState.CLOSED else "degraded"
    assert breakers.status(all_three["ledger"]) == wanted


def test_other_actions_do_not_exist(all_three):
    assert [breaker.name for breaker in all_three] == list(breakers.NAMES)
    with pytest.raises(KeyError):
        all_three.act("disk", "trip")


async def fail(error):
    raise error


async def test_calls_by_kind(all_three, autojump_clock):
    ledger = all_three.ledger
    await ledger.call(trio.sleep, 0)
    await ledger.call(trio.sleep, 3)
    with pytest.raises(ValueError, match="x"):
        await ledger.call(fail, ValueError("x"))
    with pytest.raises(PoisonError):
        await ledger.call(fail, PoisonError("x"))
    with pytest.raises(Exception, match="no answer in 5 s"):
        await ledger.call(trio.sleep, 9)
    with trio.move_on_after(1):
        await ledger.call(trio.sleep, 2)
    ledger.trip()
    with pytest.raises(BreakerOpen):
        await ledger.call(trio.sleep, 0)
    assert breakers.calls(ledger) == {
        "successful": 3,
        "failed": 1,
        "timed_out": 1,
        "slow": 2,
        "not_permitted": 1,
        "cancelled": 1,
    }


async def test_a_breaker_as_json(all_three, autojump_clock):
    all_three.act("duckdb", "trip")
    await trio.sleep(5)
    shown = breakers.shown(all_three["duckdb"], lambda at: at + 100)
    assert shown["state"] == "open"
    assert shown["retryInSeconds"] == 10
    assert shown["settings"]["minimumCalls"] == 50
    (transition,) = shown["transitions"]
    assert (transition["before"], transition["after"]) == ("closed", "open")
    assert transition["at"] == shown["since"] == pytest.approx(trio.current_time() + 95)
    all_three.act("duckdb", "force-open")
    assert breakers.shown(all_three["duckdb"], lambda at: at)["retryInSeconds"] is None


def test_the_breakers_follow_the_settings():
    evaluation, ledger, duckdb = Breakers(Settings().breakers)
    assert evaluation.settings.timeout == 10
    assert (evaluation.settings.minimum_calls, evaluation.settings.open_for) == (100, 30)
    for storage in (ledger, duckdb):
        limits = storage.settings
        assert (limits.timeout, limits.minimum_calls, limits.open_for) == (5, 50, 15)
        assert limits.failure_rate == 0.5
