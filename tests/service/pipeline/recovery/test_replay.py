"""A section of the log evaluated again, as module and as command."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from betrace.service.cli.main import cli
from betrace.service.cli.rules import record_rules_directory
from betrace.service.config.load import load
from betrace.service.pipeline.recovery.replay import Replay, Stretch
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.signals import Kind
from betrace.service.storage.duck.queries import SignalFilter
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from tests.support.oracle import OracleSpan
from tests.support.strategies import encode

SECOND = 10**9
NOW = time.time_ns()
HOUR = 3600 * SECOND
RULES = "rules: [{id: checked, condition: 'when { charge } always { check }'}]\n"


def compiled(*conditions: str) -> CompiledRules:
    rules = [make_rule({"id": f"r{i}", "condition": text}) for i, text in enumerate(conditions)]
    return compile_rules(rules, "v")


def frame(received_ns: int, *spans: tuple[int, str]) -> Frame:
    """A request with spans given as (trace, name)."""
    numbered = [
        OracleSpan(
            name,
            trace_id=trace.to_bytes(16, "big"),
            span_id=abs(hash((received_ns, number))).to_bytes(8, "big"),
        )
        for number, (trace, name) in enumerate(spans)
    ]
    return Frame("protobuf", "", received_ns, encode(numbered), len(spans))


def trace_id(number: int) -> str:
    return f"{number:032x}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Trace 1 is in breach, 2 is not, 3 is corrected by a late span; 4 and 5 cross the edges of the
    middle hour."""
    before, begin, end = NOW - 5 * HOUR, NOW - 4 * HOUR, NOW - 3 * HOUR
    frames = [
        frame(before, (9, "charge")),
        frame(begin - SECOND, (4, "check")),
        frame(begin, (1, "charge"), (2, "charge"), (4, "charge")),
        frame(begin + SECOND, (2, "check"), (3, "charge")),
        frame(begin + 200 * SECOND, (3, "check")),
        frame(end - SECOND, (5, "charge")),
        frame(end, (5, "check")),
    ]
    data = tmp_path / "data"
    with SpanLog(data) as log:
        log.append("acme", frames)
        log.append("other", [frame(begin, (7, "charge"))])
    (data / "rules" / "acme").mkdir(parents=True)
    (data / "rules" / "acme" / "rules.yaml").write_text(RULES)
    return data


def run(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["replay", "--data", str(data), *arguments])


def middle(*arguments: str) -> tuple[str, ...]:
    def text(ns: int) -> str:
        return str(ns)

    return ("--from", text(NOW - 4 * HOUR), "--to", text(NOW - 3 * HOUR), *arguments)


def told(output: str) -> list[tuple[str, str, bool]]:
    lines = [json.loads(line) for line in output.splitlines()]
    return [(line["kind"], line["trace_id"], line["partial"]) for line in lines]


class TestReplay:
    def replay(
        self, tmp_path: Path, frames: Sequence[Frame], *conditions: str, **options: int
    ) -> list[tuple[Kind, str]]:
        with SpanLog(tmp_path) as log:
            log.append("acme", list(frames))
            made = Replay(log, Stretch("acme"), compiled(*conditions), 1 << 20)
            for name, value in options.items():
                setattr(made, name, value)
            found = [(s.kind, s.trace_id) for some in made.signals(5) for s in some]
            assert made.frames == len(frames)
            assert made.spans == sum(frame.spans for frame in frames)
        return found

    def test_the_clock_is_the_logs(self, tmp_path: Path) -> None:
        frames = [
            frame(1 * SECOND, (1, "charge")),
            frame(50 * SECOND, (1, "check"), (2, "charge")),
            frame(200 * SECOND, (2, "check")),
        ]
        assert self.replay(tmp_path, frames, "when { charge } always { check }") == [
            (Kind.RAISED, trace_id(2)),
            (Kind.RETRACTED, trace_id(2)),
        ]

    def test_what_is_certain_early_is_found_once(self, tmp_path: Path) -> None:
        frames = [frame(n * SECOND, (1, "loop")) for n in range(1, 6)]
        assert self.replay(tmp_path, frames, "count(loop) > 2") == [(Kind.RAISED, trace_id(1))]

    def test_too_many_open_traces_are_closed(self, tmp_path: Path) -> None:
        frames = [frame(n * SECOND, (n, "charge")) for n in range(1, 40)]
        found = self.replay(tmp_path, frames, "not check", most_open=5)
        assert sorted(found) == [(Kind.RAISED, trace_id(n)) for n in range(1, 40)]

    def test_rules_that_relate_spans_are_decided(self, tmp_path: Path) -> None:
        frames = [frame(n * SECOND, (1, "charge"), (2, "charge")) for n in range(1, 20)]
        frames += [frame(20 * SECOND, (2, "charge"), (3, "check"))]
        frames += [frame(200 * SECOND, (1, "charge"))]
        rule = "for each charge by span:name as c never { sum(c, span:duration) > 19ms }"
        assert self.replay(tmp_path, frames, rule) == [
            (Kind.RAISED, trace_id(2)),
            (Kind.RAISED, trace_id(1)),
        ]
        rule = "for each charge by span:name as c never { distinct(c, span:id) == 19 }"
        assert self.replay(tmp_path / "again", frames, rule) == [
            (Kind.RAISED, trace_id(1)),
            (Kind.RETRACTED, trace_id(1)),
        ]


class TestCommand:
    def test_dry_run_shows_and_writes_nothing(self, data: Path) -> None:
        files = sorted(path for path in data.rglob("*"))
        result = run(data, *middle("--dry-run", "--json"))
        assert result.exit_code == 1, result.output
        assert sorted(told(result.stdout)) == [
            ("raised", trace_id(1), False),
            ("raised", trace_id(3), False),
            ("raised", trace_id(4), True),
            ("raised", trace_id(5), True),
            ("retracted", trace_id(3), False),
        ]
        assert "4 signals, 1 of them retracted" in result.stderr
        assert "2 are of traces that cross the edge" in result.stderr
        assert sorted(path for path in data.rglob("*")) == files

    def test_signals_are_recorded_once_and_partial_ones_never(self, data: Path) -> None:
        first = run(data, *middle())
        assert first.exit_code == 1, first.output
        assert "3 are new in the ledger" in first.stderr
        assert "(partial:" in first.stdout
        again = run(data, *middle("--tenant", "acme"))
        assert "0 are new in the ledger" in again.stderr
        ledger = SqliteLedger(data / "ledger.sqlite")
        assert ledger.balances("acme") == {"checked": 1}
        ledger.close()
        with DuckStore(data) as store:
            (active,) = store.signals("acme", SignalFilter(status="active"))[0]
            assert active.signal.trace_id == trace_id(1)

    def test_other_rules_and_the_whole_log(self, data: Path, tmp_path: Path) -> None:
        rules = tmp_path / "rules.yaml"
        rules.write_text("rules: [{id: none, condition: nothing}]\n")
        kept = run(data, "--from", "-7d", "--dry-run", "--rules", str(rules))
        assert kept.exit_code == 0, kept.output
        assert kept.stdout == ""
        assert "11 spans, 7 traces" in kept.stderr
        rules.write_text("rules: [{id: any, condition: charge}]\n")
        broken = run(data, "--from", "2020-01-01", "--dry-run", "--rules", str(rules), "--json")
        found = {trace for _, trace, _ in told(broken.stdout)}
        assert found == {trace_id(n) for n in (1, 2, 3, 4, 5, 7, 9)}

    def test_without_an_interval_the_whole_log_is_read(self, data: Path, tmp_path: Path) -> None:
        rules = tmp_path / "rules.yaml"
        rules.write_text("rules: [{id: any, condition: charge}]\n")
        result = run(data, "--dry-run", "--rules", str(rules))
        assert result.exit_code == 1, result.output
        assert "11 spans, 7 traces" in result.stderr
        recent = run(data, "--since", "210m", "--dry-run", "--rules", str(rules))
        assert "2 spans" in recent.stderr

    def test_rules_in_a_directory(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere/other").mkdir(parents=True)
        (tmp_path / "elsewhere/other/r.yaml").write_text("rules: [{id: r, condition: charge}]\n")
        result = run(data, "--dry-run", "--json", "--rules", str(tmp_path / "elsewhere"))
        assert told(result.stdout) == [("raised", trace_id(7), False)]
        assert "has no enabled rules for acme; its spans are not checked" in result.stderr

    def test_the_rules_of_the_service_are_read(self, data: Path, tmp_path: Path) -> None:
        (data / "rules").rename(tmp_path / "elsewhere")
        of_service = {"storage.path": str(data), "rules.directory": str(tmp_path / "elsewhere")}
        record_rules_directory(load(None, of_service))
        assert run(data, *middle("--dry-run", "--tenant", "acme")).exit_code == 1

    def test_without_rules_nothing_is_said_of_the_traces(self, data: Path) -> None:
        other = run(data, "--dry-run", "--tenant", "other")
        assert other.exit_code == 3
        assert f"{data / 'rules'} has no enabled rules for other" in other.stderr
        (data / "rules").rename(data / "moved")
        none = run(data, "--dry-run")
        assert none.exit_code == 3
        assert f"there are no rules in {data / 'rules'}" in none.stderr
        assert "signals" not in none.output

    def test_a_wrong_rule_file_is_named(self, data: Path) -> None:
        (data / "rules/acme/bad.yaml").write_text("rules: 7")
        result = run(data, "--dry-run")
        assert result.exit_code == 3
        assert str(data / "rules/acme/bad.yaml") in result.stderr
        assert "signals" not in result.output

    def test_traces_that_go_on_are_partial(self, data: Path) -> None:
        with SpanLog(data) as log:
            log.append("acme", [frame(time.time_ns(), (8, "charge"))])
        result = run(data, "--from", "-1h", "--dry-run", "--json")
        assert told(result.stdout) == [("raised", trace_id(8), True)]

    def test_beside_the_service_only_a_dry_run(self, data: Path) -> None:
        with SpanLog(data):
            assert run(data, *middle("--dry-run")).exit_code == 1
            refused = run(data, *middle())
            assert refused.exit_code == 3
            assert "--dry-run" in refused.stderr
            assert not (data / "ledger.sqlite").exists()

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["--from", "yesterday"], 2, "how long ago"),
            (["--from", "-1h", "--to", "-2h"], 2, "--from must be before --to"),
            (["--from", "-1h", "--tenant", "nobody"], 3, "acme, other"),
            (["--from", "-1h", "--rules", "/nowhere.yaml"], 3, "betrace rules check"),
        ],
    )
    def test_wrong_use(self, data: Path, arguments: list[str], code: int, said: str) -> None:
        result = run(data, *arguments)
        assert result.exit_code == code, result.output
        assert said in result.stderr
        assert "Traceback" not in result.output

    def test_without_data(self, tmp_path: Path) -> None:
        result = run(tmp_path / "nothing", "--from", "-1h")
        assert result.exit_code == 3
        assert "--data" in result.stderr
