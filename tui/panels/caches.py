"""The caches: hit rates, invalidation and warm-up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content

from betrace.tui.changes import OperatorChange
from betrace.tui.format import NONE, count, many, millis, number, percent
from betrace.tui.json_values import Json
from betrace.tui.panels.details import cache_text
from betrace.tui.panels.history_graph import history_graph
from betrace.tui.state import CacheStatus, ServiceState
from betrace.tui.widgets.dialogs import Ask
from betrace.tui.widgets.list_panel import check_tenant
from betrace.tui.widgets.live_text import LiveText
from betrace.tui.widgets.table_panel import Cell, Column, Row, TablePanel


class CachesPanel(TablePanel):
    TITLE = "Caches"
    NOUN = "Cache"

    COLUMNS = (
        Column("name", "cache", 15),
        Column("size", "size", 13, right=True),
        Column("rate", "hits", 7, right=True),
        Column("now", "now", 7, right=True),
        Column("evictions", "evicted", 7, right=True),
        Column("load", "load", 7, right=True),
        Column("failed", "failed", 6, right=True),
        Column("hits", "total hits", 11, right=True, shown_from=110),
        Column("misses", "misses", 9, right=True, shown_from=110),
        Column("loads", "loads", 9, right=True, shown_from=110),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("I", "change_invalidate", "Invalidate", tooltip="Empty the cache"),
        Binding("T", "change_invalidate_tenant", "For a tenant", tooltip="Empty it for one tenant"),
        Binding("W", "change_warm_up", "Warm up", tooltip="Load the entries of active tenants"),
    ]

    def below(self) -> ComposeResult:
        yield LiveText(id="hit-rates")

    def show(self, state: ServiceState) -> None:
        super().show(state)
        caches = state.now.caches if state.now else ()
        self.query_one("#hit-rates", LiveText).draw(
            lambda width: Content("\n").join(
                Content(_history(cache.name, state, width)) for cache in caches
            )
        )

    def rows(self, state: ServiceState) -> Iterable[Row]:
        for cache in state.now.caches if state.now else ():
            yield Row(cache.name, _cells(cache, state.rate(f"{cache.name}.hit_rate")))

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        return cache_text(state, key, width)

    def _cache(self) -> CacheStatus | None:
        now, name = self.betrace.state.now, self.selected
        return next((c for c in now.caches if c.name == name), None) if now else None

    def action_change_invalidate(self) -> None:
        self._invalidate(None)

    def action_change_invalidate_tenant(self) -> None:
        async def ask() -> None:
            cache = self._cache()
            if cache is None:
                return
            tenant = await self.betrace.push_screen_wait(
                Ask(f"Empty cache {cache.name} for which tenant?", "Tenant", check=check_tenant)
            )
            if tenant is not None:
                self._invalidate(tenant)

        self.betrace.start(ask, "ask")

    def _invalidate(self, tenant: str | None) -> None:
        cache = self._cache()
        if cache is None:
            return

        async def run() -> str:
            answer = await self.betrace.client.invalidate_cache(cache.name, tenant)
            return f"{many(answer.get('invalidated'), 'entry')} removed from {cache.name}"

        whose = f"for tenant {tenant}" if tenant else "for all tenants"
        self.betrace.change(
            OperatorChange(
                f"Empty cache {cache.name} {whose}?",
                "Invalidate",
                run,
                [("entries", count(cache.size), "only other tenants' entries" if tenant else "0")],
                "Each entry is loaded again when it is next needed, which takes longer once.",
            )
        )

    def action_change_warm_up(self) -> None:
        async def run() -> str:
            return _warmed(await self.betrace.client.warm_caches())

        now = self.betrace.state.now
        sizes = ", ".join(count(cache.size) for cache in now.caches) if now else NONE
        effects = [("entries", sizes, "plus those of active tenants")]
        self.betrace.change(OperatorChange("Warm up the caches?", "Warm up", run, effects))


def _cells(cache: CacheStatus, now: float | None) -> tuple[Cell, ...]:
    asked = cache.hits + cache.misses
    rate = cache.hit_rate if asked else None
    return (
        Cell(cache.name),
        Cell(f"{number(cache.size)} of {number(cache.capacity)}", order=cache.size),
        Cell(percent(rate), order=rate or 0.0),
        Cell(percent(now), order=now or 0.0),
        Cell(number(cache.evictions), order=cache.evictions or 0),
        Cell(millis(cache.load_ms), order=cache.load_ms or 0.0),
        Cell(
            number(cache.load_failures),
            "bad" if cache.load_failures else None,
            cache.load_failures or 0,
        ),
        Cell(count(cache.hits), order=cache.hits),
        Cell(count(cache.misses), order=cache.misses),
        Cell(count(cache.loads), order=cache.loads or 0),
    )


def _history(name: str, state: ServiceState, width: int) -> str:
    history = f"{name}.hit_rate"
    if not state.history(history):
        return f"{name:<16.16} no requests yet"
    return f"{name:<16.16} {history_graph(state, history, max(10, width - 50), percent, 1.0)}"


def _warmed(answer: Json) -> str:
    loaded, failed = answer.get("loaded", 0), answer.get("failed", 0)
    said = f"{many(loaded, 'entry')} loaded for {many(answer.get('tenants', 0), 'tenant')}"
    return f"{said}, {failed} failed" if failed else said
