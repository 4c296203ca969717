"""Endpoints for checkpoints."""

from __future__ import annotations

from typing import Any

import trio

from betrace.service.api.endpoint import Call, Endpoints
from betrace.service.api.errors import ApiError

endpoints = Endpoints("Administration", access="operator")

CHECKPOINT_SECONDS = 30.0
"""How long an operator's checkpoint may wait for the stores."""
_CHECKPOINT = '`{"savedAt", "ageSeconds", "bytes", "toReplayBytes", "covers": {…}, …}`'


@endpoints.add(
    "GET",
    "/api/admin/checkpoint",
    "The last checkpoint: its age and what it covers",
    answers={200: _CHECKPOINT},
)
async def get_checkpoint(call: Call) -> Any:
    """`savedAt` is null before the first checkpoint. `covers` gives the time when the traces were
    copied, their number, and how many earlier requests of the log they did not contain.
    `toReplayBytes` is how much of the log a restart would read."""
    return await call.blocking(call.tools.sources.recovery.shown)


@endpoints.add(
    "POST",
    "/api/admin/checkpoint",
    "Save a checkpoint now",
    answers={200: _CHECKPOINT, 503: "It could not be written, or the stores are too far behind"},
)
async def save_checkpoint(call: Call) -> Any:
    """Answers when the checkpoint is durable. Waits up to 30 seconds until the stores have what
    left the traces before."""
    await call.note("checkpoint.save")
    saved = None
    with trio.move_on_after(CHECKPOINT_SECONDS):
        saved = await call.tools.sources.recovery.save()
    if saved is None:
        raise ApiError(503, "the stores are too far behind", "see /readyz, and try again later")
    if not saved:
        raise ApiError(503, "the checkpoint cannot be written", "check the disk and try again")
    return await get_checkpoint(call)
