"""The ledger whose signals are exported, and a receiver of webhooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from betrace.service.storage.ledger.sqlite import SqliteLedger
from tests.support.http_receiver import Receiver, receiving


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SqliteLedger]:
    opened = SqliteLedger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened
