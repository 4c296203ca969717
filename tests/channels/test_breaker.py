"""The circuit breaker: by example in virtual time, and against a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from betrace.channels import (
    Breaker,
    BreakerOpen,
    BreakerOptions,
    BreakerState,
    BreakerTimeout,
    Transition,
)
from tests.support.examples import examples

SETTINGS = BreakerOptions(
    window=6, minimum_calls=4, failure_rate=0.5, open_for=15.0, trial_calls=3, timeout=5.0
)


class DownError(Exception):
    pass


class RefusedError(Exception):
    """The caller's fault."""


def make(**options: Any) -> Breaker:
    options.setdefault("is_failure", lambda error: not isinstance(error, RefusedError))
    return Breaker("db", options.pop("settings", SETTINGS), **options)


async def answer(seconds: float = 0.0, error: Exception | None = None) -> str:
    await trio.sleep(seconds)
    if error is not None:
        raise error
    return "answer"


async def succeed(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        assert await breaker.call(answer) == "answer"


async def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(DownError):
            await breaker.call(answer, 0.0, DownError())


async def test_opens_at_the_threshold_after_enough_calls(
    autojump_clock: MockClock,
) -> None:
    transitions: list[Transition] = []
    breaker = make(on_transition=transitions.append)
    await fail(breaker, 2)
    await succeed(breaker)
    before = breaker.snapshot()
    assert (before.state, before.failure_rate, before.window_calls) == ("closed", None, 3)
    await succeed(breaker)  # 2 of 4: exactly the threshold
    assert breaker.state is BreakerState.OPEN
    reason = "2 of 4 calls failed (50%, threshold 50%)"
    assert transitions == [Transition(0.0, BreakerState.CLOSED, BreakerState.OPEN, reason)]
    assert breaker.snapshot().transitions == tuple(transitions)


async def test_stays_closed_below_the_threshold_and_forgets_old_calls(
    autojump_clock: MockClock,
) -> None:
    breaker = make()
    await fail(breaker)
    await succeed(breaker, 5)
    await fail(breaker, 2)  # the first failure has left the window of 6
    now = breaker.snapshot()
    assert (now.state, now.failure_rate, now.window_calls) == ("closed", 2 / 6, 6)
    await fail(breaker)
    assert breaker.state is BreakerState.OPEN


async def test_refuses_while_open_and_then_permits_trials(autojump_clock: MockClock) -> None:
    breaker = make()
    await fail(breaker, 4)
    await trio.sleep(5.0)
    with pytest.raises(BreakerOpen, match="circuit breaker db is open") as refused:
        await breaker.call(answer)
    assert (refused.value.name, refused.value.state, refused.value.retry_in) == ("db", "open", 10.0)
    assert breaker.snapshot().retry_in == 10.0
    await trio.sleep(10.0)
    waiting = breaker.snapshot()
    assert (waiting.state, waiting.retry_in) == ("open", 0.0)  # until the next call
    await succeed(breaker)
    trying = breaker.snapshot()
    assert (trying.state, trying.trials_left, trying.window_calls) == ("half_open", 2, 1)
    await succeed(breaker, 2)
    after = breaker.snapshot()
    assert (after.state, after.window_calls, after.since) == ("closed", 0, 15.0)
    assert [(t.before, t.after) for t in after.transitions] == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
    ]
    assert (after.permitted, after.not_permitted, after.succeeded, after.failed) == (7, 1, 3, 4)


async def test_half_open_permits_only_the_trials_and_decides_on_all_of_them(
    autojump_clock: MockClock,
) -> None:
    breaker = make()
    breaker.trip()
    await trio.sleep(15.0)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(breaker.call, answer, 1.0)
        await wait_all_tasks_blocked()
        with pytest.raises(BreakerOpen) as refused:
            await breaker.call(answer)
        assert (refused.value.state, refused.value.retry_in) == ("half_open", 5.0)
        assert breaker.snapshot().running == 3
    assert breaker.state is BreakerState.CLOSED

    breaker.trip()
    await trio.sleep(15.0)
    await fail(breaker, 2)
    assert breaker.state is BreakerState.HALF_OPEN  # although the result is already certain
    await succeed(breaker)
    assert breaker.state is BreakerState.OPEN
    assert breaker.snapshot().retry_in == 15.0


async def test_a_cancelled_trial_returns_its_permit(autojump_clock: MockClock) -> None:
    breaker = make()
    breaker.trip()
    await trio.sleep(15.0)
    for _ in range(5):
        with trio.move_on_after(1.0):
            await breaker.call(answer, 3.0)
    now = breaker.snapshot()
    assert (now.state, now.trials_left, now.window_calls, now.cancelled) == ("half_open", 3, 0, 5)
    assert (now.succeeded, now.failed, now.running) == (0, 0, 0)
    await succeed(breaker, 3)
    assert breaker.state is BreakerState.CLOSED


async def test_a_cancelled_call_does_not_count(autojump_clock: MockClock) -> None:
    breaker = make()
    await fail(breaker, 3)
    with trio.move_on_after(1.0):
        await breaker.call(answer, 3.0)
    assert breaker.snapshot().window_calls == 3


async def test_a_call_times_out(autojump_clock: MockClock) -> None:
    breaker = make()
    with pytest.raises(BreakerTimeout, match="circuit breaker db: no answer in 5 s"):
        await breaker.call(answer, 6.0)
    assert trio.current_time() == 5.0
    now = breaker.snapshot()
    assert (now.failed, now.timed_out, now.cancelled) == (1, 1, 0)


async def test_a_timeout_is_a_failure_whatever_the_predicate_says(
    autojump_clock: MockClock,
) -> None:
    breaker = make(is_failure=lambda error: False)
    with pytest.raises(BreakerTimeout):
        await breaker.call(answer, 6.0)
    assert breaker.snapshot().failed == 1


async def test_an_error_raised_during_cancellation_is_judged(
    autojump_clock: MockClock,
) -> None:
    async def translate(error: Exception) -> None:
        try:
            await trio.sleep(6.0)
        except trio.Cancelled:
            raise error from None

    breaker = make()
    with pytest.raises(RefusedError):
        await breaker.call(translate, RefusedError())
    with pytest.raises(DownError):
        await breaker.call(translate, DownError())
    now = breaker.snapshot()
    assert (now.succeeded, now.failed, now.timed_out) == (1, 1, 0)


async def test_an_exception_that_is_not_a_failure_counts_as_success(
    autojump_clock: MockClock,
) -> None:
    breaker = make()
    for _ in range(4):
        with pytest.raises(RefusedError):
            await breaker.call(answer, 0.0, RefusedError())
    now = breaker.snapshot()
    assert (now.state, now.failure_rate, now.succeeded) == ("closed", 0.0, 4)


async def test_slow_calls_count_as_their_own_rate(autojump_clock: MockClock) -> None:
    breaker = make(
        settings=BreakerOptions(
            window=4, minimum_calls=4, slow_rate=0.75, slow_after=2.0, trial_calls=2
        )
    )
    for seconds in (3.0, 2.0, 3.0):  # exactly the threshold is not slow
        await breaker.call(answer, seconds)
    await succeed(breaker)
    now = breaker.snapshot()
    assert (now.state, now.failure_rate, now.slow_rate, now.slow) == ("closed", 0.0, 0.5, 2)
    await breaker.call(answer, 3.0)
    assert breaker.state is BreakerState.CLOSED
    with pytest.raises(DownError):
        await breaker.call(answer, 3.0, DownError())
    assert breaker.snapshot().transitions[-1].reason == (
        "3 of 4 calls were slow (75%, threshold 75%)"
    )
    await trio.sleep(30.0)
    for _ in range(2):
        await breaker.call(answer, 3.0)
    assert breaker.state is BreakerState.OPEN  # slow trials don't close it


async def test_results_from_an_earlier_state_do_not_count(autojump_clock: MockClock) -> None:
    breaker = make()
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(breaker.call, answer, 4.0)
        await wait_all_tasks_blocked()
        breaker.reset()  # closed before and after, but with an empty window
        await trio.sleep(4.0)
    now = breaker.snapshot()
    assert (now.window_calls, now.succeeded) == (0, 6)

    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope
        breaker.trip()
        await trio.sleep(15.0)
        nursery.start_soon(breaker.call, answer, 4.0)
        await wait_all_tasks_blocked()
        breaker.trip()
        await trio.sleep(15.0)
        nursery.start_soon(breaker.call, answer, 4.0)
        await wait_all_tasks_blocked()
        assert breaker.snapshot().trials_left == 2
        scope.cancel()
    assert breaker.snapshot().trials_left == 3


async def test_a_stale_trial_does_not_return_a_permit(autojump_clock: MockClock) -> None:
    slow = BreakerOptions(window=6, minimum_calls=4, open_for=1.0, trial_calls=3)
    breaker = make(settings=slow)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            breaker.trip()
            await trio.sleep(1.0)
            nursery.start_soon(breaker.call, answer, 9.0)
            await wait_all_tasks_blocked()
            breaker.trip()
            await trio.sleep(1.0)
            await succeed(breaker)  # half-open again: 2 trials left
            scope.cancel()
    assert breaker.snapshot().trials_left == 2


async def test_an_operator_forces_open_disables_and_resets(autojump_clock: MockClock) -> None:
    breaker = make()
    breaker.force_open()
    await trio.sleep(1000.0)
    with pytest.raises(BreakerOpen) as refused:
        await breaker.call(answer)
    assert refused.value.retry_in == math.inf
    assert breaker.snapshot().retry_in == math.inf

    breaker.disable()
    await fail(breaker, 10)
    now = breaker.snapshot()
    assert (now.state, now.window_calls, now.failed, now.retry_in) == ("disabled", 0, 10, 0.0)

    breaker.reset("dependency replaced")
    await succeed(breaker)
    assert [t.reason for t in breaker.snapshot().transitions] == [
        "forced open by an operator",
        "disabled by an operator",
        "dependency replaced",
    ]


async def test_failing_observers_and_predicates_change_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def observe(transition: Transition) -> None:
        raise RuntimeError("observer")

    def judge(error: Exception) -> bool:
        raise RuntimeError("predicate")

    breaker = make(on_transition=observe, is_failure=judge)
    await fail(breaker, 4)  # raises the call's own error
    assert breaker.state is BreakerState.OPEN
    assert caplog.text.count("is_failure failed") == 4
    assert caplog.text.count("the observer failed") == 1


async def test_any_exception_is_a_failure_by_default(autojump_clock: MockClock) -> None:
    breaker = Breaker("db")
    assert breaker.settings == BreakerOptions()
    await fail(breaker)
    assert breaker.snapshot().failed == 1


async def test_only_the_last_transitions_are_kept(autojump_clock: MockClock) -> None:
    breaker = make()
    for n in range(50):
        breaker.reset(str(n))
    kept = [t.reason for t in breaker.snapshot().transitions]
    assert kept == [str(n) for n in range(30, 50)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 0}, "window"),
        ({"trial_calls": 0}, "trial_calls"),
        ({"window": 10, "minimum_calls": 11}, "could never open"),
        ({"minimum_calls": 0}, "minimum_calls"),
        ({"failure_rate": 0.0}, "failure_rate"),
        ({"failure_rate": math.nan}, "failure_rate"),
        ({"slow_rate": 1.1}, "slow_rate"),
        ({"open_for": 0.0}, "open_for"),
        ({"timeout": -1.0}, "timeout"),
    ],
)
def test_invalid_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BreakerOptions(**wrong)


# Against a model

WINDOW, MINIMUM, TRIALS = 5, 3, 2
OPEN_FOR, TIMEOUT, SLOW_AFTER = 4.0, 6.0, 2.0
MODELLED = BreakerOptions(
    window=WINDOW,
    minimum_calls=MINIMUM,
    failure_rate=0.6,
    slow_rate=0.75,
    slow_after=SLOW_AFTER,
    open_for=OPEN_FOR,
    trial_calls=TRIALS,
    timeout=TIMEOUT,
)


@dataclass
class Model:
    """The breaker as a history; every count is recomputed from it."""

    now: float = 0.0
    state: str = "closed"
    since: float = 0.0
    epoch: int = 0
    results: list[tuple[bool, bool]] = field(default_factory=list)  # of this epoch
    running: dict[int, tuple[float, int]] = field(default_factory=dict)  # start, epoch
    outcomes: dict[int, str] = field(default_factory=dict)

    def enter(self, state: str) -> None:
        self.state, self.since, self.results = state, self.now, []
        self.epoch += 1

    def call(self, number: int) -> None:
        if self.state == "open" and self.now >= self.since + OPEN_FOR:
            self.enter("half_open")
        trials = len(self.results) + sum(epoch == self.epoch for _, epoch in self.running.values())
        if self.state in ("open", "forced_open") or (
            self.state == "half_open" and trials >= TRIALS
        ):
            self.outcomes[number] = "refused"
        else:
            self.running[number] = (self.now, self.epoch)

    def finish(self, number: int, outcome: str) -> None:
        start, epoch = self.running.pop(number)
        self.outcomes[number] = outcome
        if outcome == "cancelled" or epoch != self.epoch or self.state == "disabled":
            return
        self.results.append((outcome in ("failed", "timeout"), self.now - start > SLOW_AFTER))
        enough, window = (TRIALS, TRIALS) if self.state == "half_open" else (MINIMUM, WINDOW)
        last = self.results[-window:]
        if len(self.results) >= enough:
            failures, slow = sum(f for f, _ in last), sum(s for _, s in last)
            if failures / len(last) >= 0.6 or slow / len(last) >= 0.75:
                self.enter("open")
            elif self.state == "half_open":
                self.enter("closed")

    def tick(self) -> None:
        self.now += 1.0
        for number, (start, _) in list(self.running.items()):
            if self.now >= start + TIMEOUT:
                self.finish(number, "timeout")


STEPS = st.one_of(
    st.tuples(st.just("call"), st.just(0)),
    st.tuples(st.just("call"), st.just(0)),
    st.tuples(st.just("call"), st.just(0)),
    st.tuples(
        st.sampled_from(["returned", "failed", "failed", "failed", "refusal", "cancelled"]),
        st.integers(0, 5),
    ),
    st.tuples(
        st.sampled_from(["returned", "failed", "failed", "failed", "refusal", "cancelled"]),
        st.integers(0, 5),
    ),
    st.tuples(st.just("wait"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["trip", "reset", "force_open", "disable"]), st.just(0)),
)


@given(st.lists(STEPS, max_size=60))
@settings(max_examples=examples(300), deadline=None)
def test_behaves_like_the_model(steps: list[tuple[str, int]]) -> None:
    clock = MockClock()
    trio.run(compare_with_model, clock, steps, clock=clock)


async def compare_with_model(clock: MockClock, steps: list[tuple[str, int]]) -> None:
    breaker = make(settings=MODELLED)
    model = Model()
    outcomes: dict[int, str] = {}
    events: dict[int, trio.Event] = {}
    errors: dict[int, Exception | None] = {}
    scopes: dict[int, trio.CancelScope] = {}

    async def body(number: int) -> None:
        await events[number].wait()
        if (error := errors[number]) is not None:
            raise error

    async def run(number: int) -> None:
        with trio.CancelScope() as scopes[number]:
            try:
                await breaker.call(body, number)
                outcomes[number] = "returned"
            except BreakerOpen:
                outcomes[number] = "refused"
            except BreakerTimeout:
                outcomes[number] = "timeout"
            except DownError:
                outcomes[number] = "failed"
            except RefusedError:
                outcomes[number] = "refusal"
        if scopes[number].cancelled_caught:
            outcomes[number] = "cancelled"

    async def tick() -> None:
        model.tick()
        clock.jump(1.0)
        await wait_all_tasks_blocked()

    operator: dict[str, tuple[Callable[[], None], str]] = {
        "trip": (breaker.trip, "open"),
        "reset": (breaker.reset, "closed"),
        "force_open": (breaker.force_open, "forced_open"),
        "disable": (breaker.disable, "disabled"),
    }

    async with trio.open_nursery() as nursery:
        for number, (step, argument) in enumerate(steps):
            await tick()  # so that no two calls start or time out at the same time
            if step == "call":
                model.call(number)
                events[number] = trio.Event()
                nursery.start_soon(run, number)
            elif step == "wait":
                for _ in range(argument):
                    await tick()
            elif step in operator:
                method, state = operator[step]
                model.enter(state)
                method()
            elif model.running:
                chosen = sorted(model.running)[argument % len(model.running)]
                model.finish(chosen, step)
                errors[chosen] = {"failed": DownError(), "refusal": RefusedError()}.get(step)
                if step == "cancelled":
                    scopes[chosen].cancel()
                else:
                    events[chosen].set()
            await wait_all_tasks_blocked()
            assert outcomes == model.outcomes
            now = breaker.snapshot()
            assert now.state == model.state
            assert now.running == len(model.running)
            size = TRIALS if model.state == "half_open" else WINDOW
            last = model.results[-size:]
            assert now.window_calls == len(last)
            if model.state == "closed" and len(last) >= MINIMUM:
                assert now.failure_rate == sum(f for f, _ in last) / len(last)
                assert now.slow_rate == sum(s for _, s in last) / len(last)
            else:
                assert now.failure_rate is None
            ended = list(model.outcomes.values())
            assert now.not_permitted == ended.count("refused")
            assert now.cancelled == ended.count("cancelled")
            assert now.timed_out == ended.count("timeout")
            assert now.failed == ended.count("failed") + ended.count("timeout")
            assert now.succeeded == ended.count("returned") + ended.count("refusal")
            if model.state == "open":
                assert now.retry_in == max(0.0, model.since + OPEN_FOR - model.now)
        nursery.cancel_scope.cancel()
