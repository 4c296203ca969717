import orjson
import pytest
import trio
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from betrace.service.config.edge import Ingest
from betrace.service.pipeline.request import Done, Refused, Reply
from betrace.service.receiver.admission import Admission, TenantStates
from betrace.service.receiver.heads import Head
from betrace.service.receiver.refusals import REASONS
from betrace.service.tenancy.quotas import SpanQuotas
from tests.support.http_requests import ScriptedQueue
from tests.support.tenant_keys import UNREADABLE, authenticating, bearer, new_key

PROTOBUF = (b"content-type", b"application/x-protobuf")
JSON = (b"content-type", b"application/json")


def make(queue=None, quotas=None, authenticator=None, **settings):
    queue = queue or ScriptedQueue()
    quotas = quotas or SpanQuotas()
    return Admission(Ingest(**settings), queue, quotas, authenticator, lambda: 12345), queue


async def admit(admission, *headers, method="POST", path="/v1/traces"):
    return await admission.admit(method, path, list(headers) or [PROTOBUF])


def status(response):
    """The google.rpc.Status of an error, in either encoding."""
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
    admission, _ = make()
    assert await admit(admission, *headers, path=path) == expected


@pytest.mark.parametrize(
    ("headers", "code", "words"),
    [
        (
            [(b"content-type", b"text/plain")],
            415,
            "'text/plain' is not supported; send appl",
        ),
        ([(b"accept", b"*/*")], 415, "no content type; send application/x-protobuf"),
        ([PROTOBUF, (b"content-encoding", b"br")], 415, "'br' is not supported; use gzip"),
        ([PROTOBUF, (b"content-encoding", b"gzip, gzip")], 415, "not supported"),
        (
            [PROTOBUF, (b"content-encoding", b"gzip"), (b"content-encoding", b"gzip")],
            415,
            "not supported",
        ),
        ([PROTOBUF, (b"x-scope-orgid", b"Acme")], 400, "'Acme' is not a tenant name: a tenant"),
        ([PROTOBUF, (b"x-scope-orgid", b"")], 400, "is not a tenant name"),
        ([JSON, (b"x-scope-orgid", b"../x")], 400, "is not a tenant name"),
        (
            [JSON, (b"x-scope-orgid", b"a"), (b"x-scope-orgid", b"a")],
            400,
            "'a, a' is not a tenant name",
        ),
        ([JSON, (b"x-scope-orgid", b"\xff")], 400, "is not a tenant name"),
        (
            [PROTOBUF, (b"content-length", b"20971521")],
            413,
            "larger than 20971520 bytes; send",
        ),
    ],
)
async def test_heads_that_are_refused_say_what_to_do(headers, code, words):
    admission, _ = make()
    response = await admit(admission, *headers)
    assert response.status == code
    assert words in status(response).message
    assert status(response).code == 3
    kind = b"application/x-protobuf" if PROTOBUF in headers else b"application/json"
    assert dict(response.headers)[b"content-type"] == kind
    assert sum(admission.refusals.requests.values()) == 1


async def test_a_body_of_exactly_the_limit_is_admitted():
    admission, _ = make()
    assert isinstance(await admit(admission, PROTOBUF, (b"content-length", b"20971520")), Head)


@pytest.mark.parametrize("path", ["/", "/v1/trace", "/v1/traces/"])
async def test_other_paths_are_not_found(path):
    admission, _ = make()
    response = await admit(admission, path=path)
    assert response.status == 404
    assert "/v1/traces" in status(response).message
    assert admission.refusals.requests["not_found"] == 1


@pytest.mark.parametrize("signal", ["logs", "metrics"])
async def test_other_signals_are_told_how_to_turn_them_off(signal):
    admission, _ = make()
    response = await admit(
        admission, PROTOBUF, (b"content-length", b"100000"), path=f"/v1/{signal}"
    )
    assert response.status == 404
    assert f"OTEL_{signal.upper()}_EXPORTER=none" in status(response).message
    assert admission.refusals.requests[signal] == 1
    assert not any(admission.refusals.spans.values())  # they are no spans


async def test_an_endpoint_without_a_path_is_told_the_variables():
    admission, _ = make()
    message = status(await admit(admission, path="/")).message
    assert "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" in message


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS"])
async def test_other_methods_are_not_allowed(method):
    admission, _ = make()
    response = await admit(admission, method=method)
    assert response.status == 405
    assert dict(response.headers)[b"allow"] == b"POST"
    assert "use POST" in status(response).message


async def test_a_request_reaches_the_channel_unchanged():
    admission, queue = make()
    head = Head("acme", "json", "gzip", 3)
    assert (await admission.handle(head, b"abc")).status == 200
    (request,) = queue.taken
    assert (request.tenant, request.content_type, request.encoding) == ("acme", "json", "gzip")
    assert (request.body, request.received_ns) == (b"abc", 12345)
    assert request.weight >= 1
    assert admission.accepted_requests == 1


async def test_full_success_is_an_empty_response():
    admission, _ = make()
    response = await admission.handle(Head("a", "protobuf", "", None), b"x")
    assert (response.status, response.body) == (200, b"")
    response = await admission.handle(Head("a", "json", "", None), b"x")
    assert (response.status, response.body) == (200, b"{}")
    assert (b"content-type", b"application/json") in response.headers


async def test_rejected_spans_are_reported():
    admission, _ = make(ScriptedQueue(outcome=Done(5, 2, "2 spans have no trace id")))
    response = await admission.handle(Head("a", "protobuf", "", None), b"x")
    partial = ExportTraceServiceResponse.FromString(response.body).partial_success
    assert (partial.rejected_spans, partial.error_message) == (2, "2 spans have no trace id")
    response = await admission.handle(Head("a", "json", "", None), b"x")
    partial = orjson.loads(response.body)["partialSuccess"]
    assert partial == {"rejectedSpans": "2", "errorMessage": "2 spans have no trace id"}


@pytest.mark.parametrize(
    ("code", "reason", "rpc", "retries"),
    [(400, "undecodable", 3, False), (413, "too_large", 3, False), (503, "unavailable", 14, True)],
)
async def test_refusals_of_the_pipeline_reach_the_client(code, reason, rpc, retries):
    admission, _ = make(ScriptedQueue(outcome=Refused(code, "because")))
    response = await admission.handle(Head("a", "protobuf", "", None), b"x" * 4000)
    assert response.status == code
    assert (status(response).code, status(response).message) == (rpc, "because")
    assert (b"retry-after" in dict(response.headers)) is retries
    assert admission.refusals.requests[reason] == 1
    assert admission.refusals.spans[reason] == 10
    assert admission.accepted_requests == 0


async def under_way(admission, queue, nursery, tenant="default"):
    """Let a request of the tenant wait in the queue."""
    before = len(queue.taken)
    queue.outcome = None
    nursery.start_soon(admission.handle, Head(tenant, "protobuf", "", None), b"x")
    while len(queue.taken) == before:
        await trio.sleep(0)
    return queue.taken[-1]


async def test_a_full_channel_refuses_before_the_body(nursery):
    admission, queue = make()
    request = await under_way(admission, queue, nursery)
    queue.fill = 0.91
    response = await admit(admission)
    assert response.status == 503
    assert retry_after(response) == 1
    assert "overloaded" in status(response).message
    other = (b"x-scope-orgid", b"quiet")
    # It has nothing in the channel.
    assert isinstance(await admit(admission, PROTOBUF, other), Head)
    queue.fill = 1.0
    assert (await admit(admission, PROTOBUF, other)).status == 503
    queue.fill = 0.9
    assert isinstance(await admit(admission), Head)
    queue.fill = 0.91
    request.release()
    request.release()  # idempotent
    assert isinstance(await admit(admission), Head)
    nursery.cancel_scope.cancel()


async def test_a_share_used_up_while_the_body_arrives_is_a_refusal(nursery):
    admission, queue = make()
    await under_way(admission, queue, nursery)
    head = await admit(admission)
    queue.fill = 0.95
    response = await admission.handle(head, b"x")
    assert response.status == 503
    assert len(queue.taken) == 1
    nursery.cancel_scope.cancel()


async def test_a_deleted_tenant_is_refused():
    admission = Admission(Ingest(), ScriptedQueue(), SpanQuotas(), tenants=TenantStates({"gone"}))
    response = await admit(admission, PROTOBUF, (b"x-scope-orgid", b"gone"))
    assert (response.status, status(response).code) == (403, 7)
    assert admission.refusals.requests["tenant"] == 1
    assert isinstance(await admit(admission), Head)


async def test_a_request_that_cannot_be_queued_in_time_is_refused(autojump_clock):
    admission, _ = make(ScriptedQueue(room=False))
    start = trio.current_time()
    response = await admission.handle(Head("a", "json", "", None), b"x")
    assert trio.current_time() - start == pytest.approx(0.1)
    assert response.status == 503
    assert admission.refusals.requests["overloaded"] == 1


async def test_only_a_tenth_of_the_queue_may_wait_to_be_queued(nursery):
    queue = ScriptedQueue(fill=0.99, room=False)
    admission = Admission(Ingest(offer_timeout_ms=60_000), queue, SpanQuotas(), capacity=100)
    weight = admission.estimates.estimate(Head("t", "json", "", None), 900)
    waiting = 0
    while isinstance(await admit(admission, (b"x-scope-orgid", b"t%d" % waiting), JSON), Head):
        head = Head(f"t{waiting}", "json", "", None)
        nursery.start_soon(admission.handle, head, b"x" * 900)
        await trio.testing.wait_all_tasks_blocked()
        waiting += 1
    assert 110 < waiting * weight <= 110 + weight  # of 100, queued or not
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [trio.ClosedResourceError, trio.BrokenResourceError])
async def test_a_closed_channel_means_draining(error):
    admission, _ = make(ScriptedQueue(error=error))
    response = await admission.handle(Head("a", "json", "", None), b"x")
    assert response.status == 503
    assert "shutting down" in status(response).message
    assert admission.state == "draining"


async def test_retry_after_grows_with_the_overload_and_falls_again():
    admission, queue = make(ScriptedQueue(fill=1.0))
    seconds = [retry_after(await admit(admission)) for _ in range(300)]
    assert seconds == sorted(seconds)
    assert (seconds[0], seconds[-1]) == (1, 5)
    queue.fill = 0.1
    for _ in range(300):
        await admission.handle(await admit(admission), b"x")
    queue.fill = 1.0
    assert retry_after(await admit(admission)) == 1


async def test_retry_after_grows_while_spans_cannot_be_stored(autojump_clock):
    admission, _ = make(ScriptedQueue(outcome=Refused(503, "because")))

    async def refused_after(pause):
        await trio.sleep(pause)
        response = await admission.handle(Head("a", "protobuf", "", None), b"x")
        return retry_after(response)

    assert [await refused_after(1) for _ in range(8)] == [1, 1, 2, 3, 4, 5, 5, 5]
    assert await refused_after(60) == 1  # another outage


async def test_a_missing_outcome_is_a_503(autojump_clock):
    admission, _ = make(ScriptedQueue(outcome=None), answer_timeout_seconds=7)
    start = trio.current_time()
    response = await admission.handle(Head("a", "json", "", None), b"x")
    assert trio.current_time() - start == 7
    assert (response.status, retry_after(response)) == (503, 5)
    assert "send them again" in status(response).message


async def test_pause_resume_and_drain():
    admission, _ = make()
    admission.pause()
    response = await admit(admission)
    assert (response.status, retry_after(response)) == (503, 5)
    assert "paused by an operator" in status(response).message
    admission.resume()
    assert isinstance(await admit(admission), Head)
    admission.drain()
    assert "shutting down" in status(await admit(admission)).message
    admission.resume()
    assert admission.state == "draining"
    assert admission.refusals.requests["paused"] == admission.refusals.requests["draining"] == 1


async def test_a_tenant_over_its_quota_gets_429():
    now = [0.0]
    admission, queue = make(quotas=SpanQuotas(10, 1, clock=lambda: now[0]))
    queue.outcome = Done(35)
    head = await admit(admission)
    assert (await admission.handle(head, b"x")).status == 200  # estimated as 1, corrected to 35
    response = await admit(admission)
    assert (response.status, retry_after(response)) == (429, 3)
    assert "tenant default" in status(response).message
    assert "10 spans per second" in status(response).message
    assert status(response).code == 8
    assert (await admission.handle(head, b"x")).status == 429  # also after a head admitted before
    assert isinstance(await admit(admission, PROTOBUF, (b"x-scope-orgid", b"other")), Head)
    now[0] = 3.0
    assert isinstance(await admit(admission), Head)
    assert len(queue.taken) == 1


async def test_requests_refused_for_load_use_no_quota():
    admission, queue = make(quotas=SpanQuotas(10, 1, clock=lambda: 0.0))
    queue.outcome = Refused(503, "disk")
    await admission.handle(Head("a", "protobuf", "", None), b"x" * 40_000)
    queue.room = False
    await admission.handle(Head("a", "protobuf", "", None), b"x" * 40_000)
    queue.room, queue.outcome = True, Done(1)
    assert (await admission.handle(Head("a", "protobuf", "", None), b"x")).status == 200


@pytest.mark.parametrize("outcome", [Refused(400, "bad"), Refused(413, "large"), Done(0, 100)])
async def test_invalid_bodies_and_rejected_spans_use_quota(outcome):
    """Decoding them takes as long as decoding what is accepted."""
    admission, queue = make(quotas=SpanQuotas(10, 1, clock=lambda: 0.0))
    queue.outcome = outcome
    await admission.handle(Head("a", "protobuf", "", None), b"x" * 40_000)
    assert (await admission.handle(Head("a", "protobuf", "", None), b"x")).status == 429


async def test_retry_after_for_quotas_stays_within_the_limits_of_exporters():
    admission, queue = make(quotas=SpanQuotas(1, 1, clock=lambda: 0.0))
    queue.outcome = Done(500)
    await admission.handle(await admit(admission), b"x")
    assert retry_after(await admit(admission)) == 5


async def test_weights_follow_the_spans_that_bodies_contained():
    admission, queue = make()
    queue.outcome = Done(10)
    for _ in range(300):
        await admission.handle(Head("a", "protobuf", "gzip", None), b"x" * 500)
    head = Head("a", "protobuf", "gzip", None)
    assert admission.estimates.estimate(head, 5000) == pytest.approx(100, abs=2)


async def test_authentication_decides_the_tenant():
    key = new_key()
    with authenticating({"acme": key}) as authenticator:
        admission, _ = make(authenticator=authenticator)

        async def send(authorization: str, *headers):
            sent = (b"authorization", authorization.encode())
            return await admit(admission, PROTOBUF, sent, *headers)

        for _ in range(2):  # the second time from memory
            head = await send(bearer(key, "acme"), (b"x-scope-orgid", b"other"))
            assert head.tenant == "acme"
        response = await admit(admission)
        assert (response.status, status(response).code) == (401, 16)
        assert dict(response.headers)[b"www-authenticate"] == b"Bearer"
        response = await send(bearer(new_key(), "acme"))
        assert (response.status, status(response).code) == (401, 16)
        assert "not signed with a valid key" in status(response).message
        response = await send(bearer(key, UNREADABLE))
        assert (response.status, retry_after(response)) == (503, 5)


async def test_all_reasons_are_counted_from_zero():
    admission, _ = make()
    assert admission.refusals.requests == admission.refusals.spans == dict.fromkeys(REASONS, 0)
    await admit(admission, PROTOBUF, (b"content-length", b"40000000"))
    assert admission.refusals.spans["too_large"] == 100_000


async def test_a_reply_is_set_once():
    reply = Reply()
    reply.set(Done(1))
    assert await reply.wait() == Done(1)
    with pytest.raises(RuntimeError, match="already set"):
        reply.set(Refused(503, ""))
