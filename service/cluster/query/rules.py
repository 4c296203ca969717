"""Keeps the rule files of all query nodes equal, and publishes their rules to the evaluators.

A rule may be written at any query node, as a file or through the API. The node publishes the file
to the bucket that query nodes share, and the others write it to their disks. The files of a tenant
are one entry, which is replaced by compare-and-set, so no change is lost.

Owners of partitions follow another bucket, with the enabled rules of each tenant. A query node
writes them once its files are those of the bucket. An entry is never deleted: a tenant without
rules has an empty list, so that its revisions keep growing. After the first complete publication
another entry says so. The evaluators of a new cluster wait for it, so that its first spans are not
evaluated without rules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import orjson
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.query.rule_files import (
    FILES_PREFIX,
    AgreedFiles,
    digests,
    files_key,
    merge,
    pack_files,
    tenant_of,
    unpack_files,
)
from betrace.service.cluster.rule_keys import PUBLISHED, RULES_PREFIX, rules_key
from betrace.service.cluster.tenant_entries import (
    TenantEntryError,
    tenant_key,
    unpack_tenant,
)
from betrace.service.durable import write_atomically
from betrace.service.rules.definition import Rule
from betrace.service.rules.store import ALL_TENANTS, RuleStore, RuleTexts
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict
from betrace.service.storage.jetstream.errors import MessageTooLarge, NatsUnavailable
from betrace.service.telemetry import events
from betrace.service.tenancy.tenant import TenantState

_log = logging.getLogger("service.query")

FILE = "rule-files.json"
POLL_SECONDS = 0.2
RETRY_SECONDS = 1.0
EMPTY = b"[]"
ALONE_SECONDS = 10.0
"""A node without rules waits for this long before it says that the rules are published: another
node may have some."""


def definitions_of(rules: tuple[Rule, ...]) -> bytes:
    """The enabled rules as a JSON array, as in
    :attr:`betrace.service.rules.compile.CompiledRules.definitions`."""
    return orjson.dumps([rule.definition(examples=False) for rule in rules if rule.enabled])


class RuleSharing:
    """Keeps the files of ``store`` and those in the bucket ``shared`` equal, and the bucket
    ``config`` up to date for the evaluators. Make it on the Trio thread.

    ``file`` remembers what the files were like when they last agreed.
    """

    def __init__(
        self,
        config: ConfigBucket,
        shared: ConfigBucket,
        store: RuleStore,
        file: Path,
        threads: ThreadRunner,
    ) -> None:
        self._config = config
        self._shared = shared
        self._store = store
        self._threads = threads
        directory, self._for_all = store.directories
        names = [str(each.resolve()) if each else "" for each in (directory, self._for_all)]
        self._agreed = AgreedFiles(file, names)
        self._saved: bytes | None = None
        self._loaded = False
        self._seen: Mapping[Path, object] | None = None
        self._revisions: dict[str, int] = {}  # of the files in the bucket, as merged
        self._latest: dict[str, int] = {}  # as the watch has shown
        self._published: dict[str, bytes] = {}
        self._due: set[str] = set()
        self._turn = trio.Lock()
        self._token = trio.lowlevel.current_trio_token()
        self._since = time.monotonic()
        self._announced = False
        self.problem: str | None = None
        """Why the rules are not the same everywhere now."""

    async def run(self) -> None:
        """Exchange every change, forever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while True:
                await trio.sleep(RETRY_SECONDS if self.problem else POLL_SECONDS)
                await self.exchange()

    async def _watch(self) -> None:
        async for entry in self._shared.watch(FILES_PREFIX):
            self._latest[tenant_of(entry.key)] = entry.revision

    async def exchange(self) -> None:
        """Exchange what changed. What fails now is tried again at the next call."""
        try:
            problem = await self._exchange()
        except (NatsUnavailable, OSError) as error:
            problem = str(error)
        if problem is not None and self.problem is None:
            _log.warning("rules cannot be exchanged with the cluster now: %s", problem)
        self.problem = problem

    def exchange_now(self, tenant: str) -> None:
        """Exchange a tenant's files now; for a worker thread. Raises :exc:`NatsUnavailable` and
        :exc:`OSError`."""
        trio.from_thread.run(self._exchange, frozenset({tenant}), trio_token=self._token)

    def erase(self, tenant: str) -> None:
        """Delete the rules of a deleted tenant, here and in the buckets; for a worker thread. If
        the tenant was created again, its new rules come from the bucket. Raises :exc:`OSError`."""
        try:
            trio.from_thread.run(self._erase, tenant, trio_token=self._token)
        except NatsUnavailable as error:
            raise OSError(f"its rules are not deleted from the bucket: {error}") from error

    async def _erase(self, tenant: str) -> None:
        async with self._turn:
            await self.drop(tenant)
            await self._threads.run(self._store.delete_tenant, tenant)
            # Files that are gone here must not be deleted in the bucket for that.
            self._agreed.digests.pop(tenant, None)
            self._revisions.pop(tenant, None)
            self._published.pop(tenant, None)
            await self._save()

    async def drop(self, tenant: str) -> None:
        """Remove a deleted tenant's rules from the buckets, unless it was created again."""
        for bucket, key, empty in (
            (self._shared, files_key(tenant), pack_files({})),
            (self._config, rules_key(tenant), EMPTY),
        ):
            while True:
                entry = await bucket.get(key)
                if entry is None or entry.value == empty or not await self._is_deleted(tenant):
                    break  # asked after the entry was read, so that later rules are a conflict
                with suppress(Conflict):
                    await bucket.put(key, empty, entry.revision)

    async def _is_deleted(self, tenant: str) -> bool:
        entry = await self._config.get(tenant_key(tenant))
        try:
            return entry is not None and unpack_tenant(entry).state is TenantState.DELETED
        except TenantEntryError:
            return False

    async def _exchange(self, asked: Collection[str] = ()) -> str | None:
        """Exchange what changed, and the files of the tenants ``asked``. Returns what must be
        corrected before everything is exchanged."""
        async with self._turn:
            if not self._loaded:
                await self._load()
            read = self._store.files
            self._due.update(asked)
            self._due.update(
                tenant
                for tenant, revision in self._latest.items()
                if revision > self._revisions.get(tenant, 0)
            )
            problems: list[str] = []
            if read is not self._seen or self._due:
                texts = await self._threads.run(self._store.texts)
                if read is not self._seen:  # a change makes a new mapping
                    self._due |= self._changed(texts)
                if self._for_all is None:
                    self._due.discard(ALL_TENANTS)
                if await self._merge_all(texts, problems):
                    texts = await self._threads.run(self._store.texts)
                await self._publish_all(texts, problems)
                await self._save()
                self._seen = read
            if not self._announced and not problems:
                await self._announce()
            return problems[0] if problems else None

    async def _load(self) -> None:
        """Read what agreed before. Files that are all gone were lost, not deleted."""
        await self._threads.run(self._agreed.load)
        texts = await self._threads.run(self._store.texts)
        if self._agreed.digests and not texts.texts and not texts.broken:
            _log.warning("the directory has no rules; those of the cluster are restored")
            self._agreed.digests = {}
        self._loaded = True

    def _changed(self, texts: RuleTexts) -> set[str]:
        """The tenants whose files are not those that agreed last."""
        known = self._agreed.digests
        return {
            tenant
            for tenant in {*texts.texts, *texts.broken, *known, ALL_TENANTS}
            if tenant not in self._revisions
            or digests(texts.texts.get(tenant, {})) != known.get(tenant)
        }

    async def _merge_all(self, texts: RuleTexts, problems: list[str]) -> bool:
        """Make files and bucket equal; whether files were written. Adds to ``problems``."""
        written = False
        for tenant in sorted(self._due):
            disk, broken = texts.texts.get(tenant, {}), texts.broken.get(tenant, {})
            try:
                written |= await self._merge(tenant, disk, broken)
            except (MessageTooLarge, OSError, ValueError) as error:
                problems.append(f"the rule files of tenant {tenant}: {error}")
        return written

    async def _merge(self, tenant: str, disk: Mapping[str, str], broken: Collection[str]) -> bool:
        key = files_key(tenant)
        while True:
            entry = await self._shared.get(key)
            files = unpack_files(entry.value if entry is not None else None)
            known = self._agreed.digests.get(tenant, {})
            found = merge(known, disk, files, broken)
            revision = 0 if entry is None else entry.revision
            if found.publish:
                for path, text in found.publish.items():
                    if text is None:
                        del files[path]
                    else:
                        files[path] = text
                try:
                    revision = await self._shared.put(key, pack_files(files), revision)
                except Conflict:
                    continue
            if found.write:
                write = self._store.write_texts
                await self._threads.run(write, tenant, found.write, found.conflicts)
                events.RULES_RECEIVED(tenant=tenant, files=", ".join(list(found.write)[:10]))
            for path in found.conflicts:
                events.RULES_CONFLICT(tenant=tenant, file=path)
            agreed = digests(files)
            for path in broken:  # not compared, so as before
                agreed.pop(path, None)
                if path in known:
                    agreed[path] = known[path]
            self._agreed.digests[tenant] = agreed
            self._revisions[tenant] = revision
            return bool(found.write)

    async def _publish_all(self, texts: RuleTexts, problems: list[str]) -> None:
        """Publish the rules of the tenants whose files are now those of the bucket. Adds to
        ``problems``."""
        for tenant in sorted(self._due):
            files = texts.texts.get(tenant, {})
            agreed = self._agreed.digests.get(tenant, {})
            broken = texts.broken.get(tenant, {})
            if digests(files) != {p: d for p, d in agreed.items() if p not in broken}:
                continue  # changed meanwhile: the next exchange publishes them
            lost = [path for path, in_force in broken.items() if not in_force and path in agreed]
            if lost:
                problems.append(f"{lost[0]} is invalid: correct it, so that rules are published")
                continue
            if not self._revisions.get(tenant) and tenant not in self._published:
                self._due.discard(tenant)  # nobody has ever had rules for it
                continue
            definitions = definitions_of(texts.rules.get(tenant, ()))
            if await self._publish(tenant, definitions):
                self._published[tenant] = definitions
                self._due.discard(tenant)

    async def _publish(self, tenant: str, definitions: bytes) -> bool:
        """Replace the entry that evaluators follow, if the files are still those that were merged.
        Reading the entry first makes sure that later rules are not replaced by earlier ones."""
        while True:
            entry = await self._config.get(rules_key(tenant))
            files = await self._shared.get(files_key(tenant))
            if (files.revision if files is not None else 0) != self._revisions.get(tenant):
                return False
            if entry is not None and entry.value == definitions:
                return True
            try:
                revision = entry.revision if entry is not None else 0
                await self._config.put(rules_key(tenant), definitions, revision)
            except Conflict:
                continue
            return True

    async def _save(self) -> None:
        value = self._agreed.pack()
        if value != self._saved:
            await self._threads.run(write_atomically, self._agreed.path, value)
            self._saved = value

    async def _announce(self) -> None:
        """Say that the rules are published."""
        alone = time.monotonic() - self._since >= ALONE_SECONDS
        if self._published or alone:
            key = RULES_PREFIX + PUBLISHED
            entry = await self._config.get(key)
            if entry is None or entry.value != EMPTY:
                await self._config.put(key, EMPTY)
            self._announced = True
