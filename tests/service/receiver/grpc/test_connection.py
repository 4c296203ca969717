"""One gRPC connection: calls and their statuses, time limits, flow control, the end."""

from __future__ import annotations

import base64
import gzip

import h2.events
import pytest
import trio
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from betrace.service.pipeline.request import Done, Refused
from betrace.service.receiver.grpc import frames, methods
from betrace.service.receiver.grpc.connection import WINDOW_BYTES
from betrace.service.receiver.grpc.outbound import MAX_STREAMS
from betrace.service.receiver.heads import Head
from tests.support.grpc_peer import prefixed, serving
from tests.support.http_requests import ScriptedQueue

OK, INVALID, DEADLINE, NOT_FOUND, DENIED, EXHAUSTED = 0, 3, 4, 5, 7, 8
UNIMPLEMENTED, UNAVAILABLE, UNAUTHENTICATED = 12, 14, 16
LOGS = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
METRICS = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def binary(answer, name: bytes) -> bytes:
    value = answer.headers[name]
    return base64.b64decode(value + b"=" * (-len(value) % 4))


async def test_an_export_and_its_answer(autojump_clock):
    async with serving() as s:
        answer = await s.peer.ask(b"spans", x_scope_orgid="acme")
        assert answer.headers == {b":status": b"200", b"content-type": b"application/grpc"}
        assert (answer.data, answer.trailers) == (prefixed(b""), {b"grpc-status": b"0"})
    (request,) = s.queue.taken
    assert (request.tenant, request.content_type, request.encoding) == ("acme", "protobuf", "")
    assert s.bodies == [b"spans"]
    assert s.admission.accepted_requests == 1


async def test_gzip_is_a_matter_of_each_message(autojump_clock):
    async with serving() as s:
        packed = gzip.compress(b"spans")
        assert (await s.peer.ask(packed, flag=1, grpc_encoding="gzip")).status == OK
        assert (await s.peer.ask(b"spans", flag=0, grpc_encoding="gzip")).status == OK
        assert (await s.peer.ask(packed, flag=1, grpc_encoding="identity")).status == OK
        answer = await s.peer.ask(packed, flag=1, grpc_encoding="snappy")
        assert answer.status == UNIMPLEMENTED
        assert b"gzip" in answer.headers[b"grpc-accept-encoding"]
    assert [r.encoding for r in s.queue.taken] == ["gzip", "", ""]


async def test_partial_success(autojump_clock):
    queue = ScriptedQueue(outcome=Done(1, 2, "two were bad"))
    async with serving(queue) as s:
        answer = await s.peer.ask(b"spans")
        assert answer.status == OK
        response = ExportTraceServiceResponse.FromString(answer.data[5:])
        assert response.partial_success.rejected_spans == 2
        assert response.partial_success.error_message == "two were bad"


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Refused(400, "bad"), INVALID),
        (Refused(403, "gone"), DENIED),
        (Refused(413, "big"), INVALID),
        (Refused(503, "wait"), UNAVAILABLE),
    ],
)
async def test_what_the_pipeline_refuses(autojump_clock, outcome, status):
    async with serving(ScriptedQueue(outcome=outcome)) as s:
        answer = await s.peer.ask(b"spans")
        assert (answer.status, answer.message) == (status, outcome.message)
        assert (b"grpc-status-details-bin" in answer.headers) == (status == UNAVAILABLE)


async def test_an_overload_says_when_to_come_again(autojump_clock):
    async with serving(ScriptedQueue(fill=1.0)) as s:
        answer = await s.peer.ask(b"spans")
        assert answer.status == UNAVAILABLE
        status = Status.FromString(binary(answer, b"grpc-status-details-bin"))
        assert (status.code, status.message) == (UNAVAILABLE, answer.message)
        retry = RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.seconds >= 1
        assert RetryInfo.FromString(binary(answer, b"google.rpc.retryinfo-bin")) == retry
    assert s.admission.refusals.requests["overloaded"] == 1


async def test_refused_spans_are_estimated_as_over_http(autojump_clock):
    async with serving(ScriptedQueue(fill=1.0)) as s:
        stream = s.peer.h2.get_next_available_stream_id()
        s.peer.h2.send_headers(stream, s.peer.head())
        s.peer.h2.send_data(stream, prefixed(bytes(12_000)), end_stream=True)
        await s.peer.flush()
        await trio.testing.wait_all_tasks_blocked()
        head = Head("default", "protobuf", "", None)
        assert s.admission.refusals.spans["overloaded"] == 30
        assert s.admission.estimates.estimate(head, 12_000) == 30


async def test_a_quota_is_resource_exhausted_with_a_wait(autojump_clock, monkeypatch):
    async with serving() as s:
        monkeypatch.setattr(s.admission._quotas, "admit", lambda tenant, spans: 2.0)
        answer = await s.peer.ask(b"spans")
        assert answer.status == EXHAUSTED
        assert b"grpc-status-details-bin" in answer.headers


async def test_a_message_that_is_too_large_is_refused_at_its_prefix(autojump_clock):
    async with serving(max_body_bytes=1000_000) as s:
        stream = await s.peer.begin()
        await s.peer.send_data(stream, prefixed(bytes(1000_001))[:6])
        answer = await s.peer.answer(stream)
        assert answer.status == INVALID
        assert "1000000" in answer.message
        assert (await s.peer.ask(bytes(1000_000))).status == OK
    assert [len(body) for body in s.bodies] == [1000_000]


@pytest.mark.parametrize("size", [0, 1, 11, 16_384, 16_385, 200_000, WINDOW_BYTES, 9_000_000])
async def test_messages_of_all_sizes(autojump_clock, size):
    body = bytes(i % 251 for i in range(min(size, 70_000))) * max(1, size // 70_000)
    async with serving() as s:
        assert (await s.peer.ask(body)).status == OK
    assert s.bodies == [body]


@pytest.mark.parametrize("piece", [1, 3, 7])
async def test_a_call_that_arrives_in_small_pieces(autojump_clock, piece):
    async with serving() as s:
        stream = s.peer.h2.get_next_available_stream_id()
        s.peer.h2.send_headers(stream, s.peer.head())
        s.peer.h2.send_data(stream, prefixed(b"spans"), end_stream=True)
        data = s.peer.h2.data_to_send()
        for start in range(0, len(data), piece):
            await s.peer.send_raw(data[start : start + piece])
            await trio.testing.wait_all_tasks_blocked()
    assert s.bodies == [b"spans"]


async def test_padding_is_not_part_of_a_message(autojump_clock):
    async with serving() as s:
        stream = await s.peer.begin()
        data = prefixed(b"spans")
        s.peer.h2.send_data(stream, data[:3], pad_length=0)
        s.peer.h2.send_data(stream, data[3:7], pad_length=200)
        s.peer.h2.send_data(stream, b"", pad_length=255)
        s.peer.h2.send_data(stream, data[7:], end_stream=True, pad_length=1)
        await s.peer.flush()
        assert (await s.peer.answer(stream)).status == OK
    assert s.bodies == [b"spans"]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "there is no message"),
        (b"\x00\x00\x00", "there is no message"),
        (prefixed(b"spans")[:-1], "the message is cut short"),
        (prefixed(b"spans") * 2, "more than one message was sent; a call has one"),
        (prefixed(b"spans", flag=2), "the compressed flag is 2, not 0 or 1"),
    ],
)
async def test_what_is_not_one_message(autojump_clock, sent, message):
    async with serving() as s:
        stream = await s.peer.begin()
        await s.peer.send_data(stream, sent, end=True)
        answer = await s.peer.answer(stream)
        assert (answer.status, answer.message) == (INVALID, message)
        assert (await s.peer.ask(b"spans")).status == OK
    assert s.bodies == [b"spans"]


async def test_a_call_without_data(autojump_clock):
    async with serving() as s:
        stream = await s.peer.begin(end=True)
        assert (await s.peer.answer(stream)).status == INVALID


async def test_a_call_that_ends_with_trailers(autojump_clock):
    async with serving() as s:
        stream = await s.peer.begin()
        await s.peer.send_data(stream, prefixed(b"spans"))
        s.peer.h2.send_headers(stream, [(b"x", b"y")], end_stream=True)
        await s.peer.flush()
        assert (await s.peer.answer(stream)).status == OK
    assert s.bodies == [b"spans"]


async def test_trailers_after_the_end_do_not_send_spans_twice(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        stream = await s.peer.call(b"spans")
        block = s.peer.h2.encoder.encode([(b"x", b"y")])
        flags = frames.END_HEADERS | frames.END_STREAM
        await s.peer.send_raw(frames.make(frames.HEADERS, flags, stream, block))
        assert (await s.peer.goaway())[0] == ErrorCodes.STREAM_CLOSED
        queue.taken[0].reply.set(Done(1))
    assert s.bodies == [b"spans"]


async def test_a_watching_connection_makes_room(autojump_clock):
    async with serving() as s:
        watching = s.peer.answers[await s.peer.call(b"", methods.WATCH)]
        await s.peer.until(lambda: watching.data)
        await trio.sleep(5.5)
        assert s.connection.idle
        s.connection.expire()  # before its deadline
        assert (await s.peer.goaway())[0] == ErrorCodes.NO_ERROR


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (LOGS, "OTEL_LOGS_EXPORTER=none"),
        (METRICS, "OTEL_METRICS_EXPORTER=none"),
        ("/a.B/C", "TraceService/Export"),
        ("/", "TraceService/Export"),
    ],
)
async def test_other_methods_are_unimplemented(autojump_clock, path, says):
    async with serving() as s:
        answer = await s.peer.ask(b"data", path)
        assert answer.status == UNIMPLEMENTED
        assert says in answer.message
    assert not s.bodies
    assert not any(s.admission.refusals.spans.values())


async def test_two_tenants_are_refused(autojump_clock):
    async with serving() as s:
        head = [*s.peer.head(), (b"x-scope-orgid", b"acme"), (b"x-scope-orgid", b"beta")]
        s.peer.head = lambda *_, **__: head
        answer = await s.peer.ask(b"spans")
        assert answer.status == INVALID
        assert "'acme, beta' is not a tenant name" in answer.message


async def test_what_is_no_grpc_is_told_where_it_is(autojump_clock):
    async with serving() as s:
        answer = await s.peer.ask(b"{}", "/v1/traces", content_type="application/json")
        assert answer.headers[b":status"] == b"415"
        assert b"ingest.address" in answer.data


async def test_http1_is_answered_in_http1(autojump_clock):
    async with serving(start=False) as s:
        await s.peer.send_raw(b"POST /v1/traces HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = bytes(await s.peer.stream.receive_some())
        assert answer.startswith(b"HTTP/1.1 505 ")
        assert b"ingest.address (4318)" in answer


@pytest.mark.parametrize("timeout", ["", "1", "S", "1X", "123456789S", "-1S"])
async def test_a_malformed_timeout(autojump_clock, timeout):
    async with serving() as s:
        assert (await s.peer.ask(b"spans", grpc_timeout=timeout)).status == INVALID


async def test_deadlines(autojump_clock):
    async with serving(ScriptedQueue(outcome=None)) as s:
        assert (await s.peer.ask(b"spans", grpc_timeout="0n")).status == DEADLINE
        assert not s.bodies
        start = trio.current_time()
        assert (await s.peer.ask(b"spans", grpc_timeout="3500m")).status == DEADLINE
        assert 3.5 <= trio.current_time() - start <= 5
    assert s.bodies == [b"spans"]


async def test_an_outcome_that_is_not_known_in_time(autojump_clock):
    async with serving(ScriptedQueue(outcome=None), answer_timeout_seconds=10) as s:
        answer = await s.peer.ask(b"spans")
        assert answer.status == UNAVAILABLE
        assert b"grpc-status-details-bin" in answer.headers
    assert s.admission.refusals.requests["unavailable"] == 1


async def test_a_message_that_does_not_arrive(autojump_clock):
    async with serving(body_timeout_seconds=5) as s:
        stream = await s.peer.begin()
        await s.peer.send_data(stream, prefixed(b"spans")[:-1])
        answer = await s.peer.answer(stream)
        assert answer.status == UNAVAILABLE
        assert (await s.peer.ask(b"more")).status == OK
    assert s.admission.refusals.requests["slow_body"] == 1


async def test_a_cancelled_call_does_not_disturb_others(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        half = await s.peer.begin()
        await s.peer.send_data(half, prefixed(bytes(1000))[:500])
        queued = await s.peer.call(b"queued")
        for stream in (half, queued):
            s.peer.h2.reset_stream(stream, ErrorCodes.CANCEL)
        await s.peer.flush()
        await trio.testing.wait_all_tasks_blocked()
        assert s.admission.buffered_bytes == len(b"queued")  # it is in the pipeline, and stays so
        queue.taken[0].reply.set(Done(1))
        queue.outcome = Done(1)
        assert (await s.peer.ask(b"next")).status == OK
    assert s.bodies == [b"queued", b"next"]
    assert s.admission.accepted_requests == 2


async def test_calls_are_answered_in_the_order_of_their_outcomes(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        streams = [await s.peer.call(b"%d" % i) for i in range(MAX_STREAMS)]
        await trio.testing.wait_all_tasks_blocked()
        for i, request in enumerate(reversed(queue.taken)):
            request.reply.set(Done(1))
            answer = await s.peer.answer(streams[-1 - i])
            assert answer.status == OK
    assert len(s.bodies) == MAX_STREAMS


async def test_windows_open_for_incomplete_messages_and_close_for_those_that_wait(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        large = bytes(WINDOW_BYTES)
        first = await s.peer.call(large)
        await trio.testing.wait_all_tasks_blocked()
        assert len(queue.taken) == 1
        left = s.peer.h2.outbound_flow_control_window
        assert left < WINDOW_BYTES
        second = await s.peer.begin()
        part = prefixed(bytes(left * 2))
        await s.peer.send_data(second, part[:left])
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(5):
            while True:
                await s.peer.read()
        assert s.peer.h2.outbound_flow_control_window == 0  # nothing more until the first is done
        queue.taken[0].reply.set(Done(1))
        queue.outcome = Done(1)
        await s.peer.send_data(second, part[left:], end=True)
        for stream in (first, second):
            assert (await s.peer.answer(stream)).status == OK


async def test_a_small_window_of_the_client_delays_the_answer(autojump_clock):
    async with serving(ScriptedQueue(outcome=Done(1, 1, "x" * 500))) as s:
        s.peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await s.peer.flush()
        stream = await s.peer.call(b"spans")
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            s.peer.h2.increment_flow_control_window(200, stream)
            await s.peer.flush()
        answer = await s.peer.answer(stream)
        assert answer.status == OK
        assert len(answer.data) > 500


async def test_a_window_that_stays_closed_costs_the_call_only(autojump_clock):
    async with serving() as s:
        s.peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await s.peer.flush()
        answer = await s.peer.ask(b"spans")
        assert answer.reset == ErrorCodes.CANCEL
        s.peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 65_535})
        await s.peer.flush()
        assert (await s.peer.ask(b"spans")).status == OK


async def test_pings_are_answered(autojump_clock):
    async with serving() as s:
        s.peer.h2.ping(b"12345678")
        await s.peer.flush()
        await s.peer.until(lambda: s.peer.saw(h2.events.PingAckReceived))
        assert s.peer.saw(h2.events.PingAckReceived)[0].ping_data == b"12345678"


async def test_health(autojump_clock):
    name = b"opentelemetry.proto.collector.trace.v1.TraceService"
    async with serving() as s:
        for request in (b"", b"\x0a\x00", b"\x0a%c%b" % (len(name), name)):
            answer = await s.peer.ask(request, methods.CHECK)
            assert (answer.status, answer.data) == (OK, prefixed(methods.SERVING))
        assert (await s.peer.ask(b"\x0a\x01x", methods.CHECK)).status == NOT_FOUND
        for request in (b"\x08\x01", b"\x0a\x05x", b"\x0a", bytes(2000), b"\x0a\x01\xff"):
            assert (await s.peer.ask(request, methods.CHECK)).status == INVALID
        s.admission.pause()
        assert (await s.peer.ask(b"", methods.CHECK)).data == prefixed(methods.NOT_SERVING)
        assert (await s.peer.ask(b"spans")).status == UNAVAILABLE


async def test_watching_health(autojump_clock):
    async with serving() as s:
        watching = s.peer.answers[await s.peer.call(b"", methods.WATCH)]
        unknown = s.peer.answers[await s.peer.call(b"\x0a\x01x", methods.WATCH)]
        await s.peer.until(lambda: watching.data and unknown.data)
        assert watching.data == prefixed(methods.SERVING)
        assert unknown.data == prefixed(methods.SERVICE_UNKNOWN)
        s.admission.pause()
        await s.peer.until(lambda: len(watching.data) > 7)
        assert watching.data == prefixed(methods.SERVING) + prefixed(methods.NOT_SERVING)
        s.connection.retire()
        await s.peer.until(lambda: watching.ended and unknown.ended)
        assert watching.status == unknown.status == UNAVAILABLE


async def test_an_idle_connection_ends(autojump_clock):
    async with serving(keep_alive_seconds=60) as s:
        await s.peer.ask(b"spans")
        start = trio.current_time()
        assert await s.peer.goaway() == (ErrorCodes.NO_ERROR, "the connection is idle")
        assert 60 <= trio.current_time() - start <= 62


async def test_a_preface_that_does_not_come(autojump_clock):
    async with serving(start=False, head_timeout_seconds=5) as s:
        await s.peer.send_raw(b"PRI * HT")
        start = trio.current_time()
        assert await s.peer.stream.receive_some() == b""
        assert trio.current_time() - start <= 7


async def test_a_header_block_that_does_not_end(autojump_clock):
    async with serving(head_timeout_seconds=5) as s:
        await s.peer.send_raw(b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82")  # no END_HEADERS
        start = trio.current_time()
        await s.peer.goaway()
        assert trio.current_time() - start <= 7


async def test_a_header_block_in_slow_parts_does_not_gain_time(autojump_clock):
    async with serving(head_timeout_seconds=5) as s:
        await s.peer.send_raw(frames.make(frames.HEADERS, 0, 1, b"\x82"))
        start = trio.current_time()
        for _ in range(3):
            await trio.sleep(2.4)
            if s.done.is_set():
                break
            await s.peer.send_raw(frames.make(frames.CONTINUATION, 0, 1, b"\x82"))
        await s.peer.goaway()
        assert trio.current_time() - start <= 7.5


async def test_reads_that_end_within_frames_are_not_slow(autojump_clock):
    """A busy connection is rarely read up to the end of a frame."""
    ping = frames.make(frames.PING, 0, 0, bytes(8))
    async with serving(head_timeout_seconds=5, keep_alive_seconds=100) as s:
        await s.peer.send_raw(ping[:4])
        for _ in range(20):
            await trio.sleep(1)
            await s.peer.send_raw(ping[4:] + ping[:4])
        await s.peer.send_raw(ping[4:])
        assert (await s.peer.ask(b"spans")).status == OK


async def test_a_stop_answers_what_is_under_way(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        stream = await s.peer.call(b"spans")
        await trio.testing.wait_all_tasks_blocked()
        s.admission.drain()
        s.connection.retire()
        await s.peer.until(lambda: s.peer.saw(h2.events.ConnectionTerminated))
        queue.taken[0].reply.set(Done(1))
        assert (await s.peer.answer(stream)).status == OK
        with trio.fail_after(4):
            await s.done.wait()
        assert s.admission.accepted_requests == 1


async def test_a_stop_ends_an_idle_connection_soon(autojump_clock):
    async with serving() as s:
        s.connection.retire()
        with trio.fail_after(1):
            await s.peer.goaway()


async def test_what_is_still_arriving_at_the_end_of_the_grace_is_refused(autojump_clock):
    async with serving() as s:
        stream = await s.peer.begin()
        await trio.testing.wait_all_tasks_blocked()
        s.admission.drain()
        s.connection.give_up()
        answer = await s.peer.answer(stream)
        assert answer.status == UNAVAILABLE
        assert "shutting down" in answer.message


async def test_a_client_that_goes_away(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        half = await s.peer.begin()
        await s.peer.send_data(half, prefixed(bytes(100))[:50])
        await s.peer.call(b"queued")
        await trio.testing.wait_all_tasks_blocked()
        await s.peer.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert not s.done.is_set()
        queue.taken[0].reply.set(Done(1))
    assert s.admission.accepted_requests == 1


async def test_a_goaway_of_the_client_lets_its_calls_finish(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        stream = await s.peer.call(b"spans")
        await s.peer.send_raw(b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + bytes(8))
        await trio.testing.wait_all_tasks_blocked()
        queue.taken[0].reply.set(Done(1))
        assert (await s.peer.answer(stream)).status == OK
        await s.peer.until(lambda: s.peer.closed, seconds=5)


async def test_errors_of_clients_are_logged_once_a_minute(autojump_clock, caplog):
    async with serving() as s:
        for _ in range(3):
            await s.peer.ask(b"", LOGS)
        assert len(caplog.records) == 1
        assert "192.0.2.1" in caplog.text
        assert "OTEL_LOGS_EXPORTER=none" in caplog.text
        await trio.sleep(61)
        await s.peer.ask(b"", LOGS)
        assert "2 more since the last line" in caplog.text
    assert s.admission.refusals.requests["logs"] == 4
