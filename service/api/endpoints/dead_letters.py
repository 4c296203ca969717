"""Endpoints for dead letters."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.errors import ApiError
from betrace.service.api.params import LIMIT, NEXT, Param, read_integer, read_tenant, read_text
from betrace.service.storage.dead_letters import Letter
from betrace.service.times import write_time

endpoints = Endpoints("Administration", access="operator")

MAX_ID = 2**63 - 1
_ID = Param("id", "The id of the letter.", read_integer(1, MAX_ID))
_STAGE = Param("stage", "Only letters of this stage, such as rule-evaluation.", read_text)
_TENANT = Param("tenant", "Only letters of this tenant.", read_tenant)


@endpoints.add(
    "GET",
    "/api/admin/dead-letters",
    "Dead letters, oldest first",
    params=(_STAGE, _TENANT, LIMIT, Param("cursor", NEXT, read_integer(0, MAX_ID))),
    answers={200: '`{"deadLetters": […], "next": cursor or null}`'},
)
async def list_dead_letters(call: Call) -> Any:
    """Items that a stage could not process. Those with `next_retry` are retried automatically; the
    others wait for an operator."""
    stage, tenant, limit, after = (
        call.params[name] for name in ("stage", "tenant", "limit", "cursor")
    )
    found = await call.tools.sources.pipeline.letters.page(stage, tenant, limit + 1, after or 0)
    page = found[:limit]
    return {
        "deadLetters": [_letter(each) for each in page],
        "next": str(page[-1].id) if len(found) > limit else None,
    }


@endpoints.add(
    "GET",
    "/api/admin/dead-letters/{id}",
    "One dead letter and its contents",
    path_params=(_ID,),
    answers={200: "The letter with its `payload`", 404: "There is no such letter"},
)
async def get_dead_letter(call: Call) -> Any:
    found = await call.tools.sources.pipeline.letters.get(call.params["id"])
    if found is None:
        raise _no_letter(call)
    letter, payload = found
    return {**_letter(letter), "payload": payload}


@endpoints.add(
    "POST",
    "/api/admin/dead-letters/{id}/retry",
    "Retry a dead letter now",
    path_params=(_ID,),
    answers={
        202: '`{"retried": 1}`: it will be passed to its stage',
        404: "There is no such letter",
    },
)
async def retry_dead_letter(call: Call) -> Any:
    """The letter is deleted once its item is safe. If the stage fails again, the letter stays and
    its number of attempts grows."""
    letter_id = call.params["id"]
    retried = await call.tools.audit.do(
        call.operator(),
        "dead-letters.retry",
        {"id": letter_id},
        lambda: call.tools.sources.pipeline.letters.retry([letter_id]),
    )
    if not retried:
        raise _no_letter(call)
    return Answer({"retried": retried}, 202)


@endpoints.add(
    "POST",
    "/api/admin/dead-letters/retry",
    "Retry all dead letters now",
    params=(_STAGE, _TENANT),
    answers={202: '`{"retried": n}`: they will be passed to their stages'},
)
async def retry_dead_letters(call: Call) -> Any:
    filters = {name: value for name, value in call.params.items() if value is not None}
    retried = await call.tools.audit.do(
        call.operator(),
        "dead-letters.retry",
        filters,
        lambda: call.tools.sources.pipeline.letters.retry(**filters),
    )
    return Answer({"retried": retried}, 202)


@endpoints.add(
    "POST",
    "/api/admin/dead-letters/{id}/discard",
    "Delete a dead letter permanently",
    path_params=(_ID,),
    answers={
        200: '`{"discarded": 1}`',
        404: "There is no such letter, or it is being retried now",
    },
)
async def discard_dead_letter(call: Call) -> Any:
    letter_id = call.params["id"]
    discarded = await call.tools.audit.do(
        call.operator(),
        "dead-letters.discard",
        {"id": letter_id},
        lambda: call.tools.sources.pipeline.letters.discard([letter_id]),
    )
    if not discarded:
        raise _no_letter(call)
    return {"discarded": 1}


def _no_letter(call: Call) -> ApiError:
    return ApiError(
        404,
        f"there is no dead letter {call.params['id']}",
        "it may have been retried already; see /api/admin/dead-letters",
    )


def _letter(letter: Letter) -> dict[str, Any]:
    shown = asdict(letter)
    for name in ("first_failed_ns", "last_failed_ns", "next_retry_ns"):
        value = shown.pop(name)
        shown[name.removesuffix("_ns")] = None if value is None else write_time(value)
    return {**shown, "id": str(letter.id)}
