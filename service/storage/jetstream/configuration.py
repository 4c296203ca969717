"""A cluster's identity, and copies of what its nodes have in common, for backups."""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass, field

import orjson

from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.layout import Layout

_ID = "cluster.id"
_CONFIG, _QUERY = "config", "query"
_COPIED = {_CONFIG: ("rules.", "tenants."), _QUERY: ("rules.", "triage.")}
"""Beginnings of the keys of a backup, by bucket. Others describe the streams of a cluster, such as
its number of partitions and what is exported and archived."""
_FORMAT = 1


class NoConfiguration(Exception):  # noqa: N818
    """The bytes are not a copy of a configuration."""


@dataclass(slots=True)
class RestoredConfiguration:
    """What :func:`write_configuration` did. ``same_cluster``: the copy is of this cluster, so
    nothing was written. Otherwise ``written`` are the keys that were missing and now have the
    copy's values, and ``kept`` those that have other values."""

    same_cluster: bool
    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


async def cluster_id(config: ConfigBucket) -> str:
    """The id of the cluster, which the first caller makes. A new cluster with the same names has
    another id, so what was noted about the streams of the old one does not apply to it. Raises
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    while True:
        entry = await config.get(_ID)
        if entry is not None and entry.value:
            return entry.value.decode()
        try:
            await config.put(_ID, secrets.token_hex(16).encode(), 0)
        except Conflict:
            continue


@dataclass(frozen=True, slots=True)
class CommonBuckets:
    """The buckets with what is common: to all nodes, and to query nodes."""

    config: ConfigBucket
    query: ConfigBucket

    @classmethod
    def of(cls, client: NatsClient, layout: Layout) -> CommonBuckets:
        return cls(
            ConfigBucket(client, layout.config_bucket), ConfigBucket(client, layout.query_bucket)
        )

    def by_name(self) -> dict[str, ConfigBucket]:
        """The buckets as a copy names them."""
        return {_CONFIG: self.config, _QUERY: self.query}


async def read_configuration(buckets: CommonBuckets) -> bytes:
    """A copy of what is common: rules, tenants, mutes and acknowledgements. Raises
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    found: dict[str, list[list[str]]] = {}
    for name, bucket in buckets.by_name().items():
        found[name] = [
            [each.key, base64.b64encode(each.value or b"").decode()]
            for each in await bucket.entries()
            if each.key.startswith(_COPIED[name])
        ]
    cluster = await cluster_id(buckets.config)
    return orjson.dumps({"format": _FORMAT, "cluster": cluster, "buckets": found})


async def write_configuration(buckets: CommonBuckets, copy: bytes) -> RestoredConfiguration:
    """Write a copy to the buckets of another cluster. Keys that exist there stay as they are.
    Raises :exc:`NoConfiguration` and
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    try:
        value = orjson.loads(copy)
        if value["format"] != _FORMAT:
            raise NoConfiguration("a newer version has made it; upgrade")
        source = str(value["cluster"])
        keys = [
            (bucket, str(key), base64.b64decode(text))
            for name, bucket in buckets.by_name().items()
            for key, text in value["buckets"][name]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise NoConfiguration(str(error)) from error
    done = RestoredConfiguration(source == await cluster_id(buckets.config))
    if done.same_cluster:
        return done
    for bucket, key, data in keys:
        try:
            await bucket.put(key, data, 0)
            done.written.append(key)
        except Conflict:
            found = await bucket.get(key)
            if found is None or found.value != data:
                done.kept.append(key)
    return done
