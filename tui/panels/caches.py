"""The caches: how often they are hit, and emptying or warming them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content

from betrace.tui.client import Json
from betrace.tui.panels.details import plot, show_cache
from betrace.tui.state import Cache, State
from betrace.tui.widgets.basic import Live
from betrace.tui.widgets.changes import Ask, Change
from betrace.tui.widgets.listing import check_tenant
from betrace.tui.widgets.table import Cell, Column, Row, TablePanel
from betrace.tui.widgets.text import NONE, count, many, millis, number, percent


class CachesPanel(TablePanel):
    TITLE = "Caches"

    COLUMNS = (
        Column("name", "cache", 15),
        Column("size", "size", 13, right=True),
        Column("rate", "hits", 7, right=True),
        Column("now", "now", 7, right=True),
        Column("evictions", "evicted", 7, right=True),
        Column("load", "load", 7, right=True),
        Column("failed", "failed", 6, right=True),
        Column("hits", "hits in all", 11, right=True),
        Column("misses", "misses", 9, right=True),
        Column("loads", "loads", 9, right=True),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("I", "change_invalidate", "Invalidate", tooltip="Empty the cache"),
        Binding(
            "T", "change_invalidate_tenant", "Of a tenant", tooltip="Empty it of one tenant's part"
        ),
        Binding("W", "change_warm_up", "Warm up", tooltip="Load what will be needed"),
    ]

    def below(self) -> ComposeResult:
        yield Live(id="hit-rates")

    def show(self, state: State) -> None:
        super().show(state)
        caches = state.now.caches if state.now else ()
        self.query_one("#hit-rates", Live).draw(
            lambda width: Content("\n").join(
                Content(_history(cache.name, state, width)) for cache in caches
            )
        )

    def rows(self, state: State) -> Iterable[Row]:
        for cache in state.now.caches if state.now else ():
            yield Row(cache.name, _cells(cache, state.rate(f"{cache.name}.hit_rate")))

    def drill(self, key: str) -> None:
        show_cache(self.betrace, key)

    def _cache(self) -> Cache | None:
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
                Ask(f"Empty the cache {cache.name} of which tenant?", "Tenant", check=check_tenant)
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
            return f"{many(answer.get('invalidated'), 'entry')} of {cache.name} removed"

        whose = f"of the tenant {tenant}" if tenant else "of all tenants"
        self.betrace.change(
            Change(
                f"Empty the cache {cache.name} {whose}?",
                "Invalidate",
                run,
                [("entries", count(cache.size), "those of other tenants" if tenant else "0")],
                "What is asked for next is loaded again, so that it takes longer once.",
            )
        )

    def action_change_warm_up(self) -> None:
        async def run() -> str:
            return _warmed(await self.betrace.client.warm_caches())

        now = self.betrace.state.now
        sizes = ", ".join(count(cache.size) for cache in now.caches) if now else NONE
        effects = [("entries", sizes, "what active tenants need")]
        self.betrace.change(Change("Warm up the caches?", "Warm up", run, effects))


def _cells(cache: Cache, now: float | None) -> tuple[Cell, ...]:
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


def _history(name: str, state: State, width: int) -> str:
    points = state.history(f"{name}.hit_rate")
    line = plot(points, max(10, width - 18), 1.0) if points else "no requests yet"
    return f"{name:<16.16} {line}"


def _warmed(answer: Json) -> str:
    loaded, failed = answer.get("loaded", 0), answer.get("failed", 0)
    said = f"{many(loaded, 'entry')} of {many(answer.get('tenants', 0), 'tenant')} loaded"
    return f"{said}, {failed} failed" if failed else said
