"""The configured destinations and their exporters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import trio
from opentelemetry.util.re import parse_env_headers

from betrace.channels import ThreadRunner
from betrace.service.config.settings import Settings
from betrace.service.config.stages import EXPORT_OTLP, EXPORT_WEBHOOK
from betrace.service.export.delivery import make_client, otlp_delivery, webhook_delivery
from betrace.service.export.exporter import Exporter
from betrace.service.export.turns import Alone, Turns
from betrace.service.pipeline.breakers import Breakers
from betrace.service.signals import Signal
from betrace.service.storage.signal_queues import SignalQueues


class Exports:
    """All exporters. Call the methods on the Trio thread. Webhooks do not get signals raised
    while their rule is ``muted``. Without ``turns`` this process sends everything."""

    def __init__(
        self,
        settings: Settings,
        queues: SignalQueues,
        breakers: Breakers,
        muted: Callable[[Signal], bool],
        turns: Turns | None = None,
    ) -> None:
        self._threads = ThreadRunner("export", 1)
        self._queues = queues
        directory = Path(settings.storage.path) / "export"
        self._turns = turns if turns is not None else Alone(directory, self._threads)
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
                queues,
                self._turns.progress(name),
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
            queues = self._queues.of(signals)
            for exporter in self._exporters:
                exporter.notify(queues)

    async def run(self) -> None:
        """Send until cancelled."""
        async with self._client, trio.open_nursery() as nursery:
            for exporter in self._exporters:
                work = partial(self._turns.perform, exporter.name, exporter.run)
                nursery.start_soon(work)

    def close(self) -> None:
        """End the thread."""
        self._threads.close()
