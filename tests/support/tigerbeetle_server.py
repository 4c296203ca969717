"""A private TigerBeetle server for tests and benchmarks, if the program is installed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from betrace.service.cli.demo.ports import free_port

CLUSTER = 7
BATCH = 253
"""The most transfers in one request with ``--development``."""
PROGRAM = os.environ.get("TIGERBEETLE_BIN") or shutil.which("tigerbeetle")
MISSING = "no TigerBeetle server: put `tigerbeetle` on PATH or name it in TIGERBEETLE_BIN"


class Server:
    """One replica on loopback, with its file in ``directory``; :meth:`start` starts it."""

    def __init__(self, directory: Path) -> None:
        assert PROGRAM is not None
        self._file = directory / "cluster.tigerbeetle"
        self.address = f"127.0.0.1:{free_port()}"
        self._log = (directory / "tigerbeetle.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None
        cluster = (f"--cluster={CLUSTER}", "--replica=0", "--replica-count=1")
        subprocess.run(
            [PROGRAM, "format", *cluster, "--development", self._file],
            check=True,
            stdout=self._log,
            stderr=self._log,
        )

    def start(self) -> None:
        """Start the server unless it runs; returns when it listens."""
        assert PROGRAM is not None
        if self._process is not None:
            return
        options = (f"--addresses={self.address}", "--development")
        self._process = subprocess.Popen(
            [PROGRAM, "start", *options, self._file], stdout=self._log, stderr=self._log
        )
        host, port = self.address.split(":")
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection((host, int(port)), 1).close()
            except OSError:
                assert self._process.poll() is None, "the server ended: see tigerbeetle.log"
                assert time.monotonic() < until, "the server does not listen"
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        """Kill the server (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Suspend the server (SIGSTOP): connections stay open, but nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume the server (SIGCONT)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the server and delete its file, which is large."""
        self.kill()
        self._log.close()
        self._file.unlink()
