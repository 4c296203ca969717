"""What the commands share: safe printing, durations and times, and connections to a service."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import httpx
import pytest
from click.testing import CliRunner, Result

from betrace.service.cli.common import (
    Duration,
    Failure,
    Moment,
    print_json,
    print_table,
    printable,
)
from betrace.service.cli.main import cli
from tests.service.cli.test_doctor import certificate

ESCAPE = "\x1b]0;owned\x07\x9b31m\u202eevil\nline"
ESCAPED = r"\x1b]0;owned\x07\x9b31m\u202eevil\nline"


def test_control_characters_are_escaped() -> None:
    assert printable(ESCAPE) == ESCAPED
    assert printable("Zahlung über 1000 € ✓ 支払い") == "Zahlung über 1000 € ✓ 支払い"
    assert printable("\ud800") == r"\ud800"


def test_errors_and_tables_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Failure(f"{ESCAPE}\nsecond").show()
    assert capsys.readouterr().err.splitlines() == [
        "betrace: " + ESCAPED.removesuffix(r"\nline"),
        "betrace: line",
        "betrace: second",
    ]
    print_table(("A", "B"), [(ESCAPE, 1), ("x", None)])
    assert capsys.readouterr().out.splitlines()[1] == f"{ESCAPED}  1"


def test_json_is_escaped_and_still_the_same_value(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({ESCAPE: "ü"}, indent=2)
    printed = capsys.readouterr().out
    assert json.loads(printed) == {ESCAPE: "ü"}
    assert "ü" in printed
    assert all(each.isprintable() or each == "\n" for each in printed)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43_200), ("365d", 31_536_000)]
)
def test_durations(text: str, seconds: int) -> None:
    assert Duration().convert(text, None, None) == seconds


def test_moments() -> None:
    def read(text: str) -> int:
        return Moment().convert(text, None, None)

    second = 10**9
    assert read("1970-01-02") == 86_400 * second
    assert read("1970-01-01T00:00:01Z") == second
    assert read("123") == 123
    for ago in ("90m", "-90m"):
        assert read(ago) == pytest.approx(time.time_ns() - 5400 * second, abs=60 * second)
    for bad in ("yesterday", "1w", ""):
        with pytest.raises(click.BadParameter, match="is not a time"):
            read(bad)


class Quiet(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"tenants": [], "next": None}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that does not trust the certificate is expected."""


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The URL of a service with a self-signed certificate, and the certificate's file."""
    paths = certificate(tmp_path, 10)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(paths["certificate"], paths["key"])
    with Server(("127.0.0.1", 0), Quiet) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://localhost:{server.server_port}", paths["certificate"]
        server.shutdown()
        thread.join()


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["tenants", "list", *arguments])


def test_a_self_signed_certificate_is_named_with_ca(tls: tuple[str, str]) -> None:
    url, certificate = tls
    refused = ask("--url", url)
    assert refused.exit_code == 3
    assert f"the certificate of {url} is not trusted (self-signed certificate)" in refused.stderr
    assert "--ca FILE" in refused.stderr
    trusted = ask("--url", url, "--ca", certificate)
    assert (trusted.exit_code, trusted.stdout) == (0, "no tenants\n"), trusted.stderr


def test_the_wrong_scheme_is_explained(tls: tuple[str, str]) -> None:
    url, _ = tls
    assert "use https:// in --url" in ask("--url", url.replace("https", "http")).stderr
    with Server(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        result = ask("--url", f"https://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    assert result.exit_code == 3
    assert "use http:// in --url" in result.stderr


def test_a_ca_file_without_certificates(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    result = ask("--ca", str(tmp_path / "ca.pem"))
    assert result.exit_code == 3
    assert "has no certificates" in result.stderr


def test_a_service_that_does_not_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(httpx.Client, "request", never)
    result = ask()
    assert result.exit_code == 3
    assert "did not answer in time" in result.stderr
