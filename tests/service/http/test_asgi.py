import datetime
import gzip
import ipaddress
import ssl

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.rpc.status_pb2 import Status

from service.http.asgi import ListenError, ingest_app, serve
from service.http.ingest import Edge
from service.http.request import Done
from service.settings import Ingest, Tls
from service.tenants import Quotas

from .helpers import ScriptedQueue, serving

MIB = 1 << 20
PROTOBUF = {"content-type": "application/x-protobuf"}


def make(queue=None, **settings):
    ingest = Ingest(**settings)
    queue = queue or ScriptedQueue()
    edge = Edge(ingest, queue, Quotas())
    return ingest_app(edge, ingest), edge, queue


def post(body, *headers, path="/v1/traces"):
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/x-protobuf", *headers]
    if not any("content-length" in line or "chunked" in line for line in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


async def test_a_request_and_its_answer():
    app, edge, queue = make()
    async with serving(app) as server, httpx.AsyncClient() as client:
        url = server.url + "/v1/traces"
        answer = await client.post(url, content=b"abc", headers=PROTOBUF)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == "application/x-protobuf"
        body = gzip.compress(b"x" * 300_000)
        answer = await client.post(
            url, content=body, headers={**PROTOBUF, "content-encoding": "gzip"}
        )
        assert answer.status_code == 200
        answer = await client.post(url, json={})
        assert answer.json() == {}
    assert [r.body for r in queue.taken] == [b"abc", body, b"{}"]
    assert queue.taken[1].encoding == "gzip"
    assert edge.buffered_bytes == 0


async def test_a_body_of_20_mib_is_taken_and_one_byte_more_is_not():
    app, edge, queue = make()
    async with serving(app) as server, httpx.AsyncClient(timeout=20) as client:
        url = server.url + "/v1/traces"
        answer = await client.post(url, content=bytes(20 * MIB), headers=PROTOBUF)
        assert answer.status_code == 200
        answer = await client.post(url, content=bytes(20 * MIB + 1), headers=PROTOBUF)
        assert answer.status_code == 413
        assert "20971520" in Status.FromString(answer.content).message
    assert [len(r.body) for r in queue.taken] == [20 * MIB]
    assert edge.buffered_bytes == 0


async def test_a_chunked_body_over_the_limit_is_refused_while_it_arrives():
    app, edge, queue = make(max_body_bytes=100_000)
    async with serving(app) as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked") + chunk(bytes(60_000)) * 2)
        status, _, body = await client.response()  # the body is not yet complete
        assert status == 413
        assert "100000 bytes" in Status.FromString(body).message
        await client.send(chunk(b"x") + b"0\r\n\r\n")
        await client.send(post(b"next"))  # the rest was read, so the connection goes on
        assert (await client.response())[0] == 200
    assert [r.body for r in queue.taken] == [b"next"]
    assert edge.buffered_bytes == 0


async def test_a_chunked_body_that_never_ends_is_cut_off():
    app, edge, queue = make(max_body_bytes=100_000)
    async with serving(app) as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked"))
        megabyte = chunk(bytes(MIB))
        with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
            await client.send(megabyte * 100)
    assert queue.taken == []
    assert edge.refused_requests["too_large"] == 1


async def test_a_chunked_body_within_the_limit():
    app, _, queue = make()
    async with serving(app) as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked") + chunk(b"ab"))
        await trio.sleep(0.01)
        await client.send(chunk(b"cd") + b"0\r\n\r\n")
        assert (await client.response())[0] == 200
    assert [r.body for r in queue.taken] == [b"abcd"]


async def test_a_slow_body_is_given_up_with_a_503():
    app, edge, _ = make(body_timeout_seconds=0.2)
    async with serving(app) as server:
        client = await server.connect()
        await client.send(post(b"abc", "content-length: 10"))
        status, headers, body = await client.response()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert "in time" in Status.FromString(body).message
        assert await client.closed()
    assert edge.refused_requests["slow_body"] == 1
    assert edge.buffered_bytes == 0


async def test_a_client_that_goes_away_within_its_body_leaves_nothing():
    app, edge, queue = make()
    async with serving(app) as server:
        client = await server.connect()
        await client.send(post(b"abc", "content-length: 10"))
        while not edge.buffered_bytes:
            await trio.sleep(0.01)
        await client.stream.aclose()
        with trio.fail_after(5):
            while edge.buffered_bytes:
                await trio.sleep(0.01)
    assert queue.taken == []


async def test_a_client_that_goes_away_while_queued_is_accepted_all_the_same():
    app, edge, queue = make(ScriptedQueue(outcome=None))
    async with serving(app) as server:
        client = await server.connect()
        await client.send(post(b"abc"))
        while not queue.taken:
            await trio.sleep(0.01)
        await client.stream.aclose()
        await trio.sleep(0.05)
        queue.taken[0].reply.set(Done(1))
        with trio.fail_after(5):
            while not edge.accepted_requests:
                await trio.sleep(0.01)
    assert edge.buffered_bytes == 0


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_other_methods(method):
    app, _, _ = make()
    async with serving(app) as server, httpx.AsyncClient() as client:
        for _ in range(2):  # the second on the same connection
            answer = await client.request(method, server.url + "/v1/traces")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert bool(answer.content) is (method == "GET")


async def test_pipelined_requests_are_answered_in_order():
    app, _, queue = make()
    async with serving(app) as server:
        client = await server.connect()
        get = b"GET /v1/traces HTTP/1.1\r\nhost: x\r\n\r\n"
        await client.send(post(b"one") + get + post(b"two", path="/nothing") + post(b"three"))
        assert [(await client.response())[0] for _ in range(4)] == [200, 405, 404, 200]
    assert [r.body for r in queue.taken] == [b"one", b"three"]


async def test_a_refusal_before_the_body_keeps_the_connection():
    app, _, queue = make(ScriptedQueue(fill=0.95))
    async with serving(app) as server:
        client = await server.connect()
        await client.send(post(b"x" * 300_000))
        status, headers, _ = await client.response()
        assert (status, headers["retry-after"]) == (503, "1")
        queue.fill = 0.5
        await client.send(post(b"again"))
        assert (await client.response())[0] == 200
    assert [r.body for r in queue.taken] == [b"again"]


async def test_expect_100_continue():
    app, _, queue = make()
    async with serving(app) as server:
        client = await server.connect()
        await client.send(post(b"", "expect: 100-continue", "content-length: 3"))
        assert (await client.response())[0] == 100
        await client.send(b"abc")
        assert (await client.response())[0] == 200
        await client.send(post(b"", "expect: 100-continue", "content-length: 30000000"))
        assert (await client.response())[0] == 100
        assert (await client.response())[0] == 413
    assert len(queue.taken) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/traces HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 40_000,
    ],
)
async def test_what_is_not_http_is_answered_and_ended(raw):
    app, _, queue = make()
    async with serving(app) as server:
        client = await server.connect()
        await client.send(raw)
        assert (await client.response())[0] in (400, 431)
        assert await client.closed()
    assert queue.taken == []


async def test_a_websocket_is_refused():
    app, _, _ = make()
    async with serving(app) as server, httpx.AsyncClient() as client:
        answer = await client.get(
            server.url + "/v1/traces",
            headers={
                "connection": "Upgrade",
                "upgrade": "websocket",
                "sec-websocket-version": "13",
                "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
            },
        )
        assert answer.status_code == 403


async def test_a_request_in_progress_is_answered_at_shutdown():
    app, _, queue = make(ScriptedQueue(outcome=None))
    async with serving(app) as server:
        client = await server.connect()
        idle = await server.connect()
        await client.send(post(b"abc"))
        while not queue.taken:
            await trio.sleep(0.01)
        server.shutdown.set()
        await trio.sleep(0.05)
        queue.taken[0].reply.set(Done(1))
        assert (await client.response())[0] == 200
        assert await client.closed(2)
        assert await idle.closed(2)


async def test_an_address_in_use_is_told_in_a_sentence():
    app, _, _ = make()
    async with serving(app) as server:
        with pytest.raises(ListenError, match=r"in use\); end the program that uses it"):
            await serve(app, f"127.0.0.1:{server.port}", trio.Event())


async def test_an_address_of_another_machine_is_told_in_a_sentence():
    with pytest.raises(ListenError, match="choose an address of this machine"):
        await serve(make()[0], "192.0.2.1:0", trio.Event())


async def test_a_certificate_that_is_missing_is_told_in_a_sentence(tmp_path):
    tls = Tls(certificate=str(tmp_path / "c.pem"), key=str(tmp_path / "k.pem"))
    with pytest.raises(ListenError, match=r"cannot be used.*check tls.certificate and tls.key"):
        await serve(make()[0], "127.0.0.1:0", trio.Event(), tls=tls)


async def test_tls_and_http2(tmp_path):
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    write_certificate(certificate, key)
    app, _, queue = make()
    async with serving(app, tls=Tls(certificate=str(certificate), key=str(key))) as server:
        assert server.url.startswith("https://")

        context = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(verify=context) as client:
            url = server.url + "/v1/traces"
            assert (await client.post(url, content=b"a", headers=PROTOBUF)).status_code == 200
        plain = await server.connect()
        await plain.send(post(b"x"))
        assert await plain.closed(5)
    assert len(queue.taken) == 1


def write_certificate(certificate, key):
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
