"""The dashboard conforms to Grafana's documented model, checked without Grafana."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest

from tests.support.grafana_files import dashboard, panels

# https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
# and packages/grafana-data/src/valueFormats/categories.ts
UNITS = {"short", "percentunit", "s", "bytes", "Bps", "cps", "ops", "reqps"}
CALCS = {"lastNotNull", "max", "min", "mean", "sum"}
COLOURS = {"green", "yellow", "orange", "red", "blue", "purple"}
TYPES = {"row", "timeseries", "stat", "state-timeline"}


def test_grafanas_own_model_knows_every_field():
    """The SDK is generated from Grafana's schemas, so an unknown field would be lost."""
    model = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    board = dashboard()
    read = model.Dashboard.from_json(board)
    assert json.loads(encoder.JSONEncoder().encode(read)) == board


def test_the_dashboard_itself():
    board = dashboard()
    assert board["title"] == "BeTrace"
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", board["uid"])
    assert board["schemaVersion"] >= 36  # data sources as objects
    assert board["time"] == {"from": "now-1h", "to": "now"}
    assert re.fullmatch(r"\d+[smh]", board["refresh"])
    assert board["timezone"] in ("browser", "utc")
    assert all(isinstance(tag, str) for tag in board["tags"])


def test_variables_use_the_chosen_source_and_default_to_all():
    source, *queried, pages = dashboard()["templating"]["list"]
    assert (pages["type"], pages["query"]) == ("textbox", "http://127.0.0.1:8090")
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    for variable in queried:
        assert variable["type"] == "query"
        assert variable["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert variable["refresh"] in (1, 2)  # never 0, or there would be no values
        assert re.fullmatch(r"label_values\(.+, (job|instance)\)", variable["query"])
        assert variable["includeAll"]
        assert variable["allValue"] == ".+"
        assert variable["current"]["value"] == ["$__all"]


def test_queries_use_only_defined_variables():
    known = {each["name"] for each in dashboard()["templating"]["list"]} | {"__rate_interval"}
    for panel in panels():
        for target in panel["targets"]:
            assert set(re.findall(r"\$\{?(\w+)", target["expr"].replace('"$1"', ""))) <= known


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel(panel):
    assert panel["type"] in TYPES
    place = panel["gridPos"]
    assert place.keys() == {"x", "y", "w", "h"}
    assert 0 <= place["x"] < 24
    assert 1 <= place["w"] <= 24 - place["x"]
    assert place["h"] >= 3
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"] in UNITS
    names = [target["refId"] for target in panel["targets"]]
    assert len(set(names)) == len(names) > 0
    for target in panel["targets"]:
        assert target["instant"] is not target["range"]
        assert target["legendFormat"]
    first, *others = defaults["thresholds"]["steps"]
    assert defaults["thresholds"]["mode"] == "absolute"
    assert first["value"] is None  # the base, which every value is above
    values = [step["value"] for step in others]
    assert all(a < b for a, b in pairwise(values))
    assert {step["color"] for step in (first, *others)} <= COLOURS
    if defaults["unit"] == "percentunit":
        assert all(0 < value <= 1 for value in values)  # not per cent


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_how_a_panel_shows_its_series(panel):
    options = panel["options"]
    match panel["type"]:
        case "timeseries":
            assert set(options["legend"]["calcs"]) <= CALCS
            assert options["tooltip"]["mode"] in ("multi", "single")
            steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            style = panel["fieldConfig"]["defaults"]["custom"].get("thresholdsStyle")
            assert (style is not None) == (len(steps) > 1)  # else they would not be seen
        case "stat":
            assert set(options["reduceOptions"]["calcs"]) <= CALCS
            assert len(panel["targets"]) == 1
        case "state-timeline":
            (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
            assert mapping["type"] == "value"
            assert sorted(mapping["options"]) == [str(n) for n in range(len(mapping["options"]))]


def test_rows_are_open_and_above_their_panels():
    board = dashboard()["panels"]
    bottom = 0
    for panel in board:
        if panel["type"] == "row":
            assert panel["panels"] == []
            assert not panel["collapsed"]
            assert panel["gridPos"]["y"] >= bottom
        bottom = max(bottom, panel["gridPos"]["y"] + panel["gridPos"]["h"])
