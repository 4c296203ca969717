"""Endpoints by which operators act. Each action is in the audit log with who and when."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import Any, TypeVar

from betrace.service.api.backend import AuditError, Operator
from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.params import (
    LIMIT,
    Param,
    near,
    read_choice,
    read_integer,
    read_pattern,
    read_text,
)
from betrace.service.pipeline.breakers import ACTIONS
from betrace.service.receiver.responses import ApiError
from betrace.service.storage.dead_letters import DeadLetterError
from betrace.service.tenants import TENANT_RULE

R = TypeVar("R")

endpoints = Endpoints("Administration", access="operator")

OPERATOR_HEADER = "x-operator"
MAX_ID = 2**63 - 1
_OPERATOR = re.compile(r"[\w.@+-]{1,64}")
_BREAKER = Param("name", "The breaker: rule-evaluation, ledger or duckdb.", read_text)
_LETTER = Param("id", "The letter's id.", read_integer(1, MAX_ID))
_STAGE = Param("stage", "Only letters of this stage, such as rule-evaluation.", read_text)
_TENANT = Param(
    "tenant",
    "Only letters of this tenant.",
    read_pattern(r"[a-z0-9][a-z0-9_-]{0,62}", f"must be a tenant's name: {TENANT_RULE}"),
)


def who(call: Call) -> Operator:
    """Who acts: by name where they give one."""
    name = call.headers.get(OPERATOR_HEADER, "")
    if name and not _OPERATOR.fullmatch(name):
        raise ApiError(
            400, "the header X-Operator is no name", "use 1 to 64 letters, digits or . _ @ + -"
        )
    return Operator(name or "operator", call.client)


async def _acting(action: Awaitable[R]) -> R:
    """Tell what keeps an action from being done."""
    try:
        return await action
    except (AuditError, DeadLetterError) as error:
        raise ApiError(
            503, str(error), "nothing was done; make room on the disk and try again"
        ) from error


# Breakers


@endpoints.add(
    "GET",
    "/api/admin/breakers",
    "All circuit breakers",
    answers={200: '`{"breakers": [{"name", "state", "failureRate", "calls", …}]}`'},
)
async def list_breakers(call: Call) -> Any:
    """`state` is closed, open, half_open, forced_open or disabled; rates are null below the least
    number of calls; `retryInSeconds` is when a call may be permitted, null if only an operator can
    say."""
    return {"breakers": call.backend.admin.breakers()}


@endpoints.add(
    "POST",
    "/api/admin/breakers/{name}/{action}",
    "Trip, reset, force open or disable a circuit breaker",
    path_params=(
        _BREAKER,
        Param(
            "action",
            "What to do.",
            read_choice(*ACTIONS),
            {"type": "string", "enum": list(ACTIONS)},
        ),
    ),
    answers={200: "The breaker", 404: "There is no such breaker"},
)
async def act_on_breaker(call: Call) -> Any:
    """`trip` opens it as failures would, trials follow; `reset` closes it; `force-open` refuses all
    calls and `disable` permits all, until another action."""
    admin, name = call.backend.admin, call.params["name"]
    names = [breaker["name"] for breaker in admin.breakers()]
    if name not in names:
        raise ApiError(404, f"there is no circuit breaker {name[:80]!r}", near(name, names))
    return await _acting(admin.act_on_breaker(who(call), name, call.params["action"]))


# Dead letters


@endpoints.add(
    "GET",
    "/api/admin/dead-letters",
    "Dead letters, oldest first",
    params=(
        _STAGE,
        _TENANT,
        LIMIT,
        Param(
            "cursor", "`next` of the answer before, to go on from there.", read_integer(0, MAX_ID)
        ),
    ),
    answers={200: '`{"deadLetters": […], "next": cursor or null}`'},
)
async def list_dead_letters(call: Call) -> Any:
    """Items that a stage failed on for good. Those with `next_retry` are tried again by themselves,
    the others wait for an operator."""
    params = call.params
    found, following = await _acting(
        call.backend.admin.dead_letters(
            params["stage"], params["tenant"], params["limit"], params["cursor"] or 0
        )
    )
    return {"deadLetters": found, "next": None if following is None else str(following)}


@endpoints.add(
    "GET",
    "/api/admin/dead-letters/{id}",
    "One dead letter and what is in it",
    path_params=(_LETTER,),
    answers={200: "The letter with its `payload`", 404: "There is no such letter"},
)
async def get_dead_letter(call: Call) -> Any:
    letter = await _acting(call.backend.admin.dead_letter(call.params["id"]))
    if letter is None:
        raise _no_letter(call)
    return letter


@endpoints.add(
    "POST",
    "/api/admin/dead-letters/{id}/retry",
    "Try a dead letter again now",
    path_params=(_LETTER,),
    answers={
        202: '`{"retried": 1}`: it will be given to its stage',
        404: "There is no such letter",
    },
)
async def retry_dead_letter(call: Call) -> Any:
    """The letter is deleted when its item is safe; if that fails again, it stays, with one attempt
    more."""
    admin = call.backend.admin
    found = await _acting(
        admin.retry_dead_letters(who(call), call.params["id"], stage=None, tenant=None)
    )
    if not found:
        raise _no_letter(call)
    return Answer({"retried": found}, 202)


@endpoints.add(
    "POST",
    "/api/admin/dead-letters/retry",
    "Try all dead letters again now",
    params=(_STAGE, _TENANT),
    answers={202: '`{"retried": n}`: they will be given to their stages'},
)
async def retry_dead_letters(call: Call) -> Any:
    found = await _acting(
        call.backend.admin.retry_dead_letters(
            who(call), None, stage=call.params["stage"], tenant=call.params["tenant"]
        )
    )
    return Answer({"retried": found}, 202)


@endpoints.add(
    "POST",
    "/api/admin/dead-letters/{id}/discard",
    "Delete a dead letter for good",
    path_params=(_LETTER,),
    answers={
        200: '`{"discarded": 1}`',
        404: "There is no such letter, or it is just being tried again",
    },
)
async def discard_dead_letter(call: Call) -> Any:
    if not await _acting(call.backend.admin.discard_dead_letter(who(call), call.params["id"])):
        raise _no_letter(call)
    return {"discarded": 1}


def _no_letter(call: Call) -> ApiError:
    return ApiError(
        404,
        f"there is no dead letter {call.params['id']} to act on",
        "it may have been retried meanwhile; see /api/admin/dead-letters",
    )


# Fallback files


@endpoints.add(
    "GET",
    "/api/admin/fallback",
    "What waits in local files for the ledger and DuckDB",
    answers={200: '`{"fallbacks": [{"name", "pendingFiles", "pendingRecords", …}]}`'},
)
async def list_fallbacks(call: Call) -> Any:
    return {"fallbacks": call.backend.admin.fallbacks()}


@endpoints.add(
    "POST",
    "/api/admin/fallback/replay",
    "Try to write the local files back now",
    answers={202: '`{"fallbacks": […]}`, as they are at this moment'},
)
async def replay_fallbacks(call: Call) -> Any:
    """They are written back by themselves when the store's breaker permits it; this does not wait
    for the next try."""
    await _acting(call.backend.admin.write_back_now(who(call)))
    return Answer({"fallbacks": call.backend.admin.fallbacks()}, 202)


# Checkpoints

_CHECKPOINT = '`{"savedAt", "ageSeconds", "bytes", "toReplayBytes", "covers": {…}, …}`'


@endpoints.add(
    "GET",
    "/api/admin/checkpoint",
    "The last checkpoint: its age and what it covers",
    answers={200: _CHECKPOINT},
)
async def get_checkpoint(call: Call) -> Any:
    """`savedAt` is null before the first. `covers` says when the traces were copied, how many there
    were, and how many requests of the log up to then they did not contain; `toReplayBytes` is what
    a restart would read of the log beyond it."""
    return await call.backend.admin.checkpoint()


@endpoints.add(
    "POST",
    "/api/admin/checkpoint",
    "Save a checkpoint now",
    answers={200: _CHECKPOINT, 503: "It could not be written, or the stores are too far behind"},
)
async def save_checkpoint(call: Call) -> Any:
    """Answers when it is durable. What had left the traces is stored first, for which it waits up
    to 30 seconds."""
    saved = await _acting(call.backend.admin.save_checkpoint(who(call)))
    if saved is None:
        raise ApiError(503, "the stores are too far behind", "see /health, and try again later")
    if not saved:
        raise ApiError(503, "the checkpoint cannot be written", "check the disk, and try again")
    return await call.backend.admin.checkpoint()


# Caches


@endpoints.add(
    "POST",
    "/api/performance/cache-invalidate/{cache}",
    "Empty a cache, of one tenant or of all",
    path_params=(Param("cache", "The cache's name, such as ruleContainers.", read_text),),
    params=(Param("tenantId", "Only what is of this tenant.", _TENANT.read),),
    answers={
        200: '`{"cache", "invalidated"}`: how many entries there were',
        404: "There is no such cache",
    },
)
async def invalidate_cache(call: Call) -> Any:
    """What is loaded at this moment is not kept either. Verdicts do not depend on caches."""
    admin, name = call.backend.admin, call.params["cache"]
    if name not in admin.caches:
        raise ApiError(404, f"there is no cache {name[:80]!r}", near(name, admin.caches))
    dropped = await _acting(admin.invalidate_cache(who(call), name, call.params["tenantId"]))
    return {"cache": name, "invalidated": dropped}


@endpoints.add(
    "POST",
    "/api/admin/cache-warmup",
    "Fill the caches for the active tenants",
    answers={200: '`{"tenants", "loaded", "failed", "seconds"}`; loaded and failed are entries'},
)
async def warm_up_caches(call: Call) -> Any:
    """Loads the rules, the public keys and the traces of the newest signals of tenants with traces
    in memory, then of those that have rules, as many as `caches.rule_sets`. Done by itself
    `caches.warm_up_seconds` after the start."""
    return await _acting(call.backend.admin.warm_up_caches(who(call)))


# The pipeline


@endpoints.add(
    "GET",
    "/api/admin/pipeline",
    "Whether spans are accepted, and what is under way",
    answers={200: '`{"ingestion": open, paused or draining, "drained", "waiting", "stages"}`'},
)
async def get_pipeline(call: Call) -> Any:
    """`waiting` says by channel how much is in it, in its unit."""
    return call.backend.admin.pipeline()


@endpoints.add(
    "POST",
    "/api/admin/pipeline/pause",
    "Refuse new spans",
    answers={200: "The pipeline"},
)
async def pause_pipeline(call: Call) -> Any:
    """Requests get 503 until `resume`; what was accepted is worked on."""
    return await _acting(call.backend.admin.pause(who(call)))


@endpoints.add(
    "POST",
    "/api/admin/pipeline/resume",
    "Accept spans again",
    answers={200: "The pipeline"},
)
async def resume_pipeline(call: Call) -> Any:
    return await _acting(call.backend.admin.resume(who(call)))


@endpoints.add(
    "POST",
    "/api/admin/pipeline/drain",
    "Refuse new spans and wait until the channels are empty",
    params=(
        Param(
            "wait",
            "Seconds to wait, at most.",
            read_integer(0, 60),
            {"type": "integer", "minimum": 0, "maximum": 60, "default": 10},
            default=10,
        ),
    ),
    answers={200: "The pipeline, drained", 202: "The pipeline, with something left in it"},
)
async def drain_pipeline(call: Call) -> Any:
    """Ingestion stays paused until `resume`."""
    found = await _acting(call.backend.admin.drain(who(call), call.params["wait"]))
    return Answer(found, 200 if found["drained"] else 202)
