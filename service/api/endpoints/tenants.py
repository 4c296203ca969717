"""Endpoints by which operators make, change and delete tenants."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, TypeVar

from betrace.service.api.backend import AuditError
from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.endpoints.admin import who
from betrace.service.api.params import LIMIT, Param, read_integer, read_pattern
from betrace.service.receiver.responses import ApiError
from betrace.service.tenancy.directory import DirectoryError, TenantError, UnknownTenantError
from betrace.service.tenancy.tokens import BadKeyError
from betrace.service.tenants import TENANT_RULE, is_tenant_name

R = TypeVar("R")

endpoints = Endpoints("Tenants", access="operator")

MAX_QUOTA = 1_000_000_000
MAX_GRACE_SECONDS = 366 * 86_400
DAY_SECONDS = 86_400
_MUST = f"must be a tenant's name: {TENANT_RULE}"
_NAME = Param("tenant", "The tenant's name.", read_pattern(r"[a-z0-9][a-z0-9_-]{0,62}", _MUST))
_KID = Param(
    "kid", "The key's name.", read_pattern(r"[A-Za-z0-9_-]{43}", "must be the name of a key")
)
_TENANT = '`{"name", "state", "createdAt", "quota", "keys": [{"kid", "createdAt", "expiresAt"}]}`'
_MISSING = "There is no such tenant"
_QUOTA = {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_QUOTA}


async def _doing(action: Awaitable[R]) -> R:
    """Tell what keeps an action from being done."""
    try:
        return await action
    except UnknownTenantError as error:
        raise ApiError(404, str(error), error.hint) from error
    except TenantError as error:
        raise ApiError(409, str(error), error.hint) from error
    except BadKeyError as error:
        raise ApiError(400, str(error), "see docs/security.md") from error
    except (AuditError, DirectoryError) as error:
        raise ApiError(
            503, str(error), "nothing was done; make room on the disk and try again"
        ) from error


def _integer(call: Call, name: str, most: int, value: Any) -> Any:
    if value is not None and not 0 <= value <= most:
        raise ApiError(400, f"the field {name} is {value}", f"it must be 0 to {most}")
    return value


@endpoints.add(
    "GET",
    "/api/admin/tenants",
    "All tenants, by name",
    params=(
        LIMIT,
        Param(
            "cursor",
            "`next` of the answer before, to go on from there.",
            read_pattern(r"[a-z0-9][a-z0-9_-]{0,62}", _MUST),
        ),
    ),
    answers={200: '`{"tenants": […], "next": cursor or null}`'},
)
async def list_tenants(call: Call) -> Any:
    """`state` is active, deleting, or implicit: never created, but without authentication it has
    sent spans. `quota` is in spans a second, 0 for no limit, null for what is configured."""
    found, following = await _doing(
        call.backend.tenants.page(call.params["cursor"] or "", call.params["limit"])
    )
    return {"tenants": found, "next": following}


@endpoints.add(
    "POST",
    "/api/admin/tenants",
    "Create a tenant",
    body={
        "type": "object",
        "required": ["tenant"],
        "properties": {
            "tenant": {"type": "string"},
            "publicKey": {"type": "string"},
            "quota": {"type": "integer", "minimum": 0, "maximum": MAX_QUOTA},
        },
    },
    answers={201: "The tenant", 409: "It exists, or it is being deleted"},
)
async def create_tenant(call: Call) -> Any:
    """`publicKey` is an Ed25519 public key in PEM, whose tokens are then the tenant's; the service
    never sees the private key. A tenant that was deleted begins anew."""
    given = call.json({"tenant": str}, {"publicKey": str, "quota": int})
    if not is_tenant_name(given["tenant"]):
        raise ApiError(400, f"tenant is {given['tenant'][:80]!r}", f"tenant {_MUST}")
    quota = _integer(call, "quota", MAX_QUOTA, given.get("quota"))
    made = await _doing(
        call.backend.tenants.create(who(call), given["tenant"], quota, given.get("publicKey"))
    )
    return Answer(made, 201)


@endpoints.add(
    "GET",
    "/api/admin/tenants/{tenant}",
    "One tenant",
    path_params=(_NAME,),
    answers={200: _TENANT, 404: _MISSING},
)
async def get_tenant(call: Call) -> Any:
    found = await _doing(call.backend.tenants.get(call.params["tenant"]))
    if found is None:
        raise ApiError(404, f"there is no tenant {call.params['tenant']}", "create it first")
    return found


@endpoints.add(
    "DELETE",
    "/api/admin/tenants/{tenant}",
    "Delete a tenant with all its data",
    path_params=(_NAME,),
    params=(
        Param(
            "wait",
            "Seconds to wait for it, at most.",
            read_integer(0, 60),
            {"type": "integer", "minimum": 0, "maximum": 60, "default": 10},
            default=10,
        ),
    ),
    answers={
        200: '`{"tenant", "state": "deleted"}`',
        202: '`{"tenant", "state": "deleting"}`: it goes on, also after a restart',
        404: _MISSING,
    },
)
async def delete_tenant(call: Call) -> Any:
    """Its spans, signals, traces, rules, dead letters and keys. What it sends is refused with 403
    from now on, until it is created again. The ledger, which is append-only, keeps its accounts,
    hidden."""
    name = call.params["tenant"]
    done = await _doing(call.backend.tenants.delete(who(call), name, call.params["wait"]))
    state = "deleted" if done else "deleting"
    return Answer({"tenant": name, "state": state}, 200 if done else 202)


@endpoints.add(
    "PUT",
    "/api/admin/tenants/{tenant}/quota",
    "Change how many spans a second a tenant may send",
    path_params=(_NAME,),
    body={"type": "object", "required": [], "properties": {"spansPerSecond": _QUOTA}},
    answers={200: "The tenant", 404: "It was never created"},
)
async def put_quota(call: Call) -> Any:
    """0 is no limit; without `spansPerSecond` the configuration decides."""
    given = call.json({}, {"spansPerSecond": int})
    quota = _integer(call, "spansPerSecond", MAX_QUOTA, given.get("spansPerSecond"))
    return await _doing(call.backend.tenants.set_quota(who(call), call.params["tenant"], quota))


@endpoints.add(
    "POST",
    "/api/admin/tenants/{tenant}/keys",
    "Add a key, and let the others expire",
    path_params=(_NAME,),
    body={
        "type": "object",
        "required": ["publicKey"],
        "properties": {
            "publicKey": {"type": "string"},
            "graceSeconds": {"type": "integer", "minimum": 0, "maximum": MAX_GRACE_SECONDS},
        },
    },
    answers={201: "The tenant", 404: _MISSING, 409: "It has this key, or too many"},
)
async def add_key(call: Call) -> Any:
    """`publicKey` is an Ed25519 public key in PEM. The keys that the tenant has count for
    `graceSeconds` more (a day if not given), so that senders can be changed one after the other."""
    given = call.json({"publicKey": str}, {"graceSeconds": int})
    grace = _integer(
        call, "graceSeconds", MAX_GRACE_SECONDS, given.get("graceSeconds", DAY_SECONDS)
    )
    changed = await _doing(
        call.backend.tenants.add_key(who(call), call.params["tenant"], given["publicKey"], grace)
    )
    return Answer(changed, 201)


@endpoints.add(
    "DELETE",
    "/api/admin/tenants/{tenant}/keys/{kid}",
    "Revoke a key",
    path_params=(_NAME, _KID),
    answers={200: "The tenant", 404: "There is no such tenant, or it has no such key"},
)
async def revoke_key(call: Call) -> Any:
    """Its tokens do not count from now on, also those that were verified before."""
    params = call.params
    return await _doing(call.backend.tenants.revoke_key(who(call), params["tenant"], params["kid"]))
