"""Endpoints that show, pause and drain the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.params import WAIT
from betrace.service.api.sources import Sources

if TYPE_CHECKING:
    from betrace.service.cluster.query.node import QueryNode

endpoints = Endpoints("Administration", access="operator")

_LOOK_SECONDS = 0.5
_LOOKS = 3
"""A cluster is drained once nothing waits at so many looks: edges follow within a second."""


def pipeline_state(sources: Sources) -> dict[str, Any]:
    """``ingestion``, ``drained``, ``waiting``, ``backlog`` and ``stages``."""
    pipeline = sources.pipeline
    sizes = {name: queue.send.statistics().size for name, queue in pipeline.queues.items()}
    waiting = {name: size for name, size in sizes.items() if size}
    return {
        "ingestion": sources.admission.state,
        "drained": not waiting and not len(pipeline.correlate.backlog),
        "waiting": waiting,
        "backlog": {
            tenant: {
                "spans": line.spans,
                "bytes": line.nbytes,
                "seconds": round(line.seconds, 3),
                "cpuSeconds": round(line.cpu_seconds, 3),
            }
            for tenant, line in pipeline.correlate.backlog.shown().items()
        },
        "stages": {
            name: "paused" if stage.paused else "working" for name, stage in pipeline.stages.items()
        },
    }


@endpoints.add(
    "GET",
    "/api/admin/pipeline",
    "Whether spans are accepted, and what is in progress",
    answers={
        200: '`{"ingestion": open, paused or draining, "drained", "waiting", "backlog", "stages"}`'
    },
)
async def get_pipeline(call: Call) -> Any:
    """`waiting` is the size of each channel that is not empty, in the unit of the channel.
    `backlog` are the tenants whose spans wait because they used up their CPU time: how many, since
    when, and the CPU time they had meanwhile."""
    return pipeline_state(call.tools.sources)


@endpoints.add(
    "POST",
    "/api/admin/pipeline/pause",
    "Refuse new spans",
    answers={200: "The pipeline"},
)
async def pause_pipeline(call: Call) -> Any:
    """Requests get 503 until `resume`. Accepted spans are still processed. On a cluster, all edges
    follow within a second, and it stays so when processes restart."""
    await call.note("pipeline.pause")
    await _set_paused(call.tools.sources, paused=True)
    return pipeline_state(call.tools.sources)


@endpoints.add(
    "POST",
    "/api/admin/pipeline/resume",
    "Accept spans again",
    answers={200: "The pipeline"},
)
async def resume_pipeline(call: Call) -> Any:
    await call.note("pipeline.resume")
    await _set_paused(call.tools.sources, paused=False)
    return pipeline_state(call.tools.sources)


@endpoints.add(
    "POST",
    "/api/admin/pipeline/drain",
    "Refuse new spans and wait until the channels are empty",
    params=(WAIT,),
    answers={200: "The pipeline, drained", 202: "The pipeline, not empty yet"},
)
async def drain_pipeline(call: Call) -> Any:
    """Ingestion stays paused until `resume`. On a cluster, `waiting` also has the messages that
    are not evaluated yet (`evaluation`) and those that are not stored here yet (`query-node`)."""
    sources = call.tools.sources
    await call.note("pipeline.drain")
    await _set_paused(sources, paused=True)
    if sources.node is not None:
        waiting = await _drain_cluster(sources.node, call.params["wait"])
        found = pipeline_state(sources)
        found["waiting"] |= waiting
        found["drained"] = found["drained"] and not waiting
        return Answer(found, 200 if found["drained"] else 202)
    with trio.move_on_after(call.params["wait"]):
        for stage in sources.pipeline.stages.values():  # in the order of the channels
            await stage.drained()
            if stage.name == "trace-correlation":
                await sources.pipeline.correlate.worked_off()
    found = pipeline_state(sources)
    return Answer(found, 200 if found["drained"] else 202)


async def _set_paused(sources: Sources, *, paused: bool) -> None:
    if sources.node is not None:
        await sources.node.switch.set(paused=paused)
    elif paused:
        sources.admission.pause()
    else:
        sources.admission.resume()


async def _drain_cluster(node: QueryNode, seconds: float) -> dict[str, int]:
    """Wait until nothing waits, at most for some seconds; returns what still does."""
    looks, waiting = 0, await node.waiting()
    with trio.move_on_after(seconds):
        while looks < _LOOKS:
            await trio.sleep(_LOOK_SECONDS)
            waiting = await node.waiting()
            looks = 0 if any(waiting.values()) else looks + 1
    return {name: number for name, number in waiting.items() if number}
