"""The spans that ``betrace replay`` reads on a cluster: a copy from the NATS servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from betrace.service.cli.common import warn, with_client

if TYPE_CHECKING:
    from betrace.service.config.cluster import ClusterSettings
    from betrace.service.storage.jetstream.client import NatsClient
    from betrace.service.storage.spanlog.log import SpanLog

CLOCKS_NS = 60 * 1_000_000_000
"""By how much the clocks of edges and NATS servers may differ."""
_REPORT_SECONDS = 1.0


@contextmanager
def copied_log(
    settings: ClusterSettings, since_ns: int | None, until_ns: int | None, tenant: str | None
) -> Iterator[SpanLog]:
    """A span log in a temporary directory with what was received from ``since_ns`` on and before
    ``until_ns``, and around these times, for ``tenant`` or for all."""
    from betrace.service.cluster.query.tenant_names import read_names
    from betrace.service.pipeline.recovery.replay import IDLE_NS
    from betrace.service.storage.jetstream.bucket import ConfigBucket
    from betrace.service.storage.jetstream.history import SpanHistory
    from betrace.service.storage.jetstream.layout import Layout
    from betrace.service.storage.jetstream.local_copy import LocalCopy
    from betrace.service.storage.jetstream.setup import generations_of
    from betrace.service.storage.jetstream.spans import SpanStreams
    from betrace.service.storage.spanlog.log import SpanLog

    layout = Layout.of(settings)
    since = None if since_ns is None else since_ns - IDLE_NS
    until = None if until_ns is None else until_ns + IDLE_NS
    with TemporaryDirectory(prefix="betrace-replay-") as directory, SpanLog(Path(directory)) as log:

        async def run(client: NatsClient) -> list[str]:
            config = ConfigBucket(client, layout.config_bucket)
            names = await read_names(config)
            partitions = (await generations_of(config, settings)).total

            def wanted(name: str) -> str | None:
                found = names.tenant(name)
                return found if tenant in (None, found) else None

            copy = LocalCopy(log, wanted)
            history = SpanHistory(SpanStreams(client, layout), partitions)
            ranges = await history.ranges(
                None if since is None else since - CLOCKS_NS,
                None if until is None else until + CLOCKS_NS,
            )
            await copy.run(history, ranges, (since, until), _report())
            return copy.damaged

        for place in with_client(settings, run):
            warn(f"left out: {place}")
        yield log


def _report() -> Callable[[int], None]:
    """Prints how many spans are copied, about once a second."""
    reported = time.monotonic()

    def report(spans: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            click.echo(f"copied {spans} spans from the NATS servers", err=True)

    return report
