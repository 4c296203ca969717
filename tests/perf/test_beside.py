"""The comparison with other servers: rows, options and the table."""

from __future__ import annotations

from typing import Any

import pytest

from perf import beside
from perf.beside import BARE, OURS, ROTEL, Row

Json = dict[str, Any]


def test_the_rows_match_a_pattern() -> None:
    assert beside.parse([]).chosen == list(beside.ROWS)
    names = [row.name for row in beside.parse(["--rows", "^50000"]).chosen]
    assert names == ["50000 spans/s, 512", "50000 spans/s, 100", "50000 spans/s, 20"]
    assert [row.name for row in beside.parse(["--rows", "gzip"]).chosen] == [
        "maximum rate, 512 gzip"
    ]


def test_a_pattern_without_rows_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        beside.parse(["--rows", "grpc"])
    assert raised.value.code == 2
    assert "the rows are: maximum rate, 512; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "rate", "tenants", "json"),
    [(Row(512), 0, 0, False), (Row(100, 10_000, json=True), 10_000, 10, True)],
)
def test_a_row_describes_its_load(row: Row, rate: int, tenants: int, json: bool) -> None:
    options = beside.load_options(row, 3)
    assert (options.rate, options.tenants, options.json) == (rate, tenants, json)
    assert (options.secs, options.rules) == (3, 100)


def run(cpu: float) -> Json:
    return {
        "spans_per_second": 1000.0,
        "cpu_us_per_span": cpu / 2,
        "cpu_us_per_span_to_the_end": cpu,
        "rss_mb": 100.0,
        "generator": {"latency_ms": {"p50": 1.0, "p99": 9.0}, "sends_per_body": 1.5},
    }


def test_the_table_compares_medians_with_rotel() -> None:
    servers = {
        OURS: beside.summarise([run(3.0), run(5.0), run(4.0)]),
        ROTEL: beside.summarise([run(2.0)] * 3),
        BARE: beside.summarise([run(0.5)] * 3),
    }
    options = beside.parse(["--rounds", "3"])
    facts = beside.output.machine()
    row = {"servers": servers, "runs": {OURS: [run(3.0)]}, "payload": {"gzip": True}}
    text = beside.show(facts, options, {"maximum rate, 512": row})
    ours, rotel, bare = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert ours.startswith("| maximum rate, 512 | BeTrace ")
    assert "4.00 (3.00–5.00)" in ours
    assert " 2.00 " in ours.split("|")[4]
    assert " 1.00 " in rotel.split("|")[4]
    assert " 0.25 " in bare.split("|")[4]
    assert "maximum rate, 512: BeTrace got bodies up to 1.5 times" in text
    row["payload"]["gzip"] = False  # ids of other bodies are rewritten for each send
    assert "got bodies" not in beside.show(facts, options, {"maximum rate, 512": row})
