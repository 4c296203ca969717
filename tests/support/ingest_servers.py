"""What the tests of the ingestion listener share: a running listener and raw requests."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from betrace.service.config.edge import Ingest, Tls
from betrace.service.receiver.admission import Admission
from betrace.service.receiver.grpc_server import serve_grpc
from betrace.service.receiver.server import serve_ingest
from betrace.service.tenancy.quotas import SpanQuotas
from tests.support.http_requests import ScriptedQueue, Served

MIB = 1 << 20


@dataclass
class Listening(Served):
    """A listener, its admission, and the requests that the admission queued."""

    admission: Admission = None
    queue: ScriptedQueue = None

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(request.body) for request in self.queue.taken]


@asynccontextmanager
async def listening(
    queue: ScriptedQueue | None = None,
    *,
    grpc: bool = False,
    tls: Tls | None = None,
    grace_seconds: float = 2,
    address: str = "127.0.0.1:0",
    authenticator=None,
    **settings,
) -> AsyncIterator[Listening]:
    """The listener, of HTTP or ``grpc``, on a free port while the context is open. Fails if it does
    not end within a minute after that, or if memory stays reserved."""
    ingest = Ingest(**settings)
    queue = queue or ScriptedQueue()
    admission = Admission(ingest, queue, SpanQuotas(), authenticator)
    shutdown = trio.Event()
    options = {"tls": tls, "grace_seconds": grace_seconds}
    start = partial(serve_ingest, admission, ingest, address, shutdown, **options)
    if grpc:
        ingest = ingest.model_copy(update={"grpc_address": address})
        start = partial(serve_grpc, admission, ingest, shutdown, **options)
    async with trio.open_nursery() as nursery:
        served = Listening(await nursery.start(start), shutdown, admission=admission, queue=queue)
        try:
            yield served
        finally:
            for client in served.clients:
                await trio.aclose_forcefully(client.stream)
            shutdown.set()
            nursery.cancel_scope.deadline = trio.current_time() + 60
    assert not nursery.cancel_scope.cancelled_caught
    assert admission.buffered_bytes == 0


def post(body: bytes, *headers: str, path: str = "/v1/traces", version: str = "1.1") -> bytes:
    """A request as bytes, with Content-Length unless ``headers`` give the length."""
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/x-protobuf"]
    lines += headers
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def until(condition) -> None:
    """Wait until ``condition()`` holds, a minute at most."""
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.005)


def write_certificate(directory) -> Tls:
    """A self-signed certificate for 127.0.0.1."""
    certificate, key = directory / "c.pem", directory / "k.pem"
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Tls(certificate=str(certificate), key=str(key))
