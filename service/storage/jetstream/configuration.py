"""A cluster's identity, and copies of the configuration in its bucket for backups."""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass, field

import orjson

from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict

_OWN = "cluster."
"""Prefix of the keys that describe a cluster itself, such as its number of partitions."""
_ID = "cluster.id"
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


async def read_configuration(config: ConfigBucket) -> bytes:
    """A copy of what is in the bucket: rules, tenants, and whatever else is common to a cluster."""
    entries = [each for each in await config.entries() if not each.key.startswith(_OWN)]
    value = {
        "format": _FORMAT,
        "cluster": await cluster_id(config),
        "keys": [[each.key, base64.b64encode(each.value or b"").decode()] for each in entries],
    }
    return orjson.dumps(value)


async def write_configuration(config: ConfigBucket, copy: bytes) -> RestoredConfiguration:
    """Write a copy to the bucket of another cluster. Keys that exist there stay as they are. Raises
    :exc:`NoConfiguration` and
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    try:
        value = orjson.loads(copy)
        if value["format"] != _FORMAT:
            raise NoConfiguration("a newer version has made it; upgrade")
        source = str(value["cluster"])
        keys = [(str(key), base64.b64decode(text)) for key, text in value["keys"]]
    except (ValueError, KeyError, TypeError) as error:
        raise NoConfiguration(str(error)) from error
    done = RestoredConfiguration(source == await cluster_id(config))
    if done.same_cluster:
        return done
    for key, data in keys:
        try:
            await config.put(key, data, 0)
            done.written.append(key)
        except Conflict:
            found = await config.get(key)
            if found is None or found.value != data:
                done.kept.append(key)
    return done
