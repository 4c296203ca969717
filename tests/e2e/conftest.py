"""One service for the tests that only send to it and ask it, and the packages of JavaScript."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import process
from tests.support.nats_servers import NatsServers
from tests.support.on_cluster import OnCluster
from tests.support.process import Running, running


@pytest.fixture(scope="session")
def session_place(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--cluster``, make the service of the session a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("cluster"):
            servers: NatsServers = request.getfixturevalue("shared_nats")
            patch.setattr(process, "place", OnCluster(servers))
        yield


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, session_place: None) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("service")) as service:
        yield service
        assert service.stop() == 0, "".join(service.log)
    faults = [line for line in service.log if "Traceback" in line or " ERROR " in line]
    assert not faults, "".join(service.log)


HERE = Path(__file__).parent / "js"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and the packages it needs."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("js")
    for name in ("package.json", "send.mjs", "page.mjs"):
        shutil.copy(HERE / name, folder)
    try:
        subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=120,
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm install failed: {error.stderr.decode()[-300:]}")
    except subprocess.TimeoutExpired:
        pytest.skip("npm install took more than two minutes")
    return folder
