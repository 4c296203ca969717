"""A real Alertmanager on loopback, with its API."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from betrace.service.cli.demo.ports import free_port
from tests.support.process import wait_for

PROGRAM = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
WHY_NOT = "prometheus-alertmanager is not on PATH (Debian: prometheus-alertmanager)"


@dataclass
class AlertmanagerProcess:
    """A server of the directory, which has ``alertmanager.yml`` and its data."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        assert PROGRAM is not None
        self.process = subprocess.Popen(
            [
                PROGRAM,
                f"--config.file={self.directory / 'alertmanager.yml'}",
                f"--storage.path={self.directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--cluster.listen-address=",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: self.ask("status") is not None, 60)

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def ask(self, path: str, **parameters: Any) -> Any:
        """The answer of its API; None while it does not answer."""
        try:
            answer = httpx.get(
                f"{self.url}/api/v2/{path}", params=parameters, trust_env=False, timeout=60
            )
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def alerts(self, **parameters: Any) -> list[dict[str, Any]]:
        """The alerts that fire: Alertmanager does not show others."""
        return list(self.ask("alerts", **parameters) or [])

    def silence(self, tenant: str, rule: str) -> None:
        """Silence a rule for an hour."""
        matchers = [
            {"name": name, "value": value, "isRegex": False, "isEqual": True}
            for name, value in (("tenant", tenant), ("alertname", rule))
        ]
        times = {"startsAt": "2020-01-01T00:00:00Z", "endsAt": "2099-01-01T00:00:00Z"}
        silence = {"matchers": matchers, **times, "createdBy": "test", "comment": "test"}
        answer = httpx.post(f"{self.url}/api/v2/silences", json=silence, trust_env=False)
        assert answer.status_code == 200, answer.text


@contextmanager
def alertmanager(directory: Path, config: str) -> Iterator[AlertmanagerProcess]:
    """Run an Alertmanager with this configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "alertmanager.yml").write_text(config)
    server = AlertmanagerProcess(directory, free_port())
    server.start()
    try:
        yield server
    finally:
        server.stop()
