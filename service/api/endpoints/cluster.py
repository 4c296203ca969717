"""The endpoint that shows how far a query node of a cluster is."""

from __future__ import annotations

from typing import Any

from betrace.service.api.endpoint import Call, Endpoints
from betrace.service.api.errors import ApiError

endpoints = Endpoints("Administration", access="operator")


@endpoints.add(
    "GET",
    "/api/cluster",
    "How far each partition of the cluster has been applied at this query node",
    answers={
        200: '`{"node", "roles", "nodes": [{"name", "roles", "draining"}], "partitions": '
        '[{"partition", "owner", "epoch", "applied", "last", "lag", "evaluatedTo", "logTimeNs", '
        '"counts", "problem"}], "duties": {name: node}, "rulesProblem", '
        '"index": {"requests", "behind"}}`',
        404: "The service is not part of a cluster",
    },
)
async def get_cluster(call: Call) -> Any:
    """`applied` is the number of the last message of the partition's `OUT` stream that is stored
    here; answers to queries contain what was decided up to it. `last` is the number of its last
    message as of a moment ago, null if it is not known, and `lag` the difference. `owner` is the
    evaluator that has the partition, and `epoch` the number of its epoch, which grows when the
    partition moves; null if it is not known yet. `nodes` are the processes that are alive.
    `evaluatedTo` is the number of the last message of the
    partition's log that was evaluated. `counts` says what became of the messages and spans of the
    partition, since its first one. `problem` says why the stream cannot be read now. `duties` has
    the query node that sends signals to each destination, and the one that follows alerts.
    `rulesProblem` says why the rules of this node are not those of the cluster."""
    node = call.tools.sources.node
    if node is None:
        raise ApiError(404, "this service is not part of a cluster", "see [cluster] in config.toml")
    return node.shown()
