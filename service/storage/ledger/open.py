"""Opens the ledger that the settings ask for."""

from __future__ import annotations

from betrace.service.config.settings import Settings
from betrace.service.storage.ledger.base import Ledger, LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger

LEDGER_FILE = "ledger.sqlite"
_REGISTRATION_SECONDS = 1.0


def open_ledger(settings: Settings) -> Ledger:
    """Open the ledger. This blocks, for TigerBeetle up to ``ledger.tigerbeetle.start_seconds``.
    Raises :exc:`LedgerError` if the ledger can never work with these settings."""
    local = SqliteLedger(settings.storage.path / LEDGER_FILE)
    try:
        if settings.ledger.kind == "sqlite":
            local.take_over()
            return local
        return _tigerbeetle(settings, local)
    except BaseException:
        local.close()
        raise


def _tigerbeetle(settings: Settings, journal: SqliteLedger) -> Ledger:
    # Imported here because it loads TigerBeetle's library.
    from betrace.service.storage.ledger.tigerbeetle import TigerBeetleLedger

    timeout = settings.breakers.storage.timeout_seconds
    if timeout < _REGISTRATION_SECONDS:
        raise LedgerError(
            f"breakers.storage.timeout_seconds is {timeout:g}, which is too short for a client to "
            f"register with TigerBeetle: set it to {_REGISTRATION_SECONDS:g} or more",
            transient=False,
        )
    limits = settings.ledger.tigerbeetle
    ledger = TigerBeetleLedger(
        limits.addresses, limits.cluster_id, journal, limits.batch_transfers, limits.close_seconds
    )
    try:
        ledger.start(limits.start_seconds)
    except BaseException:
        ledger.close()
        raise
    return ledger
