"""Endpoints that create, change and delete tenants."""

from __future__ import annotations

from typing import Any

from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.errors import ApiError
from betrace.service.api.params import LIMIT, NEXT, WAIT, Param, read_pattern, read_tenant
from betrace.service.tenants import TENANT_RULE, is_tenant_name

endpoints = Endpoints("Tenants", access="operator")

MAX_QUOTA = 1_000_000_000
MAX_GRACE_SECONDS = 366 * 86_400
DAY_SECONDS = 86_400
_NAME = Param("tenant", "The name of the tenant.", read_tenant)
_KID = Param(
    "kid", "The id of the key.", read_pattern(r"[A-Za-z0-9_-]{43}", "must be the id of a key")
)
_TENANT = '`{"name", "state", "createdAt", "quota", "keys": [{"kid", "createdAt", "expiresAt"}]}`'
_MISSING = "There is no such tenant"
_QUOTA = {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_QUOTA}


def _integer(call: Call, name: str, most: int, value: Any) -> Any:
    if value is not None and not 0 <= value <= most:
        raise ApiError(400, f"the field {name} is {value}", f"it must be from 0 to {most}")
    return value


@endpoints.add(
    "GET",
    "/api/admin/tenants",
    "All tenants, by name",
    params=(
        LIMIT,
        Param("cursor", NEXT, read_tenant),
    ),
    answers={200: '`{"tenants": […], "next": cursor or null}`'},
)
async def list_tenants(call: Call) -> Any:
    """`state` is active, deleting, or implicit: the tenant was never created but has sent spans
    while authentication was off. `quota` is in spans per second; 0 means no limit, null means the
    configured quota."""
    found, following = await call.tools.tenants.page(
        call.params["cursor"] or "", call.params["limit"]
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
    """`publicKey` is an Ed25519 public key in PEM; its tokens authenticate the tenant. The service
    never sees the private key. A deleted tenant that is created again starts empty."""
    given = call.json({"tenant": str}, {"publicKey": str, "quota": int})
    if not is_tenant_name(given["tenant"]):
        raise ApiError(400, f"tenant is {given['tenant'][:80]!r}", TENANT_RULE)
    quota = _integer(call, "quota", MAX_QUOTA, given.get("quota"))
    made = await call.tools.tenants.create(
        call.operator(), given["tenant"], quota, given.get("publicKey")
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
    found = await call.tools.tenants.get(call.params["tenant"])
    if found is None:
        raise ApiError(404, f"there is no tenant {call.params['tenant']}", "create it first")
    return found


@endpoints.add(
    "DELETE",
    "/api/admin/tenants/{tenant}",
    "Delete a tenant with all its data",
    path_params=(_NAME,),
    params=(WAIT,),
    answers={
        200: '`{"tenant", "state": "deleted"}`',
        202: '`{"tenant", "state": "deleting"}`: it continues, also after a restart',
        404: _MISSING,
    },
)
async def delete_tenant(call: Call) -> Any:
    """Deletes its spans, signals, traces, rules, dead letters and keys. Its requests get 403 until
    it is created again. The ledger is append-only and keeps its accounts, hidden."""
    name = call.params["tenant"]
    done = await call.tools.tenants.delete(call.operator(), name, call.params["wait"])
    state = "deleted" if done else "deleting"
    return Answer({"tenant": name, "state": state}, 200 if done else 202)


@endpoints.add(
    "PUT",
    "/api/admin/tenants/{tenant}/quota",
    "Change how many spans per second a tenant may send",
    path_params=(_NAME,),
    body={"type": "object", "required": [], "properties": {"spansPerSecond": _QUOTA}},
    answers={200: "The tenant", 404: "It was never created"},
)
async def put_quota(call: Call) -> Any:
    """0 means no limit; without `spansPerSecond` the configured quota applies."""
    given = call.json({}, {"spansPerSecond": int})
    quota = _integer(call, "spansPerSecond", MAX_QUOTA, given.get("spansPerSecond"))
    return await call.tools.tenants.set_quota(call.operator(), call.params["tenant"], quota)


@endpoints.add(
    "POST",
    "/api/admin/tenants/{tenant}/keys",
    "Add a key and let the others expire",
    path_params=(_NAME,),
    body={
        "type": "object",
        "required": ["publicKey"],
        "properties": {
            "publicKey": {"type": "string"},
            "graceSeconds": {"type": "integer", "minimum": 0, "maximum": MAX_GRACE_SECONDS},
        },
    },
    answers={201: "The tenant", 404: _MISSING, 409: "It already has this key, or too many keys"},
)
async def add_key(call: Call) -> Any:
    """`publicKey` is an Ed25519 public key in PEM. The tenant's other keys stay valid for
    `graceSeconds` (by default a day), so that senders can switch one after the other."""
    given = call.json({"publicKey": str}, {"graceSeconds": int})
    grace = _integer(
        call, "graceSeconds", MAX_GRACE_SECONDS, given.get("graceSeconds", DAY_SECONDS)
    )
    changed = await call.tools.tenants.add_key(
        call.operator(), call.params["tenant"], given["publicKey"], grace
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
    """Its tokens are invalid from now on, including those that were verified before."""
    params = call.params
    return await call.tools.tenants.revoke_key(call.operator(), params["tenant"], params["kid"])
