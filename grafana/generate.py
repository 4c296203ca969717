"""Generates ``grafana/dashboard.json`` from the panels, with Grafana's builders.

``python -m grafana.generate`` (``make grafana``) writes the file; a test checks that it is current.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline
from grafana_foundation_sdk.builders import timeseries as series
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as c
from grafana_foundation_sdk.models import dashboard as d

from grafana import cluster, flow, parts, rules
from grafana.panel import Annotation, Panel

FILE = Path(__file__).with_name("dashboard.json")
UID = "betrace-overview"
PAGES = "http://127.0.0.1:8090"
SELECTORS = 'job=~"$job", instance=~"$instance"'
HEIGHT, SMALL_HEIGHT = 8, 4

ROWS = (
    ("At a glance", flow.GLANCE),
    ("Rules", rules.RULES),
    ("Ingestion", flow.INGESTION),
    ("Pipeline", flow.PIPELINE),
    ("Storage", parts.STORAGE),
    ("Breakers", parts.BREAKERS),
    ("Caches", parts.CACHES),
    ("Tenants", parts.TENANTS),
    ("Cluster", cluster.CLUSTER),
    ("Process", parts.PROCESS),
)

ANNOTATIONS = (
    Annotation("Alerts", 'ALERTS{$on, alertname=~"Betrace.+", alertstate="firing"}', "red"),
    Annotation("Starts", "changes(betrace_start_time_seconds{$on}[1m]) > 0", "blue"),
)
_SOURCE = d.DataSourceRef(type_val="prometheus", uid="${datasource}")

Builder = series.Panel | stat.Panel | statetimeline.Panel


def build() -> dashboard.Dashboard:
    """Return the dashboard."""
    board = (
        dashboard.Dashboard("BeTrace")
        .uid(UID)
        .description(
            "BeTrace: rules, ingestion, pipeline, storage, breakers, caches, tenants, "
            "cluster, process."
        )
        .tags(["betrace", "tracing"])
        .timezone("browser")
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(d.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(_variable("job", "Job", "betrace_start_time_seconds"))
        .with_variable(_variable("instance", "Instance", 'betrace_start_time_seconds{job=~"$job"}'))
    )
    board.with_variable(
        dashboard.TextBoxVariable("pages")
        .label("Pages of BeTrace")
        .description("api.public_url, for links from rules to their signals")
        .default_value(PAGES)
        .current(d.VariableOption(selected=True, text=PAGES, value=PAGES))
    )
    board.link(
        dashboard.DashboardLink("Signals")
        .type(d.DashboardLinkType.LINK)
        .url("${pages}/signals")
        .tooltip("The signals, on the pages of BeTrace")
        .target_blank(True)
    )
    for annotation in ANNOTATIONS:
        board.annotation(_annotation(annotation))
    numbers = count(1)
    for title, panels in ROWS:
        board.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            board.with_panel(_panel(panel).id(next(numbers)))
    return board


def _annotation(annotation: Annotation) -> dashboard.AnnotationQuery:
    query = dashboard.AnnotationQuery().name(annotation.name).datasource(_SOURCE)
    query.enable(True).icon_color(annotation.colour)
    return query.expr(annotation.expr.replace("$on", SELECTORS))


def _variable(label: str, title: str, metric: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(label)
        .label(title)
        .datasource(_SOURCE)
        .query(f"label_values({metric}, {label})")
        .refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(d.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(d.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _panel(panel: Panel) -> Builder:
    builder = _BUILDERS[panel.kind](panel)
    builder.title(panel.title).description(panel.description).datasource(_SOURCE)
    builder.unit(panel.unit).span(panel.width)
    builder.height(SMALL_HEIGHT if panel.kind == "stat" else HEIGHT)
    steps = [d.Threshold(value=None, color=panel.base)]
    steps += [d.Threshold(value=value, color=colour) for value, colour in panel.thresholds]
    absolute = dashboard.ThresholdsConfig().mode(d.ThresholdsMode.ABSOLUTE)
    builder.thresholds(absolute.steps(steps))
    if panel.least is not None:
        builder.min(panel.least)
    if panel.most is not None:
        builder.max(panel.most)
    for number, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr.replace("$on", SELECTORS))
        target.legend_format(query.legend).ref_id(chr(ord("A") + number))
        builder.with_target(target.instant() if panel.kind == "stat" else target.range())
    return builder


def _series(panel: Panel) -> series.Panel:
    builder = series.Panel().line_width(1).fill_opacity(20 if panel.stacked else 8)
    builder.show_points(c.VisibilityMode.NEVER)
    builder.legend(
        common.VizLegendOptions()
        .display_mode(c.LegendDisplayMode.LIST)
        .placement(c.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )
    builder.tooltip(
        common.VizTooltipOptions().mode(c.TooltipDisplayMode.MULTI).sort(c.SortOrder.DESCENDING)
    )
    if panel.link is not None:
        title, url = panel.link
        builder.data_links([dashboard.DashboardLink(title).url(url).target_blank(True)])
    if panel.stacked:
        builder.stacking(common.StackingConfig().mode(c.StackingMode.NORMAL).group("A"))
    if panel.thresholds:
        style = common.GraphThresholdsStyleConfig().mode(c.GraphThresholdsStyleMode.DASHED)
        builder.thresholds_style(style)
    return builder


def _stat(panel: Panel) -> stat.Panel:
    builder = stat.Panel().graph_mode(c.BigValueGraphMode.NONE).no_value("–")
    mode = c.BigValueColorMode.BACKGROUND if panel.thresholds else c.BigValueColorMode.NONE
    return builder.color_mode(mode).reduce_options(
        common.ReduceDataOptions().calcs(["lastNotNull"])
    )


def _states(panel: Panel) -> statetimeline.Panel:
    mapping = {
        str(value): d.ValueMappingResult(text=name, color=colour, index=value)
        for value, (name, colour) in enumerate(panel.states)
    }
    builder = statetimeline.Panel().mappings([d.ValueMap(options=mapping)])
    return builder.show_value(c.VisibilityMode.AUTO).merge_values(True)


_BUILDERS: dict[str, Callable[[Panel], Builder]] = {
    "timeseries": _series,
    "stat": _stat,
    "states": _states,
}


def text() -> str:
    """Return the text of ``dashboard.json``."""
    return JSONEncoder(sort_keys=True, indent=2).encode(build().build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
