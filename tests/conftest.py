"""Shared by all tests: how thorough hypothesis is, which tests must not run side by side, and
whether services run as one process or as a cluster.

``BETRACE_EXAMPLES=10000 pytest tests/service/traces`` is the long run;
``pytest --cluster tests/service/api`` runs the tests of the API on a cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")

PROCESS, CLUSTER = "process", "cluster"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", action="store_true", help="run services as clusters")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests marked ``also_on_cluster`` both ways."""
    marked = metafunc.definition.get_closest_marker("also_on_cluster") is not None
    if marked and not metafunc.config.getoption("cluster"):
        metafunc.parametrize("place", [PROCESS, CLUSTER], indirect=True)


@pytest.fixture(autouse=True)
def place(request: pytest.FixtureRequest) -> str:
    """Where the services of a test run."""
    default = CLUSTER if request.config.getoption("cluster") else PROCESS
    where: str = getattr(request, "param", default)
    if where == CLUSTER:
        if (mark := request.node.get_closest_marker("one_process")) is not None:
            pytest.skip(f"one process only: {mark.args[0]}")
        request.getfixturevalue("on_cluster")
    return where


@pytest.fixture
def on_cluster(shared_nats: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make services clusters on the shared NATS server."""
    from tests.support import inprocess, process
    from tests.support.nats_servers import NatsServers
    from tests.support.on_cluster import OnCluster, hurry

    assert isinstance(shared_nats, NatsServers)
    hurry(monkeypatch)
    found = OnCluster(shared_nats)
    monkeypatch.setattr(inprocess, "place", found)
    monkeypatch.setattr(process, "place", found)
    yield
    trio.run(found.delete_streams)


@pytest.fixture(scope="session")
def shared_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """One NATS server for all tests that need no other."""
    from tests.support.nats_servers import MISSING, PROGRAM, NatsServers

    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats")) as servers:
        yield servers


settings.register_profile(
    "betrace",
    deadline=None,  # kernels compile in the middle of a test
    max_examples=int(os.environ.get("BETRACE_EXAMPLES", "100")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("betrace")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the cluster, and put the other slow tests into one group. With ``--dist
    loadgroup`` these run one after another in the same process, because they start processes and
    measure time. The tests of the cluster mostly wait, and run side by side."""
    for item in items:
        if _is_of_the_cluster(item):
            item.add_marker(pytest.mark.cluster)
        elif item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group("slow"))


def _is_of_the_cluster(item: pytest.Item) -> bool:
    """Whether a test is about the cluster, by its path, or runs a service as one. The programs that
    measure clusters have their cores to themselves."""
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    if path.startswith("perf/"):
        return False
    if "cluster" in path or "jetstream" in path:
        return True
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("place") == CLUSTER
