"""The nodes of a cluster as processes, connected to real NATS servers through links that can be
cut."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.links import Link
from tests.crash.victim import ServiceProcess

LEASE_SECONDS = 2.0
PARTITIONS = 8


class Node(ServiceProcess):
    """A process with some roles. ``links`` lead to the NATS servers."""

    def __init__(
        self, directory: Path, name: str, roles: str, links: Sequence[Link], **settings: str
    ) -> None:
        super().__init__(directory / name)
        self.settings |= settings
        self.name, self.roles = name, roles
        self.links = links
        self.frozen = False
        self.config = self.directory / "config.toml"
        self.directory.mkdir(parents=True, exist_ok=True)
        servers = ",".join(f"nats://127.0.0.1:{link.port}" for link in links)
        self.config.write_text(
            f'[cluster]\nservers = "{servers}"\nnode = "{name}"\npartitions = {PARTITIONS}\n'
            f"replicas = {min(3, len(links))}\nlease_seconds = {LEASE_SECONDS}\n"
        )

    def arguments(self) -> list[str]:
        found = [*super().arguments(), "--config", str(self.config), "--role", self.roles]
        if "query" in self.roles:
            found += ["--rules", str(self.directory / "rules")]
        return found

    def freeze(self) -> None:
        """Stop the process without ending it, as a paused virtual machine."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        self.frozen = True

    def unfreeze(self) -> None:
        """Let a frozen process continue."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.frozen = False

    def cut(self) -> None:
        """Cut the node off from all servers."""
        for link in self.links:
            link.cut()

    def heal(self) -> None:
        """Connect the node again."""
        for link in self.links:
            link.heal()

    def close(self) -> None:
        """Kill the process and close its links."""
        super().close()
        for link in self.links:
            link.close()
