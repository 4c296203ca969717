import orjson
import pytest
import trio
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from betrace.service.config.settings import Ingest
from betrace.service.pipeline.request import Done, Refused, Reply
from betrace.service.receiver.admission import REASONS, Edge, Head
from betrace.service.tenancy.access import Denied
from betrace.service.tenants import Quotas
from tests.support.http_requests import ScriptedQueue

PROTOBUF = (b"content-type", b"application/x-protobuf")
JSON = (b"content-type", b"application/json")


def make(queue=None, quotas=None, authenticator=None, **settings):
    queue = queue or ScriptedQueue()
    return Edge(Ingest(**settings), queue, quotas or Quotas(), authenticator, lambda: 12345), queue


async def admit(edge, *headers, method="POST", path="/v1/traces"):
    return await edge.admit(method, path, list(headers) or [PROTOBUF])


def status(response):
    """The google.rpc.Status of an error, in whichever encoding."""
    headers = dict(response.headers)
    assert headers[b"content-length"] == str(len(response.body)).encode()
    if headers[b"content-type"] == b"application/x-protobuf":
        return Status.FromString(response.body)
    assert headers[b"content-type"] == b"application/json"
    return Status(**orjson.loads(response.body))


def retry_after(response):
    return int(dict(response.headers)[b"retry-after"])


@pytest.mark.parametrize("path", ["/v1/traces", "/api/otlp/traces"])
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([PROTOBUF], Head("default", "protobuf", "", None)),
        ([JSON, (b"content-length", b"7")], Head("default", "json", "", 7)),
        (
            [(b"content-type", b"Application/JSON; charset=utf-8")],
            Head("default", "json", "", None),
        ),
        ([PROTOBUF, (b"content-encoding", b"GZIP")], Head("default", "protobuf", "gzip", None)),
        ([PROTOBUF, (b"content-encoding", b"zstd")], Head("default", "protobuf", "zstd", None)),
        (
            [PROTOBUF, (b"content-encoding", b"deflate")],
            Head("default", "protobuf", "deflate", None),
        ),
        ([PROTOBUF, (b"content-encoding", b"identity")], Head("default", "protobuf", "", None)),
        ([PROTOBUF, (b"x-scope-orgid", b"acme-1")], Head("acme-1", "protobuf", "", None)),
        ([PROTOBUF, (b"x-other", b"1")], Head("default", "protobuf", "", None)),
    ],
)
async def test_good_heads(headers, expected, path):
    edge, _ = make()
    assert await admit(edge, *headers, path=path) == expected


@pytest.mark.parametrize(
    ("headers", "code", "words"),
    [
        ([(b"content-type", b"text/plain")], 415, "'text/plain' is not known; send application/x-"),
        ([(b"accept", b"*/*")], 415, "no content type given; send application/x-protobuf"),
        ([PROTOBUF, (b"content-encoding", b"br")], 415, "'br' is not known; send gzip"),
        ([PROTOBUF, (b"content-encoding", b"gzip, gzip")], 415, "not known"),
        (
            [PROTOBUF, (b"content-encoding", b"gzip"), (b"content-encoding", b"gzip")],
            415,
            "not known",
        ),
        ([PROTOBUF, (b"x-scope-orgid", b"Acme")], 400, "'Acme' names no tenant: a tenant name is"),
        ([PROTOBUF, (b"x-scope-orgid", b"")], 400, "names no tenant"),
        ([JSON, (b"x-scope-orgid", b"../x")], 400, "names no tenant"),
        ([JSON, (b"x-scope-orgid", b"\xff")], 400, "names no tenant"),
        (
            [PROTOBUF, (b"content-length", b"20971521")],
            413,
            "larger than 20971520 bytes; send",
        ),
    ],
)
async def test_heads_that_are_refused_say_what_to_do(headers, code, words):
    edge, _ = make()
    response = await admit(edge, *headers)
    assert response.status == code
    assert words in status(response).message
    assert status(response).code == 3
    kind = b"application/x-protobuf" if PROTOBUF in headers else b"application/json"
    assert dict(response.headers)[b"content-type"] == kind
    assert sum(edge.refused_requests.values()) == 1


async def test_a_body_of_exactly_the_limit_is_admitted():
    edge, _ = make()
    assert isinstance(await admit(edge, PROTOBUF, (b"content-length", b"20971520")), Head)


@pytest.mark.parametrize("path", ["/", "/v1/trace", "/v1/metrics", "/v1/logs", "/v1/traces/"])
async def test_other_paths_are_not_found(path):
    edge, _ = make()
    response = await admit(edge, path=path)
    assert response.status == 404
    assert "/v1/traces" in status(response).message


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS"])
async def test_other_methods_are_not_allowed(method):
    edge, _ = make()
    response = await admit(edge, method=method)
    assert response.status == 405
    assert dict(response.headers)[b"allow"] == b"POST"
    assert "use POST" in status(response).message


async def test_a_request_reaches_the_channel_as_it_came():
    edge, queue = make()
    head = Head("acme", "json", "gzip", 3)
    assert (await edge.handle(head, b"abc")).status == 200
    (request,) = queue.taken
    assert (request.tenant, request.content_type, request.encoding) == ("acme", "json", "gzip")
    assert (request.body, request.received_ns) == (b"abc", 12345)
    assert request.weight >= 1
    assert edge.accepted_requests == 1


async def test_full_success_is_an_empty_response():
    edge, _ = make()
    response = await edge.handle(Head("a", "protobuf", "", None), b"x")
    assert (response.status, response.body) == (200, b"")
    response = await edge.handle(Head("a", "json", "", None), b"x")
    assert (response.status, response.body) == (200, b"{}")
    assert (b"content-type", b"application/json") in response.headers


async def test_rejected_spans_are_reported():
    edge, _ = make(ScriptedQueue(outcome=Done(5, 2, "2 spans have no trace id")))
    response = await edge.handle(Head("a", "protobuf", "", None), b"x")
    partial = ExportTraceServiceResponse.FromString(response.body).partial_success
    assert (partial.rejected_spans, partial.error_message) == (2, "2 spans have no trace id")
    response = await edge.handle(Head("a", "json", "", None), b"x")
    partial = orjson.loads(response.body)["partialSuccess"]
    assert partial == {"rejectedSpans": "2", "errorMessage": "2 spans have no trace id"}


@pytest.mark.parametrize(
    ("code", "reason", "rpc", "retries"),
    [(400, "undecodable", 3, False), (413, "too_large", 3, False), (503, "unavailable", 14, True)],
)
async def test_what_the_pipeline_refuses(code, reason, rpc, retries):
    edge, _ = make(ScriptedQueue(outcome=Refused(code, "because")))
    response = await edge.handle(Head("a", "protobuf", "", None), b"x" * 4000)
    assert response.status == code
    assert (status(response).code, status(response).message) == (rpc, "because")
    assert (b"retry-after" in dict(response.headers)) is retries
    assert edge.refused_requests[reason] == 1
    assert edge.refused_spans[reason] == 10
    assert edge.accepted_requests == 0


async def under_way(edge, queue, nursery, tenant="default"):
    """Have a request of the tenant wait in the queue."""
    before = len(queue.taken)
    queue.outcome = None
    nursery.start_soon(edge.handle, Head(tenant, "protobuf", "", None), b"x")
    while len(queue.taken) == before:
        await trio.sleep(0)
    return queue.taken[-1]


async def test_a_full_channel_refuses_before_the_body(nursery):
    edge, queue = make()
    request = await under_way(edge, queue, nursery)
    queue.fill = 0.91
    response = await admit(edge)
    assert response.status == 503
    assert retry_after(response) == 1
    assert "overloaded" in status(response).message
    other = (b"x-scope-orgid", b"quiet")
    assert isinstance(await admit(edge, PROTOBUF, other), Head)  # it has nothing in the channel
    queue.fill = 1.0
    assert (await admit(edge, PROTOBUF, other)).status == 503
    queue.fill = 0.9
    assert isinstance(await admit(edge), Head)
    queue.fill = 0.91
    request.release()
    request.release()  # twice does no harm
    assert isinstance(await admit(edge), Head)
    nursery.cancel_scope.cancel()


async def test_a_share_used_up_while_the_body_came_is_a_refusal(nursery):
    edge, queue = make()
    await under_way(edge, queue, nursery)
    head = await admit(edge)
    queue.fill = 0.95
    response = await edge.handle(head, b"x")
    assert response.status == 503
    assert len(queue.taken) == 1
    nursery.cancel_scope.cancel()


async def test_a_tenant_that_is_deleted_is_refused():
    edge = Edge(Ingest(), ScriptedQueue(), Quotas(), closed={"gone"})
    response = await admit(edge, PROTOBUF, (b"x-scope-orgid", b"gone"))
    assert (response.status, status(response).code) == (403, 7)
    assert edge.refused_requests["tenant"] == 1
    assert isinstance(await admit(edge), Head)


async def test_a_request_that_cannot_be_queued_in_time_is_refused(autojump_clock):
    edge, _ = make(ScriptedQueue(room=False))
    start = trio.current_time()
    response = await edge.handle(Head("a", "json", "", None), b"x")
    assert trio.current_time() - start == pytest.approx(0.1)
    assert response.status == 503
    assert edge.refused_requests["overloaded"] == 1


async def test_only_a_tenth_of_the_queue_may_wait_for_room_in_it(nursery):
    queue = ScriptedQueue(fill=0.99, room=False)
    edge = Edge(Ingest(offer_timeout_ms=60_000), queue, Quotas(), capacity=100)
    weight = edge.estimate("json", "", 900)
    waiting = 0
    while isinstance(await admit(edge, (b"x-scope-orgid", b"t%d" % waiting), JSON), Head):
        head = Head(f"t{waiting}", "json", "", None)
        nursery.start_soon(edge.handle, head, b"x" * 900)
        await trio.testing.wait_all_tasks_blocked()
        waiting += 1
    assert 110 < waiting * weight <= 110 + weight  # of 100, in the queue or not
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [trio.ClosedResourceError, trio.BrokenResourceError])
async def test_a_closed_channel_means_draining(error):
    edge, _ = make(ScriptedQueue(error=error))
    response = await edge.handle(Head("a", "json", "", None), b"x")
    assert response.status == 503
    assert "shutting down" in status(response).message
    assert edge.state == "draining"


async def test_retry_after_grows_with_the_overload_and_falls_again():
    edge, queue = make(ScriptedQueue(fill=1.0))
    seconds = [retry_after(await admit(edge)) for _ in range(300)]
    assert seconds == sorted(seconds)
    assert (seconds[0], seconds[-1]) == (1, 5)
    queue.fill = 0.1
    for _ in range(300):
        await edge.handle(await admit(edge), b"x")
    queue.fill = 1.0
    assert retry_after(await admit(edge)) == 1


async def test_an_outcome_that_does_not_come_is_a_503(autojump_clock):
    edge, _ = make(ScriptedQueue(outcome=None), answer_timeout_seconds=7)
    start = trio.current_time()
    response = await edge.handle(Head("a", "json", "", None), b"x")
    assert trio.current_time() - start == 7
    assert (response.status, retry_after(response)) == (503, 5)
    assert "send them again" in status(response).message


async def test_pause_resume_and_drain():
    edge, _ = make()
    edge.pause()
    response = await admit(edge)
    assert (response.status, retry_after(response)) == (503, 5)
    assert "paused by an operator" in status(response).message
    edge.resume()
    assert isinstance(await admit(edge), Head)
    edge.drain()
    assert "shutting down" in status(await admit(edge)).message
    edge.resume()
    assert edge.state == "draining"
    assert edge.refused_requests["paused"] == edge.refused_requests["draining"] == 1


async def test_a_tenant_over_its_quota_gets_429():
    now = [0.0]
    edge, queue = make(quotas=Quotas(10, 1, clock=lambda: now[0]))
    queue.outcome = Done(35)
    head = await admit(edge)
    assert (await edge.handle(head, b"x")).status == 200  # estimated as 1, corrected to 35
    response = await admit(edge)
    assert (response.status, retry_after(response)) == (429, 3)
    assert "tenant default" in status(response).message
    assert "10 spans a second" in status(response).message
    assert status(response).code == 8
    assert (await edge.handle(head, b"x")).status == 429  # also after a head admitted before
    assert isinstance(await admit(edge, PROTOBUF, (b"x-scope-orgid", b"other")), Head)
    now[0] = 3.0
    assert isinstance(await admit(edge), Head)
    assert len(queue.taken) == 1


async def test_what_is_refused_costs_no_quota():
    edge, queue = make(quotas=Quotas(10, 1, clock=lambda: 0.0))
    queue.outcome = Refused(503, "disk")
    await edge.handle(Head("a", "protobuf", "", None), b"x" * 40_000)
    queue.room = False
    await edge.handle(Head("a", "protobuf", "", None), b"x" * 40_000)
    queue.room, queue.outcome = True, Done(1)
    assert (await edge.handle(Head("a", "protobuf", "", None), b"x")).status == 200


@pytest.mark.parametrize("outcome", [Refused(400, "bad"), Refused(413, "large"), Done(0, 100)])
async def test_invalid_bodies_and_rejected_spans_cost_quota(outcome):
    """Decoding them takes as long as decoding what is accepted."""
    edge, queue = make(quotas=Quotas(10, 1, clock=lambda: 0.0))
    queue.outcome = outcome
    await edge.handle(Head("a", "protobuf", "", None), b"x" * 40_000)
    assert (await edge.handle(Head("a", "protobuf", "", None), b"x")).status == 429


async def test_a_long_wait_for_quota_stays_within_what_exporters_bear():
    edge, queue = make(quotas=Quotas(1, 1, clock=lambda: 0.0))
    queue.outcome = Done(500)
    await edge.handle(await admit(edge), b"x")
    assert retry_after(await admit(edge)) == 5


async def test_weights_follow_what_bodies_turned_out_to_hold():
    edge, queue = make()
    queue.outcome = Done(10)
    for _ in range(300):
        await edge.handle(Head("a", "protobuf", "gzip", None), b"x" * 500)
    assert edge.estimate("protobuf", "gzip", 5000) == pytest.approx(100, abs=2)
    assert edge.estimate("protobuf", "", 4000) == 10  # others are not touched
    assert edge.estimate("protobuf", "", 0) == 1


class Gate:
    def remembered(self, authorization):
        return "acme" if authorization == "Bearer known" else None

    async def tenant(self, authorization):
        if authorization is None:
            return Denied(401, "send a bearer token")
        if authorization == "Bearer good":
            return "acme"
        if authorization == "Bearer broken":
            return Denied(503, "tokens cannot be verified now")
        return Denied(403, "this token is for queries only")


async def test_authentication_decides_the_tenant():
    edge, _ = make(authenticator=Gate())
    head = await admit(
        edge, PROTOBUF, (b"authorization", b"Bearer good"), (b"x-scope-orgid", b"other")
    )
    assert head.tenant == "acme"
    response = await admit(edge)
    assert (response.status, status(response).code) == (401, 16)
    assert dict(response.headers)[b"www-authenticate"] == b"Bearer"
    response = await admit(edge, PROTOBUF, (b"authorization", b"Bearer bad"))
    assert (response.status, status(response).code) == (403, 7)
    assert "queries only" in status(response).message
    assert (await admit(edge, PROTOBUF, (b"authorization", b"Bearer known"))).tenant == "acme"
    response = await admit(edge, PROTOBUF, (b"authorization", b"Bearer broken"))
    assert (response.status, retry_after(response)) == (503, 5)


async def test_bodies_within_the_limits():
    edge, _ = make(max_body_bytes=4096, max_buffered_bytes=8192)
    head = Head("a", "json", "", None)
    with edge.body(head) as body:
        assert body.feed(b"x" * 4000) is None
        assert body.feed(b"y" * 96) is None
        assert body.take() == b"x" * 4000 + b"y" * 96
        assert edge.buffered_bytes == 4096
        response = body.feed(b"z")
        assert response.status == 413
    assert edge.buffered_bytes == 0


async def test_memory_for_bodies_is_bounded_and_shared():
    edge, _ = make(max_body_bytes=4096, max_buffered_bytes=8192)
    head, other = Head("a", "json", "", 4096), Head("b", "json", "", None)
    with edge.body(head) as one, edge.body(head) as two, edge.body(other) as three:
        assert one.feed(b"x") is None
        assert edge.buffered_bytes == 1  # what was announced does not count
        assert one.feed(b"x" * 3999) is None
        assert two.feed(b"x" * 3000) is None
        response = two.feed(b"x" * 400)
        assert (response.status, retry_after(response)) == (503, 1)
        assert three.feed(b"x" * 700) is None  # a tenth is for those who hold nothing
        assert three.feed(b"x" * 200).status == 503
        assert edge.buffered_bytes == 7700
    assert edge.buffered_bytes == 0
    assert edge.refused_requests["memory"] == 2


async def test_all_reasons_are_counted_from_zero():
    edge, _ = make()
    assert edge.refused_requests == edge.refused_spans == dict.fromkeys(REASONS, 0)
    await admit(edge, PROTOBUF, (b"content-length", b"40000000"))
    assert edge.refused_spans["too_large"] == 100_000


async def test_a_reply_is_set_once():
    reply = Reply()
    reply.set(Done(1))
    assert await reply.wait() == Done(1)
    with pytest.raises(RuntimeError, match="already told"):
        reply.set(Refused(503, ""))
