"""``docs/metrics.md``, made from the metrics' declaration.

``python -m betrace.service.cli.docs.metrics`` prints it; a test compares it with the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from betrace.service.api.metrics.exposition import DECLARED, register_process
from betrace.service.telemetry.latencies import Latencies

_HEAD = """\
# Metrics

`GET /metrics`, on `metrics.address` (127.0.0.1:9090) and on the API's listener, gives these in
Prometheus' text format. No label has unbounded values: there are none for tenants, traces or rules,
and what belongs to one tenant is asked of the HTTP interface. Counters begin at 0 when the service
starts. A histogram `x` is exposed as `x_bucket`, `x_sum` and `x_count`.

`grafana/` has a dashboard and alert rules made of these, `docs/runbook.md` what to do when one
fires.

Made by `python -m betrace.service.cli.docs.metrics > docs/metrics.md`.
"""


@dataclass(frozen=True, slots=True)
class Exposed:
    """A metric as Prometheus sees it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def service_metrics() -> list[Exposed]:
    """The service's own metrics, by name."""
    found = [
        Exposed(
            f"{d.name}_total" if d.kind == "counter" else d.name,
            d.kind,
            d.labels,
            d.text,
        )
        for d in DECLARED
    ]
    found += [Exposed(h.name, "histogram", h.labels, h.text) for h in Latencies().declared]
    return sorted(found, key=lambda metric: metric.name)


def process_metrics() -> list[Exposed]:
    """What prometheus_client tells of the process, by name."""
    registry = CollectorRegistry()
    register_process(registry)
    found = []
    for family in registry.collect():
        counter = family.type == "counter"
        labels = tuple(family.samples[0].labels) if family.samples else ()
        name = f"{family.name}_total" if counter else family.name
        found.append(Exposed(name, family.type, labels, family.documentation))
    return sorted(found, key=lambda metric: metric.name)


def markdown() -> str:
    """The text of ``docs/metrics.md``."""
    lines = [_HEAD, "## The service", ""]
    lines += _table(service_metrics())
    lines += ["", "## The process", ""]
    lines += _table(process_metrics())
    return "\n".join(lines) + "\n"


def _table(metrics: list[Exposed]) -> Iterator[str]:
    yield "| metric | type | labels | unit | meaning |"
    yield "|---|---|---|---|---|"
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        text = metric.text.strip().replace("|", "\\|")
        yield f"| `{metric.name}` | {metric.kind} | {labels} | {_unit(metric)} | {text} |"


def _unit(metric: Exposed) -> str:
    """The unit that the name ends in."""
    words = metric.name.removesuffix("_total").split("_")
    if "timestamp" in words or metric.name.endswith("start_time_seconds"):
        return "seconds since 1970"
    return words[-1] if words[-1] in ("seconds", "bytes", "ratio") else ""


if __name__ == "__main__":
    sys.stdout.write(markdown())
