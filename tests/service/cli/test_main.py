"""The command line: output, exit codes, and errors as sentences."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import trio
from click.testing import CliRunner, Result
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.cli import main as module
from betrace.service.cli import serve as running
from betrace.service.cli.main import cli
from betrace.service.cli.serve import run_service
from betrace.service.config.edge import Logging
from betrace.service.config.load import load
from betrace.service.pipeline.warmup import Compilation
from betrace.service.storage.dead_letters import DeadLetterError
from betrace.service.telemetry.logs import set_up_logging
from tests.support.loggers import restored

RULES = """\
rules:
  - id: fraud-check
    name: Payments over 1000 are checked for fraud
    severity: critical
    condition: |
      when   { payment.charge_card.where(amount > 1000) }
      always { payment.fraud_check }
  - id: loops
    enabled: false
    condition: count(loop) > 5
"""
BROKEN = "rules: [{id: broken, condition: 'payment and'}, {id: other, severity: bad}]\n"


def betrace(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


def a_trace(amount: int, loops: int = 0, traces: int = 1) -> bytes:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for number in range(traces):
        span = spans.add(trace_id=bytes([number + 1]) * 16, span_id=b"\x0a" * 8)
        span.name = "payment.charge_card"
        span.attributes.add(key="amount").value.int_value = amount
    for number in range(loops):
        spans.add(trace_id=b"\x01" * 16, span_id=bytes([number + 1]) * 8, name="loop")
    return request.SerializeToString()


JSON_TRACE = {
    "resourceSpans": [
        {
            "scopeSpans": [
                {
                    "spans": [
                        {
                            "traceId": "01" * 16,
                            "spanId": "0a" * 8,
                            "name": "payment.charge_card",
                            "attributes": [{"key": "amount", "value": {"intValue": "1500"}}],
                        }
                    ]
                }
            ]
        }
    ],
    "signals": [],  # as in the answer of the API
}

# Help and usage


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
        else:
            found.append((*path, name))
    return found


@pytest.mark.parametrize("path", commands(cli), ids=" ".join)
def test_help_has_an_example(path: tuple[str, ...]) -> None:
    result = betrace(*path, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "betrace " + " ".join(path) in result.output.partition("Example")[2]


@pytest.mark.parametrize("arguments", [["nonsense"], ["serve", "--nonsense"], ["rules", "check"]])
def test_wrong_usage(arguments: list[str]) -> None:
    result = betrace(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: ")


def test_version() -> None:
    result = betrace("version", "--json")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    text = f"betrace {printed['betrace']} (Python {printed['python']})\n"
    assert betrace("version").stdout == text
    assert betrace("--version").stdout == text


@pytest.mark.parametrize(
    ("arguments", "missing", "says"),
    [
        (
            ["tui"],
            "textual",
            "betrace tui needs Textual; install it with: pip install 'betrace[tui]'",
        ),
        (["demo"], "opentelemetry.sdk", "install it with: pip install 'betrace[demo]'"),
        (["serve"], "tigerbeetle", "betrace serve needs the TigerBeetle client; install it with"),
        (["serve"], "other", "this is a bug: ModuleNotFoundError"),
    ],
)
def test_a_missing_extra_is_named(
    monkeypatch: Any, arguments: list[str], missing: str, says: str
) -> None:
    def fail(*_: Any) -> None:
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(
        module.Commands, "get_command", lambda _, __, name: click.Command(name, callback=fail)
    )
    result = betrace(*arguments)
    assert result.exit_code == 3
    assert says in result.stderr
    assert "Traceback" not in result.stderr


# Errors


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "/x"), "betrace: /x: Permission denied; check"),
        (httpx.ConnectError("refused"), "did not answer (refused); try again"),
        (httpx.InvalidURL("no host"), "the URL of the service is invalid (no host); correct"),
        (ExceptionGroup("", [OSError("a"), ExceptionGroup("", [OSError("b")])]), "betrace: b"),
        (DeadLetterError("the dead letters are damaged"), "betrace: the dead letters are damaged"),
        (ZeroDivisionError("by zero"), "this is a bug: ZeroDivisionError: by zero; please report"),
    ],
)
def test_errors_are_sentences(monkeypatch: Any, error: Exception, says: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(module, "installed_version", fail)
    result = betrace("version")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert betrace("--debug", "version").exception is error


def test_a_closed_pipe_is_not_reported(rules: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    arguments = [sys.executable, "-m", "betrace.service", "rules", "check", str(rules)]
    done = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 3


# rules check


def test_valid_rules(rules: Path) -> None:
    result = betrace("rules", "check", rules)
    assert (result.exit_code, result.stdout) == (0, "1 file, 2 rules: all good\n")


def test_the_plan_of_rules_that_relate_spans_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "rules:\n- {id: n-plus-one, condition: 'for each db.query by span:parentId as q "
        "never { count(q) > 20 }'}\n- {id: any, condition: 'distinct(*, x) > 1 or trace:spans > 9'}"
    )
    result = betrace("rules", "check", file)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "n-plus-one: reads a trace back from the span log while it is open and when it closes "
        "and judges its values by key (about 5 µs a span), if it has: "
        "count(db.query) >= 21, at least 21 spans",
        "any: reads every trace back from the span log while it is open and when it closes and "
        "judges its values by key (about 5 µs a span)",
        "1 file, 2 rules: all good",
    ]


def test_a_rule_that_skips_incomplete_traces_says_how_it_is_decided(rules: Path) -> None:
    rules.write_text("rules: [{id: a, incomplete: skip, condition: 'never { a }'}]")
    result = betrace("rules", "check", rules)
    assert result.stdout.splitlines() == [
        "a: reads a trace back from the span log when it closes, if it seems to break the rule",
        "1 file, 1 rule: all good",
    ]


def test_examples_are_run_and_warnings_shown(rules: Path) -> None:
    rules.write_text(
        RULES.replace("count(loop) > 5", "loop.where(span:duration > 500)")
        + "    examples:\n      - {expect: kept, spans: [loop]}\n"
        + "      - {name: short, expect: broken, spans: [loop, {name: loop, duration_ms: 0}]}\n"
    )
    result = betrace("rules", "check", rules)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{rules}:12: rule loops: the example 'example 1' is broken, but should be kept",
        "  hint: condition met: loop.where(span:duration > 500), found 1",
        f"warning: {rules}: rule loops: span:duration is in nanoseconds, so 500 means 500 ns",
        "  loop.where(span:duration > 500)",
        "                             ^",
        "  hint: write the unit, such as 500ms",
        "1 file: 1 problem",
    ]
    printed = json.loads(betrace("rules", "check", "--json", rules).stdout)
    assert (printed["examples"], printed["problems"][0]["line"]) == (2, 12)
    assert printed["warnings"][0]["rule"] == "loops"
    rules.write_text(rules.read_text().replace("expect: kept", "expect: broken"))
    result = betrace("rules", "check", rules)
    assert result.exit_code == 0
    assert result.stdout.endswith("1 file, 2 rules, 2 examples: all good\n")


def test_invalid_rules_are_reported_with_their_location(rules: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(BROKEN)
    missing = tmp_path / "missing.yaml"
    result = betrace("rules", "check", rules, bad, missing)
    assert result.exit_code == 1
    assert f"{bad}:1: rule broken: found the end of the rule" in result.stdout
    assert "payment and\n             ^" in result.stdout
    assert f"{missing}: cannot be read: No such file or directory" in result.stdout
    assert result.stdout.endswith("3 files: 4 problems\n")
    printed = json.loads(betrace("rules", "check", "--json", rules, bad, missing).stdout)
    assert printed["valid"] is False
    assert printed["rules"] == 2
    assert [p["rule"] for p in printed["problems"]] == ["broken", "other", "other", None]
    assert printed["problems"][0]["line"] == 1


def test_a_directory_stands_for_its_files(rules: Path, tmp_path: Path) -> None:
    tenant = tmp_path / "acme"
    tenant.mkdir()
    (tenant / "own.yml").write_text(RULES)
    (tenant / ".hidden.yaml").write_text(BROKEN)
    result = betrace("rules", "check", tmp_path)
    assert (result.exit_code, result.stdout) == (0, "2 files, 4 rules: all good\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    result = betrace("rules", "check", empty)
    assert result.exit_code == 3
    assert "has no rule files; their names end in .yaml" in result.stderr


# rules test


@pytest.mark.parametrize("form", ["json", "protobuf", "gzip"])
def test_a_breach_and_why(rules: Path, tmp_path: Path, form: str) -> None:
    trace = tmp_path / "trace"
    body = json.dumps(JSON_TRACE, indent=2).encode() if form == "json" else a_trace(1500)
    trace.write_bytes(gzip.compress(body) if form == "gzip" else body)
    result = betrace("rules", "test", rules, "--trace", trace)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "fraud-check (critical) is broken: Payments over 1000 are checked for fraud",
        "  missing: payment.fraud_check",
        "  payment.charge_card.where(amount > 1000)  1  spans 0a0a0a0a0a0a0a0a",
        "  payment.fraud_check                       0",
        "loops (medium, not enabled) is kept: loops",
        "  loop  0",
    ]


def test_names_with_escape_sequences_are_escaped(rules: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.pb"
    trace.write_bytes(a_trace(1500))
    rules.write_text('rules: [{id: a, name: "\\e[31mred", condition: "never { \\"x\\" }"}]\n')
    result = betrace("rules", "test", rules, "--trace", trace)
    assert "\x1b" not in result.stdout
    assert r"\x1b[31mred" in result.stdout


def test_a_rule_that_is_kept(rules: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.pb"
    trace.write_bytes(a_trace(10))
    assert betrace("rules", "test", rules, "--trace", trace).exit_code == 0


def test_a_rule_that_is_not_enabled_is_tested(rules: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.pb"
    trace.write_bytes(a_trace(1500, loops=7))
    result = betrace("rules", "test", rules, "--trace", trace, "--rule", "loops", "--json")
    assert result.exit_code == 1
    (printed,) = json.loads(result.stdout)
    assert printed["rule_id"] == "loops"
    assert printed["breach"] is True
    assert printed["clause"] == "never"
    assert printed["counts"] == {"loop": 7}
    assert printed["evidence"] == {"loop": [f"{number:02x}" * 8 for number in range(1, 6)]}
    assert printed["enabled"] is False
    text = betrace("rules", "test", rules, "--trace", trace, "--rule", "loops").stdout
    assert "0505050505050505 …" in text


def test_the_groups_that_break_a_rule_are_shown(tmp_path: Path) -> None:
    file, trace = tmp_path / "rules.yaml", tmp_path / "trace.pb"
    file.write_text("rules:\n- {id: r, condition: 'for each loop by span:name as p never { p }'}")
    trace.write_bytes(a_trace(1500, loops=2))
    result = betrace("rules", "test", file, "--trace", trace)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "r (medium) is broken: r",
        "  forbidden: p, broken by 1 of 1: span:name loop",
        "  for 1 of 1 groups, such as",
        "    span:name loop: spans 0101010101010101, 0202020202020202",
        "  loop  2  spans 0101010101010101, 0202020202020202",
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no span with a valid trace id"),
        (b"{]", "is not a trace in OTLP JSON"),
        (b"hello", "is not a trace in OTLP JSON"),
        (b"\x1f\x8b\x08\x00garbage", "gzip"),
        (a_trace(1, traces=2), "several traces"),
        (a_trace(1)[:-1], "(at byte "),
    ],
)
def test_a_trace_that_cannot_be_tested(
    rules: Path, tmp_path: Path, content: bytes, says: str
) -> None:
    trace = tmp_path / "trace"
    trace.write_bytes(content)
    result = betrace("rules", "test", rules, "--trace", trace)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert says in result.stderr
    assert result.stderr.startswith("betrace: ")


def test_missing_inputs_of_a_test(rules: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    result = betrace("rules", "test", rules, "--trace", trace)
    assert result.exit_code == 3
    assert f"{trace} cannot be read (No such file or directory)" in result.stderr
    trace.write_bytes(a_trace(1))
    result = betrace("rules", "test", rules, "--trace", trace, "--rule", "nope")
    assert result.exit_code == 3
    assert "has no rule 'nope'; its rules are fraud-check, loops" in result.stderr
    rules.write_text(BROKEN)
    result = betrace("rules", "test", rules, "--trace", trace)
    assert result.exit_code == 3
    assert f"correct it: betrace rules check {rules}" in result.stderr


# serve


def test_errors_that_prevent_the_start(tmp_path: Path) -> None:
    for arguments, says in (
        (["--config", "missing.toml"], "missing.toml cannot be read"),
        (["--ingest", "nowhere"], "ingest.address"),
        (["--api", "0.0.0.0:8090"], "--insecure"),
        (["--rules", tmp_path / "missing"], "create it, or name another with --rules"),
        (["--data", "/dev/null/data"], "/dev/null/data"),
    ):
        result = betrace("serve", *arguments)
        assert result.exit_code == 3, arguments
        assert says in result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.stderr


def settings(directory: Path) -> Any:
    free = {f"{section}.address": "127.0.0.1:0" for section in ("ingest", "api", "metrics")}
    return load(None, free | {"ingest.grpc_address": "off", "storage.path": str(directory)})


@pytest.fixture
def quiet() -> Iterator[None]:
    with restored():
        yield


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_serve_prints_its_addresses_and_runs_until_sigterm(
    tmp_path: Path, monkeypatch: Any, quiet: None, option: list[str]
) -> None:
    real = running.run_service

    def run_briefly(settings: Any, companion: Any, roles: Any) -> None:
        assert roles == ()

        async def brief(addresses: Any) -> None:
            with trio.move_on_after(0.1):
                await companion(addresses)
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep_forever()

        real(settings, brief)

    monkeypatch.setattr(running, "run_service", run_briefly)
    free = ["--ingest", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    free += ["--api", "127.0.0.1:0", "--metrics", "off"]
    result = betrace("serve", "--data", tmp_path / "data", *free, *option)
    assert result.exit_code == 0, result.output
    if option:
        printed = json.loads(result.stdout)
        assert printed["metrics"] is None
        assert printed["api"] != printed["ingest"]
        return
    spans, grpc, pages, api, metrics = (line.split()[1] for line in result.stdout.splitlines())
    assert spans.endswith("/v1/traces")
    assert grpc.startswith("http://127.0.0.1:")
    assert pages == api.replace("/docs", "/")
    assert metrics == api.replace("/docs", "/metrics")


def test_a_companion_that_ends_stops_the_service(tmp_path: Path) -> None:
    asked = []

    async def ask(addresses: Any) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            asked.append((await client.get(f"{addresses.api}/readyz")).status_code)
            os.kill(os.getpid(), signal.SIGHUP)
            await trio.sleep(0.1)

    run_service(settings(tmp_path), ask)
    assert asked == [200]


def test_a_companion_ends_with_the_service(tmp_path: Path) -> None:
    ended = []

    async def wait(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await trio.sleep_forever()
        finally:
            ended.append(True)

    run_service(settings(tmp_path), wait)
    assert ended == [True]


def test_a_signal_before_it_is_ready_ends_it(tmp_path: Path, monkeypatch: Any) -> None:
    printed = []

    async def slow_start(self: Compilation, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(30)

    async def never(_: Any) -> None:
        printed.append("ready")

    monkeypatch.setattr(Compilation, "run", slow_start)
    run_service(settings(tmp_path), never, printed.append)
    assert "ready" not in printed


def test_a_start_that_compiles_is_explained(tmp_path: Path, monkeypatch: Any) -> None:
    printed: list[str] = []

    async def slow_start(self: Compilation, _: Any) -> None:
        self.running = True
        while len(printed) < 2:
            await trio.sleep(0.01)
        self.running = False

    async def ready(_: Any) -> None:
        printed.append("ready")

    monkeypatch.setattr(running, "_NOTICE_SECONDS", 0.01)
    monkeypatch.setattr(Compilation, "run", slow_start)
    run_service(settings(tmp_path), ready, printed.append)
    *notices, last = printed
    assert {text.partition(":")[0] for text in notices} == {"compiling kernels"}
    assert last == "ready"


# The log


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_has_one_line_per_message(capsys: Any, quiet: None, form: Any) -> None:
    set_up_logging(Logging(level="warning", format=form))
    log = logging.getLogger("service.test")
    log.info("not printed")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("it is %s", "bad")
    logging.getLogger("elsewhere").info("not printed")
    lines = capsys.readouterr().err.splitlines()
    if form == "text":
        assert lines[0].endswith("ERROR   service.test: it is bad")
        assert lines[-1] == "ValueError: why"
        return
    (line,) = lines
    printed = json.loads(line)
    assert printed["message"] == "it is bad"
    assert printed["level"] == "error"
    assert printed["logger"] == "service.test"
    assert printed["time"].endswith("Z")
    assert printed["exception"].endswith("ValueError: why")
