"""The stores on the local disk beside the log, the ledger and DuckDB."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from betrace.service.config.settings import Settings
from betrace.service.storage.alert_store import AlertStore
from betrace.service.storage.dead_letters import DeadLetterStore
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.triage import TriageStore
from betrace.service.storage.undecided import UndecidedStore


@dataclass(frozen=True, slots=True)
class LocalStores:
    """Dead letters, the fallback files of each store, what people decided about rules and signals,
    alerts, and the traces that rules could not judge."""

    letters: DeadLetterStore
    ledger: FallbackFiles
    duckdb: FallbackFiles
    triage: TriageStore
    alerts: AlertStore
    undecided: UndecidedStore


def open_local_stores(data: Path, settings: Settings, stack: ExitStack) -> LocalStores:
    """Open the stores in the data directory; ``stack`` closes them. Blocks."""
    letters = DeadLetterStore(
        data / "dead-letters.sqlite",
        data / "dead-letters-exported",
        settings.dead_letters.max_bytes,
    )
    stack.callback(letters.close)
    files = []
    for store in ("ledger", "duckdb"):
        opened = FallbackFiles(
            data / "fallback" / store, settings.fallback.max_bytes, settings.fallback.file_bytes
        )
        stack.callback(opened.close)
        files.append(opened)
    triage = TriageStore(data / "triage.sqlite")
    stack.callback(triage.close)
    alerts = AlertStore(data / "alerts.sqlite")
    stack.callback(alerts.close)
    undecided = UndecidedStore(data / "undecided.sqlite")
    stack.callback(undecided.close)
    return LocalStores(letters, files[0], files[1], triage, alerts, undecided)
