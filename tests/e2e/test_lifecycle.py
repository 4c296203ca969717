"""Starting, reloading, stopping and restarting the real process."""

from __future__ import annotations

import http.client
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.process import Running, command, environment, running, wait_for

pytestmark = pytest.mark.slow


def loops(trace: int, spans: int = 4) -> tuple[bytes, str]:
    """Return a trace that violates ``too-many-spans``, and its id."""
    request = ExportTraceServiceRequest()
    trace_id = trace.to_bytes(16, "big")
    inner = request.resource_spans.add().scope_spans.add().spans
    now = time.time_ns()
    for number in range(spans):
        inner.add(
            trace_id=trace_id,
            span_id=(number + 1).to_bytes(8, "big"),
            name="loop",
            start_time_unix_nano=now,
            end_time_unix_nano=now + 1000,
        )
    return request.SerializeToString(), trace_id.hex()


def test_sigterm_drains_and_a_restart_loses_nothing(tmp_path: Path) -> None:
    sent = []
    with running(tmp_path, shutdown__grace_seconds="300") as service:
        for number in range(1, 41):
            body, trace_id = loops(number)
            assert service.send(body).status_code == 200
            sent.append(trace_id)
        # While they are in flight; it waits for less than the grace period.
        assert service.stop() == 0, "".join(service.log)
    assert not [line for line in service.log if "Traceback" in line], "".join(service.log)
    with running(tmp_path) as service:

        def found() -> bool:
            listed = service.get("/api/v1/signals?limit=1000").json()["signals"]
            return sorted(s["trace_id"] for s in listed) == sent

        wait_for(found)
        assert service.stop() == 0


@contextmanager
def begin(service: Running, length: int) -> Iterator[http.client.HTTPConnection]:
    """A connection on which only the head of a request was sent."""
    connection = http.client.HTTPConnection(service.ingest.removeprefix("http://"), timeout=60)
    with closing(connection):
        connection.putrequest("POST", "/v1/traces")
        connection.putheader("content-type", "application/x-protobuf")
        connection.putheader("content-length", str(length))
        connection.endheaders()
        yield connection


def test_shutdown_waits_for_a_body_that_is_arriving(tmp_path: Path) -> None:
    slow, arrived = loops(1)
    kept, other = loops(2)
    assert len(slow) == len(kept)
    half = len(slow) // 2
    with running(tmp_path) as service, ExitStack() as stack:
        arriving, busy = [stack.enter_context(begin(service, len(slow))) for _ in range(2)]
        arriving.send(slow[:half])
        busy.send(kept[:1])
        time.sleep(0.5)  # both are being read
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: any("draining" in line for line in service.log))
        for byte in slow[half:]:
            time.sleep(1.5 / half)
            arriving.send(bytes([byte]))
        busy.send(kept[1:])
        for connection in (arriving, busy):
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"")
            assert answer.getheader("connection") == "close"
        assert service.process.wait(60) == 0, "".join(service.log)
    assert not [line for line in service.log if "Traceback" in line], "".join(service.log)
    with running(tmp_path) as service:
        for trace_id in (arrived, other):
            wait_for(lambda found=trace_id: service.signals(found))
        assert service.stop() == 0


def test_shutdown_does_not_wait_for_a_body_that_never_arrives(tmp_path: Path) -> None:
    limits = {"shutdown__grace_seconds": "4", "ingest__body_timeout_seconds": "300"}
    with running(tmp_path, **limits) as service, begin(service, 1000) as never:
        never.send(b"x")
        time.sleep(0.2)
        service.process.send_signal(signal.SIGTERM)
        assert never.getresponse().status == 503
        assert service.process.wait(60) == 0, "".join(service.log)


def test_sighup_reads_the_rules(tmp_path: Path) -> None:
    with running(tmp_path, rules__poll_seconds="600") as service:
        rules = tmp_path / "rules" / "more.yaml"
        rules.write_text("rules: [{id: new-one, condition: fresh}]\n")
        service.process.send_signal(signal.SIGHUP)

        def there() -> bool:
            listed = service.get("/api/v1/rules").json()["rules"]
            return "new-one" in {rule["id"] for rule in listed}

        wait_for(there)
        rules.write_text("rules: [{id: new-one, condition: 'fresh and'}]\n")
        service.process.send_signal(signal.SIGHUP)
        wait_for(lambda: any("more.yaml" in line for line in service.log))
        assert there()  # the last valid version
        assert service.stop() == 0


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with running(tmp_path, shutdown__delay_seconds="60") as service:
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: any("stopping" in line for line in service.log))
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 128 + signal.SIGINT


def test_a_directory_or_port_in_use_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        port = service.ingest.rpartition(":")[2]
        same_data = ["serve", "--data", str(tmp_path / "data")]
        same_port = ["serve", "--data", str(tmp_path / "other"), "--ingest", f"127.0.0.1:{port}"]
        free = ["--grpc", "127.0.0.1:0", "--api", "127.0.0.1:0", "--metrics", "off"]
        for arguments, said in (
            ([*same_data, "--ingest", "127.0.0.1:0"], "another data directory"),
            (same_port, "choose another port"),
        ):
            other = subprocess.run(
                command(*arguments, *free),
                env=environment(),
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert other.returncode == 3
            assert said in other.stderr
            assert "Traceback" not in other.stderr
            assert other.stdout == ""
        assert service.stop() == 0
