"""Publishes the rules of this node's files to the cluster's bucket.

The rules are written here, as files or through the API, and the owners of partitions follow the
bucket. A tenant's entry is replaced by compare-and-set, and only when it differs. An entry is never
deleted: a tenant without rules has an empty list, so that its revisions keep growing.

After the first complete publication another entry says so. The evaluators of a new cluster wait for
it, so that its first spans are not evaluated without rules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import orjson
import trio

from betrace.service.cluster.rule_keys import PUBLISHED, RULES_PREFIX, rules_key
from betrace.service.durable import write_atomically
from betrace.service.rules.definition import Rule
from betrace.service.rules.store import ALL_TENANTS, RuleStore
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict
from betrace.service.storage.jetstream.errors import NatsUnavailable

_log = logging.getLogger("service.query")

FILE = "published-rules.json"
POLL_SECONDS = 0.2
RETRY_SECONDS = 1.0
EMPTY = b"[]"
ALONE_SECONDS = 10.0
"""A node without rules waits for so long before it says that the rules are published: another node
may have some."""


def definitions_of(rules: tuple[Rule, ...]) -> bytes:
    """The enabled rules as a JSON array, as in
    :attr:`betrace.service.rules.compile.CompiledRules.definitions`."""
    return orjson.dumps([rule.definition(examples=False) for rule in rules if rule.enabled])


class RulePublisher:
    """Keeps the bucket equal to the rules of ``store``.

    ``file`` remembers for which tenants this node has published rules. The entries of other tenants
    stay as they are, so a new node without rule files does not remove anybody's rules.
    """

    def __init__(self, bucket: ConfigBucket, store: RuleStore, file: Path) -> None:
        self._bucket = bucket
        self._store = store
        self._file = file
        self._published: dict[str, bytes] = {}  # by tenant, since the start
        self._known: set[str] | None = None  # tenants in the file
        self._seen: Mapping[str, tuple[Rule, ...]] | None = None
        self._since = time.monotonic()
        self._announced = False
        self.problem: str | None = None
        """Why the bucket cannot be written now."""

    async def run(self) -> None:
        """Publish every change, forever."""
        while True:
            await trio.sleep(RETRY_SECONDS if self.problem else POLL_SECONDS)
            await self.publish()

    async def publish(self) -> None:
        """Publish what changed. What cannot be published now is tried again at the next call."""
        rules = self._store.all_rules()
        try:
            if rules is not self._seen:  # a change makes a new mapping
                await self._publish_all(rules)
            if not self._announced:
                await self._announce()
        except (NatsUnavailable, OSError) as error:
            if self.problem is None:
                _log.warning("rules cannot be published to the cluster now: %s", error)
            self.problem = str(error)
        else:
            self.problem = None
            self._seen = rules

    async def _publish_all(self, rules: Mapping[str, tuple[Rule, ...]]) -> None:
        if self._known is None:
            self._known = _read(self._file)
        wanted = {tenant: definitions_of(found) for tenant, found in rules.items()}
        wanted[ALL_TENANTS] = definitions_of(self._store.shared())
        for tenant in self._known | self._published.keys():
            wanted.setdefault(tenant, EMPTY)
        if wanted[ALL_TENANTS] == EMPTY and ALL_TENANTS not in self._known:
            del wanted[ALL_TENANTS]
        if not wanted.keys() <= self._known:  # first, so that a later removal is published
            self._known |= wanted.keys()
            names = orjson.dumps(sorted(self._known))
            await trio.to_thread.run_sync(write_atomically, self._file, names)
        for tenant, definitions in wanted.items():
            if self._published.get(tenant) != definitions:
                await self._put(rules_key(tenant), definitions)
                self._published[tenant] = definitions

    async def _announce(self) -> None:
        """Say that the rules are published."""
        alone = time.monotonic() - self._since >= ALONE_SECONDS
        if self._published or alone:
            await self._put(RULES_PREFIX + PUBLISHED, EMPTY)
            self._announced = True

    async def _put(self, key: str, definitions: bytes) -> None:
        while True:
            entry = await self._bucket.get(key)
            if entry is not None and entry.value == definitions:
                return
            try:
                await self._bucket.put(key, definitions, entry.revision if entry else 0)
            except Conflict:
                continue
            return


def _read(file: Path) -> set[str]:
    try:
        return {str(each) for each in orjson.loads(file.read_bytes())}
    except (OSError, ValueError, TypeError):
        return set()
