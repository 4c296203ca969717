"""The systemd unit in deploy/."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from betrace.service.config.settings import Settings

UNIT = Path(__file__).parents[2] / "deploy/betrace.service"
PROGRAM = "/opt/betrace/bin/betrace"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))
    ran = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


def test_systemd_waits_until_the_service_has_drained() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    assert unit["Service"]["ExecStart"].startswith(PROGRAM)
    shutdown = Settings().shutdown
    limit = unit["Service"]["TimeoutStopSec"].removesuffix("s")
    assert int(limit) > shutdown.delay_seconds + shutdown.grace_seconds
