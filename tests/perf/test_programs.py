"""The programs of perf/ work: the sizes are tiny, but their checks must pass."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from perf import beside, everything, fuzz_json, fuzz_wire, generator, grpc_attacks, memory, summary
from perf.generator import Generator, Load
from perf.lib import bench_ledger, everyday, workload
from perf.lib.target import GeneratorProcess, Service, service
from perf.lib.workload import Shape, make_bodies
from perf.report import floors, output
from tests.perf.conftest import Programs

pytestmark = pytest.mark.slow

Json = dict[str, Any]


def verdicts(runs: floors.Runs, command: str) -> dict[str, str]:
    """Return the verdicts of a command's floors."""
    rows = zip(floors.FLOORS, floors.rows(runs), strict=True)
    return {row[1]: row[4] for floor, row in rows if floor.command == command}


def is_picture(path: Path) -> bool:
    return ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_load_counts_what_it_sent_against_what_was_evaluated_and_stored(
    loaded: Json, tiny: Programs
) -> None:
    row = loaded["rows"]["100"]
    assert loaded["problems"] == []
    assert len(row["runs"]) == 2
    for run in row["runs"]:
        assert run["told_accepted"] == run["accepted"] == run["evaluated"] > 0
        assert run["signals"] == run["breaches_sent"] > 0
        assert run["generator"]["wrong_sent"] == run["generator"]["wrong_answered"] > 0
    assert row["stored"]["spans"] == sum(run["accepted"] for run in row["runs"])
    assert row["stored"]["signals"] == sum(run["signals"] for run in row["runs"])
    assert row["stored"]["tenants"] == 3
    assert {"trio", "ingest", "correlate", "evaluate"} <= set(row["threads"])
    assert sum(used["share"] for used in row["threads"].values()) == pytest.approx(1, abs=0.1)
    assert "| trio " in tiny.text("load")
    assert floors.NOT_RUN not in verdicts(runs_of_loads(loaded), "load").values()


def runs_of_loads(loaded: Json) -> floors.Runs:
    """Return the report's runs of perf.load, all with the same figures."""
    values = loaded | {"rows": {str(spans): loaded["rows"]["100"] for spans in (100, 512)}}
    return {name: values for name, _ in summary.LOADS}


def test_beside_measures_all_servers_under_the_same_load(compared: Json, tiny: Programs) -> None:
    (row,) = compared["rows"].values()
    assert compared["problems"] == []
    assert row["payload"]["encoding"] == "json"
    assert set(row["servers"]) == {"BeTrace", "Rotel", "bare HTTP"}
    for server, runs in row["runs"].items():
        assert len(runs) == 2
        found = row["servers"][server]
        assert found["spans_per_second"]["median"] == pytest.approx(10_000, rel=0.5)
        assert found["cpu_us_per_span_to_the_end"]["median"] > 0
        assert found["p99_ms"]["median"] >= found["p50_ms"]["median"] > 0
    assert all(run["accepted"] == run["evaluated"] > 0 for run in row["runs"]["BeTrace"])
    assert "| 10000 spans/s, 100 JSON | BeTrace " in tiny.text("beside")


def test_soak_has_slices_channels_counts_and_pictures(soaked: Json, tiny: Programs) -> None:
    run = soaked["run"]
    assert soaked["problems"] == []
    assert run["told_accepted"] == run["accepted"] == run["evaluated"] == soaked["stored"]["spans"]
    assert run["signals"] == run["breaches_sent"] == soaked["stored"]["signals"]
    assert len(soaked["slices"]) == 2
    for part in soaked["slices"]:
        assert part["spans_per_second"] > 0
        assert part["cpu_us_per_span"] > 0
        assert part["p99_ms"] >= part["p50_ms"] > 0
        assert part["rss_mb"] > 50
    assert {"span-ingestion", "trace-correlation", "rule-evaluation"} <= set(soaked["queueing_ms"])
    assert all(ms >= 0 for ms in soaked["queueing_ms"].values())
    times = [at for at, _ in soaked["memory"]]
    assert times == sorted(times)
    assert is_picture(tiny.out / "soak-rate.svg")
    assert is_picture(tiny.out / "soak-memory.svg")
    judged = verdicts({"soak": soaked}, "soak")
    assert floors.NOT_RUN not in judged.values()
    assert judged["soak"] == floors.MISSED  # two seconds are not five minutes


def test_overload_loses_nothing(overloaded: Json) -> None:
    assert overloaded["accepted"] == overloaded["evaluated"]
    least = overloaded["told_accepted"]
    assert least <= overloaded["accepted"] <= least + overloaded["unknown"]
    assert least > 0
    assert set(overloaded["rows"]) == {"closed loop", "twice that", "half, at once after"}
    twice = overloaded["rows"]["twice that"]
    assert twice["offered"] == pytest.approx(2 * overloaded["rows"]["closed loop"]["taken"])
    for row in overloaded["rows"].values():
        assert row["asked"]["accounts"]["looks"] > 0
        assert row["wrong_accounts"] == []
        assert row["failed_looks"] == []
        assert row["with_retry_after"] == row["refusals"]
    assert floors.NOT_RUN not in verdicts({"overload": overloaded}, "overload").values()


def test_memory_creates_and_deletes_tenants(remembered: Json) -> None:
    cycles = remembered["cases"]["2 create/send/delete cycles of a tenant"]
    assert cycles["signals"] > 0
    assert len(cycles["growth_mb_by_step"]) == 1
    one = remembered["cases"]["one tenant, 100 rules, 1000 live spans"]
    assert one["traces_bytes"] > 0
    judged = verdicts({"memory": remembered}, "memory")
    missing = [what for what, verdict in judged.items() if verdict == floors.NOT_RUN]
    assert missing == ["500 tenants with 50 rules each"]


def test_memory_of_many_tenants(tmp_path: Path) -> None:
    found = memory.many_tenants(tmp_path, 3)
    assert found["kb_per_tenant"] == pytest.approx(found["growth_mb"] * 1000 / 3, abs=50)
    assert found["floor_mb"] is None


def test_cachehits_uses_all_caches(cached: Json) -> None:
    for cache in ("ruleContainers", "publicKeys"):
        assert cached["caches"][cache]["hitCount"] > 0
        assert 0 < cached["caches"][cache]["hitRate"] <= 1
    assert cached["caches"]["traceMetadata"]["loadSuccessCount"] > 0
    assert cached["done"]["requests sent"] > 0
    assert not [what for what in cached["done"] if what.startswith(("failed", "sent: "))]
    assert floors.NOT_RUN not in verdicts({"cachehits": cached}, "cachehits").values()


def test_bench_measures_every_size(benched: Json, tiny: Programs) -> None:
    assert {"decode 1", "stage 100", "stage 1000"} <= set(benched["ingestion"])
    for spans in (10, 50, 100, 500):
        assert {f"batch {spans}", f"streaming by 10 {spans}"} <= set(benched["evaluation"])
    assert {"sqlite 1", "sqlite 10", "sqlite 50", "sqlite 128"} <= set(benched["ledger"])
    assert {f"{what} {n}" for what in ("signals", "traces") for n in (1, 100, 1000)} <= set(
        benched["duckdb"]
    )
    assert len(benched["caches"]) == 6
    for group in ("ingestion", "evaluation", "ledger", "duckdb", "caches", "fallback"):
        for name, found in benched[group].items():
            assert found["items_per_second"] > 0, name
            assert found["p99_us"] >= found["p50_us"] > 0, name
    for key in ("answer_ms", "ledger_ms", "api_ms"):
        assert benched["end_to_end"][key]["max"] > 0
    judged = verdicts({"bench": benched}, "bench")
    missing = [what for what, verdict in judged.items() if verdict == floors.NOT_RUN]
    without_server = ["ledger: TigerBeetle, batch of 128"] if bench_ledger.PROGRAM is None else []
    assert missing == without_server
    assert "| stage 1000 " in tiny.text("bench")


def test_queries_runs_every_query(queried: Json) -> None:
    assert queried["traces"] == 2000
    assert {"traces, first page of 100", "signals, next page", "one trace"} <= set(
        queried["answers"]
    )
    assert all(answer["ms"]["median"] > 0 for answer in queried["answers"].values())
    assert floors.NOT_RUN not in verdicts({"queries": queried}, "queries").values()


def test_curves_have_points_and_pictures(curved: Json, tiny: Programs) -> None:
    found = curved["curves"]
    points = {name: [point["x"] for point in curve["points"]] for name, curve in found.items()}
    assert points == {
        "trace_length": [10, 100],
        "open_traces": [1000, 3000],
        "rules": [10, 30],
        "tenants": [1, 3],
    }
    for name, curve in found.items():
        assert all(point["ratio"]["median"] > 0 for point in curve["points"])
        assert is_picture(tiny.out / f"{name.replace('_', '-')}.svg")
    assert is_picture(tiny.out / "trace-length-memory.svg")
    assert curved["many_long_traces"]["bytes_per_trace"] > 0
    assert floors.NOT_RUN not in verdicts({"curves": curved}, "curves").values()


def test_flamegraph_draws_and_names_functions(sampled: Json, tiny: Programs) -> None:
    assert is_picture(tiny.out / "flamegraph.svg")
    assert sampled["spans_per_second"] > 0
    assert sampled["samples"] > 0
    assert any(each["file"].startswith("service/") for each in sampled["functions"])
    assert sum(each["self"] for each in sampled["functions"]) <= 1.05
    assert "trio" in sampled["threads"]


def test_summary_of_all_runs_has_a_row_for_each_floor(
    loaded: Json,
    soaked: Json,
    overloaded: Json,
    remembered: Json,
    cached: Json,
    benched: Json,
    queried: Json,
    curved: Json,
    tiny: Programs,
) -> None:
    for name, values in runs_of_loads(loaded).items():
        output.save(name, values)
        if name != "load":
            shutil.copy(tiny.out / "load.md", tiny.out / f"{name}.md")
    summary.main([])
    written = summary.REPORT.read_text()
    table = written.split("## Floors")[1].split("\n## ")[0]
    rows = [line for line in table.split("\n") if line.startswith("| ")][1:]
    assert len(rows) == len(floors.FLOORS)
    not_run = [row for row in rows if f"| {floors.NOT_RUN} " in row]
    expected = {"500 tenants with 50 rules each", "nothing slower than accepted"}
    expected |= {"20 of 100 rules relate spans, one trace in ten a candidate"}
    expected |= {"judging a candidate of any length"}
    expected |= {"ledger: TigerBeetle, batch of 128"} if bench_ledger.PROGRAM is None else set()
    assert {row.split("|")[2].strip() for row in not_run} == expected
    missed = [row for row in rows if floors.MISSED in row]
    assert any("| soak " in row for row in missed)
    for heading in ("Curves", "Soak", "Overload", "Benchmarks", "Memory", "Queries"):
        assert f"\n## {heading}\n" in written
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", written)
    assert "./soak-rate.svg" in pictures
    assert all((tiny.out / picture).exists() for picture in pictures)


def test_fuzz_wire_finds_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_wire.main(["--cases", "40"])
    assert "40 cases" in capsys.readouterr().out


def test_fuzz_json_finds_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_json.main(["--cases", "40"])
    assert "40 cases" in capsys.readouterr().out


def test_everything_runs_all_steps_and_lists_failures(
    tiny: Programs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        everything,
        "STEPS",
        {
            "good": ("fuzz_wire", "--cases 9", "--cases 3", 60),
            "bad": ("fuzz_wire", "", "--nonsense", 60),
            "long": ("fuzz_wire", "", "--cases 100000000", 1),
        },
    )
    with pytest.raises(SystemExit) as raised:
        everything.main(["--quick", "--only", "good", "bad", "long"])
    assert str(raised.value) == "FAILED: bad: exit code 2; long: took more than 1 s"
    said = capfd.readouterr().out
    assert "3 cases" in said
    written = Path(said.rpartition("results in ")[2].strip())
    assert (written / "REPORT.md").exists()
    shutil.rmtree(written)


def test_every_step_of_everything_is_a_program_with_valid_arguments() -> None:
    for name, (program, arguments, tiny_arguments, seconds) in everything.STEPS.items():
        module = __import__(f"perf.{program}", fromlist=["main"])
        for given in (arguments, tiny_arguments):
            with pytest.raises(SystemExit) as raised:
                module.main([*given.split(), "--help"])
            assert raised.value.code == 0, name
        assert seconds > 0


# The generator


@pytest.fixture(scope="module")
def target() -> Any:
    with service(rules=5, settings={"traces__idle_seconds": "0.3"}) as running:
        yield running


@pytest.mark.parametrize(
    ("shape", "bodies"),
    [
        (Shape(spans=20, encoding="json", rules=5, breaches=0.1), 64),
        (Shape(spans=20, gzip=True, rules=5, breaches=0.1), 400),
        (Shape(spans=10, spans_per_trace=30, rules=5, breaches=0.0), 66),
    ],
    ids=["json", "gzip", "traces over requests"],
)
@pytest.mark.parametrize("grpc", [False, True])
def test_the_generator_counts_as_the_service_does(
    target: Service, shape: Shape, bodies: int, grpc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grpc and shape.encoding == "json":
        pytest.skip("gRPC has no JSON")
    # As in a separate process, use trace ids that no other generator has.
    monkeypatch.setattr(workload, "_FIRST", np.uint64(secrets.randbits(48)))
    before = target.settle(1)
    url = target.grpc.replace("http", "grpc") if grpc else f"{target.ingest}/v1/traces"
    load = Load(url, connections=4, seconds=0.4, warm_up=0.1, rate=4000)
    result = Generator(load, shape, make_bodies(shape, bodies)).run()
    after = target.settle(1)
    assert result.failures == 0
    assert result.all_spans == after["spansAccepted"] - before["spansAccepted"] > 0
    assert result.all_breaches == after["signalsRaised"] - before["signalsRaised"]
    assert 0 < result.spans < 1.5 * 0.4 * 4000  # less on a busy machine
    assert 0 < asdict(result)["latency_ms"]["p50"] <= result.latency_ms["max"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--connections", "9", "--bodies", "3"], "9 connections need as many bodies"),
        (["--connections", "999999", "--bodies", "999999"], "files that a process may open"),
        (["--url", "http://example.com/v1/traces"], "grpc:// on this machine's loopback"),
    ],
)
def test_the_generator_explains_why_it_cannot_start(
    given: Sequence[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    few = make_bodies(Shape(spans=1), 3)
    made: Callable[..., Sequence[Any]] = lambda _, count, least: [few[0]] * max(3, count)  # noqa: E731
    monkeypatch.setattr(generator, "make_bodies", made)
    url = ["--url", "http://127.0.0.1:1/v1/traces"]
    monkeypatch.setattr(sys, "argv", ["generator", *url, *given])
    with pytest.raises(SystemExit) as raised:
        generator.main()
    assert raised.value.code == 2
    assert why in capsys.readouterr().err


def test_the_service_is_measured_at_everyday_rates(
    target: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everyday, "SECONDS", 0.5)
    monkeypatch.setattr(beside, "WARM_UP", 0.1)
    seconds = everyday.measure(target, beside.Row(20, 1_000))
    assert 0.1 < seconds < 1000  # of CPU for 100 000 spans


def test_attacks_are_cut_off(target: Service) -> None:
    for name in ("PING flood", "rapid reset", "HPACK bomb"):
        connections, *_ = grpc_attacks.measure(target, grpc_attacks.ATTACKS[name], 0.5)
        assert int(connections) > 1, name


def test_there_are_bodies_for_hundreds_of_connections() -> None:
    shape = Shape(spans=20, spans_per_trace=20)
    assert len(make_bodies(shape, least=3000)) == 3000
    assert len(make_bodies(Shape(spans=1, gzip=True), least=2500)) == 2500


def test_the_generator_process_explains_why_it_ended() -> None:
    with pytest.raises(RuntimeError, match=r"before its event 'ready': .*need as many bodies"):
        GeneratorProcess(["--url", "http://127.0.0.1:1", "--connections", "9", "--bodies", "3"])


def test_pictures_of_the_report_are_where_it_says() -> None:
    """The pictures of the report in the repository exist."""
    written = (Path(summary.__file__).parent / "REPORT.md").read_text()
    pictures = [
        part.split(")")[0] for part in written.split("![")[1:] for part in [part.split("](")[1]]
    ]
    assert pictures
    for picture in pictures:
        assert is_picture(Path(summary.__file__).parent / picture), os.path.relpath(picture)
