"""Endpoints that show, pause and drain the pipeline."""

from __future__ import annotations

from typing import Any

import trio

from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.params import WAIT
from betrace.service.api.sources import Sources

endpoints = Endpoints("Administration", access="operator")


def pipeline_state(sources: Sources) -> dict[str, Any]:
    """``ingestion``, ``drained``, ``waiting``, ``backlog`` and ``stages``."""
    pipeline = sources.pipeline
    sizes = {name: queue.send.statistics().size for name, queue in pipeline.queues.items()}
    waiting = {name: size for name, size in sizes.items() if size}
    return {
        "ingestion": _ingestion(sources),
        "drained": not (waiting or len(pipeline.correlate.backlog) or len(pipeline.ingest.heavy)),
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


def _ingestion(sources: Sources) -> str:
    node = sources.node
    if node is None or sources.admission.state == "draining":
        return sources.admission.state
    return "paused" if node.ingestion_paused else "open"


async def _set_paused(call: Call, paused: bool) -> None:
    """Pause or resume ingestion; on a cluster, at all edges."""
    sources = call.tools.sources
    if sources.node is not None:
        await sources.node.pause_ingestion(paused)
    elif paused:
        sources.admission.pause()
    else:
        sources.admission.resume()


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
    refuse spans within about a second, and those that are started later do too."""
    await call.note("pipeline.pause")
    await _set_paused(call, True)
    return pipeline_state(call.tools.sources)


@endpoints.add(
    "POST",
    "/api/admin/pipeline/resume",
    "Accept spans again",
    answers={200: "The pipeline"},
)
async def resume_pipeline(call: Call) -> Any:
    await call.note("pipeline.resume")
    await _set_paused(call, False)
    return pipeline_state(call.tools.sources)


@endpoints.add(
    "POST",
    "/api/admin/pipeline/drain",
    "Refuse new spans and wait until the channels are empty",
    params=(WAIT,),
    answers={200: "The pipeline, drained", 202: "The pipeline, not empty yet"},
)
async def drain_pipeline(call: Call) -> Any:
    """Ingestion stays paused until `resume`. On a cluster, this waits until the edges have stored
    what they received, the evaluators have evaluated it, and this query node has stored the
    results."""
    sources = call.tools.sources
    await call.note("pipeline.drain")
    await _set_paused(call, True)
    evaluated = sources.node is None
    with trio.move_on_after(call.params["wait"]):
        if sources.node is not None:
            await sources.node.drained()
            evaluated = True
        for stage in sources.pipeline.stages.values():  # in the order of the channels
            await stage.drained()
            if stage.name == "trace-correlation":
                await sources.pipeline.correlate.worked_off()
    found = pipeline_state(sources)
    found["drained"] = found["drained"] and evaluated
    return Answer(found, 200 if found["drained"] else 202)
