"""The partitions and nodes of a cluster, as a query node sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from textual.content import Content

from betrace.tui.format import NONE, count, date, many, number
from betrace.tui.json_values import Json, as_int, as_text, mapping, objects
from betrace.tui.state import ServiceState
from betrace.tui.tones import SYMBOLS, Tone, marked
from betrace.tui.widgets.fields import fields
from betrace.tui.widgets.list_panel import ListPanel, Part
from betrace.tui.widgets.table_panel import Cell, Column, Row

PATH = "/api/cluster"
_ROLES = {"edge": "edge", "evaluator": "evaluator", "query": "query node"}
_FAR_BEHIND = 1000
"""Messages that are not applied, from which on a partition is marked."""


class ClusterPanel(ListPanel):
    TITLE = "Cluster"
    NOUN = "Partition"
    EMPTY = "No partitions."
    RELOAD = 2.0

    COLUMNS = (
        Column("partition", "part", 4, right=True),
        Column("state", "state", 12),
        Column("owner", "owner", 14, flex=True),
        Column("epoch", "epoch", 5, right=True),
        Column("evaluated", "evaluated", 12, right=True),
        Column("applied", "applied", 12, right=True),
        Column("lag", "lag", 7, right=True),
        Column("spans", "spans", 12, right=True, shown_from=110),
        Column("time", "log time", 19, shown_from=110),
    )

    def __init__(self) -> None:
        super().__init__()
        self._cluster: Json = {}

    async def read(self) -> None:
        self._cluster = await self.betrace.client.get(PATH)

    @property
    def _partitions(self) -> dict[str, Json]:
        return {str(each.get("partition")): each for each in objects(self._found("partitions"))}

    @property
    def _members(self) -> dict[str, Json]:
        return {as_text(each.get("name")): each for each in objects(self._found("nodes"))}

    def _found(self, name: str) -> object:
        return self._cluster.get(name)

    def head(self) -> Sequence[Part]:
        if not self._cluster:
            return []
        parts: list[Part] = []
        if problem := as_text(self._found("rulesProblem")):
            parts += [marked(f"rules are not published: {problem}", "bad"), "  "]
        nodes = self._members
        number_of = {role: sum(role in _roles(n) for n in nodes.values()) for role in _ROLES}
        roles = ", ".join(many(number_of[role], noun) for role, noun in _ROLES.items())
        parts.append(f"{many(len(nodes), 'node')}: {roles}")
        draining = [name for name, node in nodes.items() if node.get("draining")]
        if draining:
            parts += ["  ", marked(f"draining: {', '.join(draining)}", "busy")]
        if duties := mapping(self._found("duties")):
            held = ", ".join(f"{name} by {as_text(node)}" for name, node in duties.items())
            parts.append(f"  sent: {held}")
        return [*parts, f"  seen by {as_text(self._found('node'))}"]

    def rows(self, state: ServiceState) -> Iterable[Row]:
        for key, partition in self._partitions.items():
            tone, word = self._condition(partition)
            lag = partition.get("lag")
            moment = _log_time(partition)
            yield Row(
                key,
                (
                    Cell(key, order=as_int(partition.get("partition"))),
                    Cell(f"{SYMBOLS[tone]} {word}", tone),
                    Cell(as_text(partition.get("owner")) or NONE),
                    _exact(partition.get("epoch")),
                    _exact(partition.get("evaluatedTo")),
                    _exact(partition.get("applied")),
                    _figure(lag, "busy" if as_int(lag) >= _FAR_BEHIND else None),
                    _figure(mapping(partition.get("counts")).get("spans")),
                    Cell(date(moment), order=moment or 0.0),
                ),
            )

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        partition = self._partitions.get(key)
        if partition is None:
            return None
        tone, word = self._condition(partition)
        counts, lag = mapping(partition.get("counts")), partition.get("lag")
        lines = [
            fields(
                ("state", marked(word, tone)),
                ("owner", as_text(partition.get("owner")) or "none"),
                ("epoch", _text(partition.get("epoch"))),
                ("evaluated", f"up to message {_text(partition.get('evaluatedTo'))} of its log"),
                ("applied", f"up to message {_text(partition.get('applied'))} of its output"),
                ("lag", "?" if lag is None else many(as_int(lag), "message")),
                ("log time", date(_log_time(partition))),
                ("spans", _text(counts.get("spans"))),
                ("dead", many(as_int(counts.get("deadLettered")), "message")),
            )
        ]
        if problem := as_text(partition.get("problem")):
            lines.append(Content.assemble(marked(problem, "bad")))
        lines += [Content(""), Content("nodes of the cluster:")]
        lines += [Content(f"  {_node_text(node)}") for node in self._members.values()]
        return Content("\n").join(lines)

    def _condition(self, partition: Json) -> tuple[Tone, str]:
        owner = as_text(partition.get("owner"))
        if partition.get("problem"):
            return "bad", "unreadable"
        if not owner:
            return "bad", "no owner"
        if owner not in self._members:
            return "busy", "owner gone"
        if as_int(partition.get("lag")) >= _FAR_BEHIND:
            return "busy", "behind"
        return "good", "evaluated"


def _roles(node: Json) -> list[str]:
    roles = node.get("roles")
    return [str(role) for role in roles] if isinstance(roles, list) else []


def _node_text(node: Json) -> str:
    draining = ", draining" if node.get("draining") else ""
    return f"{as_text(node.get('name'))}: {', '.join(_roles(node))}{draining}"


def _log_time(partition: Json) -> float | None:
    return as_int(partition.get("logTimeNs")) / 1e9 or None


def _figure(value: object, tone: Tone | None = None) -> Cell:
    return (
        Cell(NONE, order=-1) if value is None else Cell(number(as_int(value)), tone, as_int(value))
    )


def _exact(value: object) -> Cell:
    return Cell(NONE if value is None else count(as_int(value)), order=as_int(value))


def _text(value: object) -> str:
    return "?" if value is None else count(as_int(value))
