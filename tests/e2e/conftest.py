"""One service, shared by the tests that do not stop or reconfigure it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.process import Running, running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("service")) as service:
        yield service
        assert service.stop() == 0, "".join(service.log)
    faults = [line for line in service.log if "Traceback" in line or " ERROR " in line]
    assert not faults, "".join(service.log)
