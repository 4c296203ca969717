"""Processes of a cluster inside this process, on real NATS servers. For tests only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from betrace.service.app.cluster import ClusterProcess, open_cluster
from betrace.service.app.roles import Role
from betrace.service.app.service import Addresses
from betrace.service.config.cluster import ClusterSettings
from betrace.service.config.settings import Settings
from tests.support.inprocess import settings


def node_settings(
    directory: Path, cluster: ClusterSettings, name: str, **sections: dict[str, Any]
) -> Settings:
    """Settings of the node ``name``, which listens for spans on a free port."""
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    listeners = {"address": "127.0.0.1:0", "grpc_address": "off"}
    ingest = listeners | sections.pop("ingest", {})
    given = cluster.model_copy(update={"node": name})
    return settings(folder, ingest=ingest, **sections).model_copy(update={"cluster": given})


@asynccontextmanager
async def process(
    config: Settings, *roles: Role
) -> AsyncIterator[tuple[ClusterProcess, Addresses]]:
    """Run the roles until the block ends."""
    with ExitStack() as stack:
        made = open_cluster(config, roles, stack)()
        try:
            async with trio.open_nursery() as nursery:
                addresses = await nursery.start(made.run)
                yield made, addresses
                made.stop()
        finally:
            made.close()
