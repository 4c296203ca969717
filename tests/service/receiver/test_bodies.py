import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from betrace.service.config.edge import Ingest
from betrace.service.receiver.bodies import Bodies, Body
from betrace.service.receiver.heads import Head
from betrace.service.receiver.refusals import Refusals


@pytest.fixture
def bodies():
    settings = Ingest(max_body_bytes=4096, max_buffered_bytes=8192)
    return Bodies(settings, Refusals(settings, lambda head, size: 1))


def test_a_body_within_the_limits(bodies):
    with Body(bodies, Head("a", "json", "", None)) as body:
        assert body.feed(b"x" * 4000) is None
        assert body.feed(b"y" * 96) is None
        assert body.take() == b"x" * 4000 + b"y" * 96
        assert bodies.shares.total == 4096
        response = body.feed(b"z")
        assert response.status == 413
    assert bodies.shares.total == 0


def test_memory_is_bounded_and_shared(bodies):
    head, other = Head("a", "json", "", 4096), Head("b", "json", "", None)
    with Body(bodies, head) as one, Body(bodies, head) as two, Body(bodies, other) as three:
        assert one.feed(b"x") is None
        assert bodies.shares.total == 1  # announced bytes do not count
        assert one.feed(b"x" * 3999) is None
        assert two.feed(b"x" * 3000) is None
        response = two.feed(b"x" * 400)
        assert response.status == 503
        assert dict(response.headers)[b"retry-after"] == b"1"
        assert three.feed(b"x" * 700) is None  # a tenth is reserved for tenants with nothing
        assert three.feed(b"x" * 200).status == 503
        assert bodies.shares.total == 7700
    assert bodies.shares.total == 0
    assert bodies.refusals.requests["memory"] == 2


async def test_settled_waits_for_all_requests(bodies, autojump_clock):
    await bodies.settled()
    head = Head("a", "json", "", None)

    async def request(seconds):
        with Body(bodies, head):
            await trio.sleep(seconds)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(request, 1)
        nursery.start_soon(request, 3)
        await wait_all_tasks_blocked()
        started = trio.current_time()
        await bodies.settled()
        assert trio.current_time() - started == pytest.approx(3)
