"""Endpoints that show, pause and drain the pipeline."""

from __future__ import annotations

from typing import Any

import trio

from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.endpoints.cluster import refuse_on_cluster
from betrace.service.api.params import WAIT
from betrace.service.api.sources import Sources

endpoints = Endpoints("Administration", access="operator")

_AT_EDGES = ("ingestion cannot be paused or resumed", "edges receive the spans: stop them instead")


def pipeline_state(sources: Sources) -> dict[str, Any]:
    """``ingestion``, ``drained``, ``waiting``, ``backlog`` and ``stages``."""
    pipeline = sources.pipeline
    sizes = {name: queue.send.statistics().size for name, queue in pipeline.queues.items()}
    waiting = {name: size for name, size in sizes.items() if size}
    return {
        "ingestion": sources.admission.state,
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
    """Requests get 503 until `resume`. Accepted spans are still processed."""
    refuse_on_cluster(call, *_AT_EDGES)
    await call.note("pipeline.pause")
    call.tools.sources.admission.pause()
    return pipeline_state(call.tools.sources)


@endpoints.add(
    "POST",
    "/api/admin/pipeline/resume",
    "Accept spans again",
    answers={200: "The pipeline"},
)
async def resume_pipeline(call: Call) -> Any:
    refuse_on_cluster(call, *_AT_EDGES)
    await call.note("pipeline.resume")
    call.tools.sources.admission.resume()
    return pipeline_state(call.tools.sources)


@endpoints.add(
    "POST",
    "/api/admin/pipeline/drain",
    "Refuse new spans and wait until the channels are empty",
    params=(WAIT,),
    answers={200: "The pipeline, drained", 202: "The pipeline, not empty yet"},
)
async def drain_pipeline(call: Call) -> Any:
    """Ingestion stays paused until `resume`."""
    refuse_on_cluster(call, *_AT_EDGES)
    sources = call.tools.sources
    await call.note("pipeline.drain")
    sources.admission.pause()
    with trio.move_on_after(call.params["wait"]):
        for stage in sources.pipeline.stages.values():  # in the order of the channels
            await stage.drained()
            if stage.name == "trace-correlation":
                await sources.pipeline.correlate.worked_off()
    found = pipeline_state(sources)
    return Answer(found, 200 if found["drained"] else 202)
