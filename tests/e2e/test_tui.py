"""The TUI with a running service, in-process and in its own terminal."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time

import pytest

from betrace.tui.app import BetraceApp
from betrace.tui.client import ApiClient
from tests.e2e.test_python_sdk import pay
from tests.support.process import Running, command, environment
from tests.support.tui_fake import screen_text, until

pytestmark = pytest.mark.slow


def test_the_tui_shows_and_changes_a_running_service(service: Running):
    async def drive() -> None:
        async with ApiClient(service.api) as client:
            app = BetraceApp(client)
            async with asyncio.timeout(60), app.run_test(size=(80, 24)) as pilot:
                await until(lambda: app.connection.link.status == "connected", 60)
                before = app.state.now.accepted
                await asyncio.to_thread(pay, service, 2000.0)
                await until(lambda: app.state.now.accepted >= before + 2, 60)
                assert not app.connection.link.polling
                assert len(app.state.now.stages) == 5
                assert len(app.state.now.caches) == 3
                for key, name, state in (("X", "Disable", "disabled"), ("R", "Reset", "closed")):
                    await pilot.press("3", key)
                    await until(lambda: name in screen_text(app), 60)  # noqa: B023
                    await pilot.press("y")
                    await until(lambda: app.state.now.breakers[0].state == state, 60)  # noqa: B023
                for key, state in (("P", "paused"), ("R", "open")):
                    await pilot.press("2", key)
                    await until(lambda: len(app.screen_stack) == 2, 60)
                    await pilot.press("y")
                    await until(lambda: app.state.now.ingestion == state, 60)  # noqa: B023

    asyncio.run(drive())
    breakers = service.get("/api/admin/breakers").json()["breakers"]
    assert [each["after"] for each in breakers[0]["transitions"]][-2:] == ["disabled", "closed"]


def test_the_tui_runs_in_a_terminal_until_q(service: Running):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        command("tui", "--url", service.api, "--read-only"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment() | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    shown, end, left = b"", time.monotonic() + 60, False
    try:
        while process.poll() is None:
            assert time.monotonic() < end, shown[-2000:]
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other end was closed
                    break
            if not left and b"connected since" in shown:
                os.write(ours, b"q")
                left = True
        assert process.wait(60) == 0
        assert b"READ-ONLY" in shown
        assert b"Traceback" not in shown
    finally:
        process.kill()
        process.wait()
        os.close(ours)
