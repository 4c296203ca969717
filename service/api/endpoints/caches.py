"""Endpoints that empty and fill caches."""

from __future__ import annotations

from typing import Any

from betrace.service.api.endpoint import Call, Endpoints
from betrace.service.api.errors import ApiError
from betrace.service.api.params import Param, near, read_tenant, read_text

endpoints = Endpoints("Administration", access="operator")


@endpoints.add(
    "POST",
    "/api/performance/cache-invalidate/{cache}",
    "Empty a cache, for one tenant or for all",
    path_params=(Param("cache", "The name of the cache, such as ruleContainers.", read_text),),
    params=(Param("tenantId", "Only entries of this tenant.", read_tenant),),
    answers={
        200: '`{"cache", "invalidated"}`: the number of entries removed',
        404: "There is no such cache",
    },
)
async def invalidate_cache(call: Call) -> Any:
    """An entry that is being loaded now is not kept either. Verdicts do not depend on caches."""
    caches, name = call.tools.sources.caches, call.params["cache"]
    tenant = call.params["tenantId"]
    if name not in caches.names:
        raise ApiError(404, f"there is no cache {name[:80]!r}", near(name, caches.names))
    target = {"cache": name} if tenant is None else {"cache": name, "tenant": tenant}
    await call.note("cache.invalidate", **target)
    return {"cache": name, "invalidated": caches.invalidate(name, tenant)}


@endpoints.add(
    "POST",
    "/api/admin/cache-warmup",
    "Fill the caches for the active tenants",
    answers={200: '`{"tenants", "loaded", "failed", "seconds"}`; loaded and failed are entries'},
)
async def warm_up_caches(call: Call) -> Any:
    """Loads the rules, the public keys and the traces of the newest signals, first for tenants with
    traces in memory, then for others with rules, up to `caches.rule_sets` tenants. This also
    happens automatically `caches.warm_up_seconds` after the start."""
    await call.note("cache.warm-up")
    return await call.tools.sources.caches.warm_up()
