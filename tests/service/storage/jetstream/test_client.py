"""The connection: calls, cancellation, closing, and servers that are not there."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from betrace.service.cli.demo.ports import free_port
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream import resize, setup
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import Spans, TenantFrame, pack
from betrace.service.storage.jetstream.errors import (
    JetStreamError,
    MessageTooLarge,
    NatsUnavailable,
    NotInStream,
    StreamFull,
    WrongLastSequence,
    reply_error,
)
from betrace.service.storage.jetstream.generations import (
    Finished,
    Generations,
    finished_key,
)
from betrace.service.storage.jetstream.layout import (
    Layout,
    pack_log_position,
    unpack_log_position,
)
from betrace.service.storage.jetstream.nats import Nats, server_time_ns
from betrace.service.storage.jetstream.setup import SetupError
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.spanlog.errors import FrameMissing
from betrace.service.storage.spanlog.frames import Frame
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers, connected


@pytest.fixture
async def connection(settings: ClusterSettings) -> AsyncIterator[NatsClient]:
    """A client without streams."""
    client = await NatsClient.connect(settings, "test")
    try:
        yield client
    finally:
        await client.close()


async def append_many(log: SpanStreams, number: int, size: int) -> None:
    for k in range(number):
        await log.append(0, bytes(size), f"a{k}")


async def until_unavailable(log: SpanStreams) -> None:
    with trio.fail_after(60):
        while True:
            try:
                await log.last(0)
            except NatsUnavailable:
                return


async def forever(nats: Nats) -> None:
    await asyncio.Event().wait()


async def test_calls_run_side_by_side_and_return_results_and_errors(
    connection: NatsClient,
) -> None:
    async def double(nats: Nats, number: int) -> int:
        await asyncio.sleep(0.01)
        if number == 3:
            raise ValueError("three")
        return 2 * number

    results: dict[int, int | str] = {}

    async def one(number: int) -> None:
        try:
            results[number] = await connection.call(lambda nats: double(nats, number))
        except ValueError as error:
            results[number] = str(error)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(one, number)
    assert results == {0: 0, 1: 2, 2: 4, 3: "three", 4: 8}
    assert connection.connected
    assert connection.max_payload == 8 << 20


async def test_runs_of_trio_in_several_threads_get_their_own_results(
    connection: NatsClient,
) -> None:
    """The archive of a query node runs Trio in a thread of its own, with the same client."""
    release = asyncio.Event()

    async def wait(nats: Nats) -> str:
        await release.wait()
        return "first"

    async def let_go(nats: Nats) -> str:
        release.set()
        await asyncio.sleep(0.05)
        return "second"

    found: list[str] = []

    async def call() -> None:
        found.append(await connection.call(wait))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            second = await trio.to_thread.run_sync(trio.run, connection.call, let_go)
    assert (found, second) == (["first"], "second")


async def test_a_cancelled_call_ends_at_once_and_its_coroutine_too(
    connection: NatsClient,
) -> None:
    ended = threading.Event()

    async def wait(nats: Nats) -> None:
        try:
            await forever(nats)
        finally:
            ended.set()

    with trio.move_on_after(0.05) as scope:
        await connection.call(wait)
    assert scope.cancelled_caught
    assert await trio.to_thread.run_sync(ended.wait, 60)


async def test_a_call_that_takes_too_long_is_unavailable(connection: NatsClient) -> None:
    with pytest.raises(NatsUnavailable, match=r"within 0\.01 s"):
        await connection.call(forever, 0.01)
    with pytest.raises(NatsUnavailable, match=r"within 0\.01 s"):
        await trio.to_thread.run_sync(connection.call_blocking, forever, 0.01)


async def test_closing_ends_calls_that_wait(settings: ClusterSettings) -> None:
    client = await NatsClient.connect(settings, "test")
    errors: list[NatsUnavailable] = []

    async def call() -> None:
        try:
            await client.call(forever, None)
        except NatsUnavailable as error:
            errors.append(error)

    def call_blocking() -> None:
        try:
            client.call_blocking(forever, None)
        except NatsUnavailable as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        nursery.start_soon(trio.to_thread.run_sync, call_blocking)
        await trio.sleep(0.05)
        gc.collect()  # once collected the task of a call, which then never returned
        await client.close()
    assert len(errors) == 2
    await client.close()
    with pytest.raises(NatsUnavailable, match="closed"):
        await client.call(forever)
    with pytest.raises(NatsUnavailable, match="closed"):
        client.call_blocking(forever)
    assert not client.connected


async def test_a_request_that_nobody_answers(connection: NatsClient) -> None:
    with pytest.raises(NatsUnavailable, match="no server answers on nobody"):
        await connection.call(lambda nats: nats.request("nobody.listens"))
    async with trio.open_nursery() as nursery:
        heard = trio.Event()
        trio_token = trio.lowlevel.current_trio_token()

        async def listen(nats: Nats) -> None:
            async def receive(message: object) -> None:
                trio_token.run_sync_soon(heard.set)

            await nats.nc.subscribe("silent", cb=receive)
            await nats.nc.flush()

        await connection.call(listen)

        async def ask() -> None:
            with pytest.raises(NatsUnavailable, match="no reply on silent within"):
                await connection.call(lambda nats: nats.request("silent", seconds=0.05))

        nursery.start_soon(ask)
        with trio.fail_after(60):
            await heard.wait()


async def test_without_servers_the_start_gives_up(tmp_path: Path) -> None:
    port = free_port()
    settings = ClusterSettings(servers=f"nats://127.0.0.1:{port}", connect_seconds=0.3)
    with pytest.raises(NatsUnavailable, match=f"no NATS server answers at .*{port}"):
        await NatsClient.connect(settings, "test")
    with trio.move_on_after(0.05) as scope:
        more = settings.model_copy(update={"connect_seconds": 1000})
        await NatsClient.connect(more, "test")
    assert scope.cancelled_caught
    with trio.fail_after(60):  # the thread ends
        while any(thread.name == "nats test" for thread in threading.enumerate()):
            await trio.sleep(0.01)


async def test_calls_fail_while_the_server_is_away_and_succeed_afterwards(
    tmp_path: Path,
) -> None:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path) as servers:
        settings = servers.settings(partitions=1)
        async with connected(settings) as client:
            log = SpanStreams(client, Layout.of(settings))
            await log.append(0, b"x", "first")
            (server,) = servers.servers
            server.freeze()

            async def wait() -> None:
                with pytest.raises(NatsUnavailable):
                    await client.call(lambda nats: nats.request("x", seconds=1000), 1000)

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait)
                    await trio.sleep(0.05)
                    server.kill()  # the request fails now, and not after its time
            await until_unavailable(log)
            server.start()
            with trio.fail_after(60):
                assert await log.append(0, b"y", "second") == 2
            assert client.reconnects >= 1


async def test_a_full_stream_refuses_until_something_is_deleted(
    connection: NatsClient, settings: ClusterSettings
) -> None:
    small = settings.model_copy(update={"partition_bytes": 20_000})
    await setup.set_up(connection, small)
    log = SpanStreams(connection, Layout.of(small))
    with pytest.raises(StreamFull):
        await append_many(log, 10, 5000)
    last = await log.last(0)
    assert last < 10
    with pytest.raises(StreamFull):
        await log.append(0, bytes(5000), f"a{last}")
    assert await log.append(0, bytes(5000), "a0") == 1  # a repeated id is no new message
    await log.forget_before(0, 3)
    assert await log.append(0, bytes(5000), f"a{last}") == last + 1


async def test_a_full_server_refuses(tmp_path: Path) -> None:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path, store_bytes=1 << 20) as servers:
        settings = servers.settings(partitions=1)
        async with connected(settings) as client:
            log = SpanStreams(client, Layout.of(settings))
            with pytest.raises(StreamFull):
                await append_many(log, 20, 100_000)
            assert len(await log.read(0, 0, 8 << 20, 0)) == await log.last(0) > 0


@pytest.mark.parametrize(
    ("configuration", "right"),
    [
        ("user: ann, password: secret", {"user": "ann", "password": SecretStr("secret")}),
        ("token: secret", {"token": SecretStr("secret")}),
    ],
)
async def test_servers_that_require_authentication(
    tmp_path: Path, configuration: str, right: dict[str, object]
) -> None:
    if PROGRAM is None:
        pytest.skip(MISSING)
    servers = NatsServers(tmp_path)
    servers.servers[0].more_configuration = f"authorization {{ {configuration} }}"
    with servers:
        client = await NatsClient.connect(servers.settings(**right), "test")
        assert await client.call(lambda nats: nats.api("INFO"))
        await client.close()
        for wrong in ({}, {"token": SecretStr("wrong")}):
            settings = servers.settings(connect_seconds=600, **wrong)
            with pytest.raises(NatsUnavailable, match=r"(?i)authorization"):
                await NatsClient.connect(settings, "test")


async def test_a_server_with_tls(tmp_path: Path) -> None:
    if PROGRAM is None:
        pytest.skip(MISSING)
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    _write_certificate(certificate, key)
    servers = NatsServers(tmp_path)
    servers.servers[
        0
    ].more_configuration = f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}'
    with servers:
        client = await NatsClient.connect(servers.settings(tls_ca=str(certificate)), "test")
        assert await client.call(lambda nats: nats.api("INFO"))
        await client.close()


def _write_certificate(certificate: Path, key: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(True, None), True)
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


# Setup


async def test_setting_up_is_idempotent_and_adapts(
    connection: NatsClient, settings: ClusterSettings
) -> None:
    with pytest.raises(SetupError, match="run: betrace cluster init"):
        await setup.check(connection, settings)
    created = await setup.set_up(connection, settings)
    assert len(created) == len(Layout.of(settings).streams())
    assert await setup.set_up(connection, settings) == []
    await setup.check(connection, settings)
    larger = settings.model_copy(update={"partition_bytes": 1 << 30})
    with pytest.raises(SetupError, match=r"max_bytes = -1 instead of 1073741824; run"):
        await setup.check(connection, larger)
    changed = await setup.set_up(connection, larger)
    assert changed == [
        f"changed {settings.prefix}-SPANS-{p}: max_bytes = 1073741824" for p in range(2)
    ]


async def test_the_number_of_partitions_in_the_settings_is_ignored_later(
    connection: NatsClient, settings: ClusterSettings
) -> None:
    await setup.set_up(connection, settings)
    other = settings.model_copy(update={"partitions": 1})
    (said,) = await setup.set_up(connection, other)
    assert said.endswith("has 2 partitions; cluster.partitions = 1 in the configuration is ignored")
    assert await setup.check(connection, other) == Generations.of(2)


async def test_a_change_of_the_number_of_partitions_can_be_repeated(
    connection: NatsClient, settings: ClusterSettings
) -> None:
    with pytest.raises(SetupError, match="there is no cluster"):
        await resize.resize(connection, settings, 4)
    await setup.set_up(connection, settings)
    with pytest.raises(SetupError, match="can only be multiplied"):
        await resize.resize(connection, settings, 3)
    assert await resize.resize(connection, settings, 2) == []
    grown = Generations.of(2).grown(4)
    partly = Layout.of(settings, grown).streams()[3]  # of a command that was interrupted
    await connection.call(lambda nats: nats.api(f"STREAM.CREATE.{partly['name']}", partly))
    assert len(await resize.resize(connection, settings, 4)) == 2 * 4 - 1
    assert await resize.resize(connection, settings, 4) == []
    assert await resize.progress(connection, settings) == (grown, [0, 1])
    assert await setup.check(connection, settings) == grown
    with pytest.raises(SetupError, match="change to 4 partitions is not complete"):
        await resize.resize(connection, settings, 8)
    config = ConfigBucket(connection, Layout.of(settings).config_bucket)
    for partition in range(2):
        await config.put(finished_key(partition), Finished(1, 1).to_json(), 0)
    assert await resize.progress(connection, settings) == (grown, [])
    assert len(await resize.resize(connection, settings, 8)) == 2 * 8


async def test_frames_of_partitions_that_were_added_can_be_read(
    connection: NatsClient, settings: ClusterSettings
) -> None:
    await setup.set_up(connection, settings)
    log = SpanStreams(connection, Layout.of(settings))
    await resize.resize(connection, settings, 4)
    data = pack(Spans([TenantFrame("t", 5, 1, b"x")]))
    sequence = await SpanStreams(connection, Layout.of(settings)).append(4, data, "m")
    positions = [pack_log_position(4, sequence), pack_log_position(9, 1), 1 << 62]
    found = await trio.to_thread.run_sync(log.read_many, "t", positions * 2)
    assert [type(each) for each in found] == [Frame, FrameMissing, FrameMissing] * 2


async def test_streams_that_would_lose_messages_are_refused(
    connection: NatsClient, settings: ClusterSettings
) -> None:
    layout = Layout.of(settings)
    wrong = layout.streams()[0] | {"discard": "old"}
    await connection.call(lambda nats: nats.api(f"STREAM.CREATE.{wrong['name']}", wrong))
    with pytest.raises(SetupError, match="discard = old instead of new"):
        await setup.set_up(connection, settings)


async def test_streams_with_overlapping_subjects_are_refused(
    connection: NatsClient, settings: ClusterSettings
) -> None:
    body = {"name": f"{settings.prefix}-foreign", "subjects": [f"{settings.prefix}.spans.>"]}
    await connection.call(lambda nats: nats.api(f"STREAM.CREATE.{body['name']}", body))
    with pytest.raises(SetupError, match=r"cannot be created or changed: .*overlap"):
        await setup.set_up(connection, settings)


# Without a server


def test_nothing_of_nats_is_imported_without_a_cluster() -> None:
    code = (
        "import sys; from betrace.service.cli.main import main;"
        "import betrace.service.app.builder, betrace.service.cli.serve;"
        "import betrace.service.storage.jetstream.spans, betrace.service.cli.cluster;"
        "sys.exit(any(name.partition('.')[0] == 'nats' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("status", "code", "text", "kind"),
    [
        (503, 10077, "maximum bytes exceeded", StreamFull),
        (503, 10077, "write x: no space left on device", NatsUnavailable),
        (500, 10047, "insufficient storage resources available", StreamFull),
        (400, 10071, "wrong last sequence: 7", WrongLastSequence),
        (400, 10054, "message size exceeds maximum allowed", MessageTooLarge),
        (503, 10008, "JetStream system temporarily unavailable", NatsUnavailable),
        (409, 10158, "duplicate message id is in process", NatsUnavailable),
        (404, 10059, "stream not found", NotInStream),
        (400, 10058, "stream name already in use", JetStreamError),
    ],
)
def test_replies_of_servers(status: int, code: int, text: str, kind: type[Exception]) -> None:
    error = reply_error({"code": status, "err_code": code, "description": text}, "request")
    assert type(error) is kind
    assert text in str(error)


def test_positions_fit_into_64_bits() -> None:
    for partition, sequence in ((0, 1), (15, 2**48 - 1), (1023, 2**40)):
        position = pack_log_position(partition, sequence)
        assert 0 < position < 2**63
        assert unpack_log_position(position) == (partition, sequence)


@pytest.mark.parametrize("text", ["2026-11-29T19:36:36.300643385Z", "2026-11-29T19:36:36Z"])
def test_times_of_servers(text: str) -> None:
    fraction = 300643385 if "." in text else 0
    assert server_time_ns(text) == 1795980996 * 10**9 + fraction


async def test_many_calls_wake_the_client_once(
    connection: NatsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakeups = 0
    held = threading.Event()
    wake = connection._loop.call_soon_threadsafe

    def counted(*arguments: Any) -> Any:
        nonlocal wakeups
        wakeups += 1
        return wake(*arguments)

    async def one(nats: Nats) -> int:
        return 1

    answers: list[int] = []

    async def call() -> None:
        answers.append(await connection.call(one))

    wake(held.wait)  # its thread does nothing meanwhile
    monkeypatch.setattr(connection._loop, "call_soon_threadsafe", counted)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        assert wakeups == 1
        held.set()
    assert answers == [1] * 20
