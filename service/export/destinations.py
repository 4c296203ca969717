"""The configured destinations and their exporters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import trio
from opentelemetry.util.re import parse_env_headers

from betrace.channels import ThreadRunner
from betrace.service.config.settings import Settings
from betrace.service.config.stages import EXPORT_OTLP, EXPORT_WEBHOOK
from betrace.service.export.delivery import make_client, otlp_delivery, webhook_delivery
from betrace.service.export.exporter import Exporter
from betrace.service.pipeline.breakers import Breakers
from betrace.service.signals import Signal
from betrace.service.storage.ledger.base import LedgerEntries


class Exports:
    """All exporters. Call the methods on the Trio thread. Webhooks do not get signals raised
    while their rule is ``muted``."""

    def __init__(
        self,
        settings: Settings,
        entries: LedgerEntries,
        breakers: Breakers,
        muted: Callable[[Signal], bool],
    ) -> None:
        self._threads = ThreadRunner("export", 1)
        wanted = settings.export
        self._client = make_client(settings.breakers.export.timeout_seconds)
        deliveries = {
            EXPORT_OTLP: otlp_delivery(
                self._client,
                wanted.otlp.endpoint,
                parse_env_headers(wanted.otlp.headers),
                version("betrace"),
                settings.api.page_url,
            ),
            EXPORT_WEBHOOK: webhook_delivery(
                self._client,
                wanted.webhook.url,
                parse_env_headers(wanted.webhook.headers),
                wanted.webhook.external_url,
                settings.api.page_url,
                muted,
            ),
        }
        self._exporters = [
            Exporter(
                name,
                deliveries[name],
                entries,
                Path(settings.storage.path) / "export" / f"{name}.json",
                breakers.exports[name],
                self._threads,
            )
            for name in wanted.destinations
        ]

    def __iter__(self) -> Iterator[Exporter]:
        return iter(self._exporters)

    def notify(self, signals: list[Signal]) -> None:
        """Note that these signals are in the ledger."""
        if self._exporters:
            tenants = {signal.tenant for signal in signals}
            for exporter in self._exporters:
                exporter.notify(tenants)

    async def run(self) -> None:
        """Send until cancelled."""
        async with self._client, trio.open_nursery() as nursery:
            for exporter in self._exporters:
                nursery.start_soon(exporter.run)

    def close(self) -> None:
        """End the thread."""
        self._threads.close()
