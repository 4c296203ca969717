"""The rules of all tenants, as files in a directory.

``DIR/*.yaml`` and ``DIR/default/*.yaml`` are the rules of the tenant ``default``,
``DIR/<tenant>/*.yaml`` those of others. Files are written by hand or through the API, which
keeps each of its rules in a file of its own, ``DIR/<tenant>/<rule id>.yaml``.
"""

from __future__ import annotations

import os
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from betrace.service.durable import sync_directory, write_atomically
from betrace.service.rules.definition import (
    SEVERITIES,
    Problem,
    Rule,
    RuleFileError,
    etag,
    make_rule,
)
from betrace.service.rules.yaml_file import MAX_RULES, check_file, dump_rules, load_file, load_text
from betrace.service.tenants import DEFAULT_TENANT, TENANT_RULE, is_tenant_name

__all__ = [
    "MAX_RULES",
    "SEVERITIES",
    "Problem",
    "Rule",
    "RuleConflictError",
    "RuleFileError",
    "RuleLimitError",
    "RuleNotFoundError",
    "RuleReadOnlyError",
    "RuleStore",
    "RuleStoreError",
    "check_file",
    "dump_rules",
    "etag",
    "load_file",
    "load_text",
    "make_rule",
]

KEPT_VERSIONS = 20  # of each rule
KEPT_DELETED = 100  # rules of a tenant that were deleted and whose versions are kept
_VERSIONS = ".versions"

Signature = tuple[int, int, int, int]


class RuleStoreError(Exception):
    """A change of a rule that is refused; the message says why and what to do."""


class RuleNotFoundError(RuleStoreError):
    """The tenant has no such rule."""


class RuleConflictError(RuleStoreError):
    """The rule is not the one the caller has seen (its entity tag is another)."""


class RuleReadOnlyError(RuleStoreError):
    """The rule stands in a file that is written by hand."""


class RuleLimitError(RuleStoreError):
    """The tenant has as many rules as it may."""


@dataclass(frozen=True, slots=True)
class _File:
    tenant: str
    signature: Signature | None
    rules: tuple[Rule, ...]  # of the last version that was good
    problem: str | None = None


class RuleStore:
    """The rules in ``directory``. Its methods block, and may be called from any thread.

    A file that cannot be read or is wrong keeps its last good version; ``problems`` says what is
    wrong by path, until it is put right.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._files: dict[Path, _File] = {}
        self._rules: dict[str, tuple[Rule, ...]] = {}
        self._origins: dict[tuple[str, str], Path] = {}
        self._problems: dict[str, str] = {}
        self._unlisted: dict[str, str] | None = None  # what listing could not read, the last time
        self._changed: set[str] = set()

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong now, by path."""
        return dict(self._problems)

    def load(self) -> None:
        """Read everything; what :meth:`poll` reports counts from here."""
        with self._lock:
            self._scan()
            self._changed.clear()

    def poll(self) -> set[str]:
        """Read the files that changed; the tenants whose rules are no longer what they were at
        the last call, also by :meth:`put` and :meth:`delete`."""
        with self._lock:
            self._scan()
            changed, self._changed = self._changed, set()
            return changed

    def tenants(self) -> tuple[str, ...]:
        """The tenants that have rules."""
        return tuple(sorted(self._rules))

    def rules(self, tenant: str) -> tuple[Rule, ...]:
        """The tenant's rules, also those that are not enabled, in the order of their files."""
        return self._rules.get(tenant, ())

    def rule(self, tenant: str, rule_id: str) -> Rule:
        """One rule. Raises :exc:`RuleNotFoundError`."""
        for rule in self.rules(tenant):
            if rule.id == rule_id:
                return rule
        raise RuleNotFoundError(f"there is no rule '{rule_id}'")

    def put(self, tenant: str, rule_id: str, rule: Rule, *, if_match: str | None = None) -> bool:
        """Save a rule durably; whether it is new. Earlier versions are kept, the last 20.

        ``if_match`` is the value of an If-Match header: the rule must then exist and be the one
        named. Raises :exc:`RuleConflictError` if it is not, :exc:`RuleReadOnlyError` for a rule of
        a file written by hand, :exc:`RuleLimitError`, and OSError when the file cannot be written.
        """
        if rule.id != rule_id:
            raise ValueError(f"the rule '{rule.id}' cannot be saved as '{rule_id}'")
        if not is_tenant_name(tenant):
            raise ValueError(TENANT_RULE)
        with self._lock:
            self._scan()
            path = self._path_to_change(tenant, rule_id)
            exists = (tenant, rule_id) in self._origins
            self._check_match(tenant, rule_id, if_match)
            if not exists and len(self.rules(tenant)) >= MAX_RULES:
                raise RuleLimitError(
                    f"the tenant has {MAX_RULES} rules, as many as it may; delete one first"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_version(path, rule_id)
            _write_durably(path, dump_rules([rule]).encode())
            self._scan()
            return not exists

    def delete(self, tenant: str, rule_id: str, *, if_match: str | None = None) -> None:
        """Remove a rule; its versions are kept. Raises as :meth:`put`, and
        :exc:`RuleNotFoundError`."""
        with self._lock:
            self._scan()
            path = self._path_to_change(tenant, rule_id)
            self._check_match(tenant, rule_id, if_match)
            if (tenant, rule_id) not in self._origins:
                raise RuleNotFoundError(f"there is no rule '{rule_id}'")
            self._keep_version(path, rule_id)
            path.unlink()
            sync_directory(path.parent)
            self._scan()
            self._forget_deleted(path.parent)

    def versions(self, tenant: str, rule_id: str) -> list[Rule]:
        """The earlier versions of a rule that are kept, the newest first."""
        with self._lock:
            folder = self._directory / tenant / _VERSIONS / rule_id
            found: list[Rule] = []
            for path in reversed(_numbered(folder)):
                with suppress(RuleFileError):  # a file that was broken when it was replaced
                    found += load_file(path)
            return found

    def delete_tenant(self, tenant: str) -> None:
        """Remove the tenant's folder with all its rules and their versions."""
        if not is_tenant_name(tenant):
            raise ValueError(TENANT_RULE)
        with self._lock:
            with suppress(FileNotFoundError):
                shutil.rmtree(self._directory / tenant)
            self._scan()

    # Changing

    def _path_to_change(self, tenant: str, rule_id: str) -> Path:
        """The file of a rule, if the API may write it."""
        path = self._directory / tenant / f"{rule_id}.yaml"
        origin = self._origins.get((tenant, rule_id), path)
        file = self._files.get(origin)
        if origin != path or (file is not None and any(r.id != rule_id for r in file.rules)):
            raise RuleReadOnlyError(
                f"the rule '{rule_id}' cannot be changed here: edit the file {origin}"
            )
        return path

    def _check_match(self, tenant: str, rule_id: str, if_match: str | None) -> None:
        if if_match is None:
            return
        if (tenant, rule_id) not in self._origins:
            raise RuleConflictError(f"there is no rule '{rule_id}' to match If-Match")
        current = etag(self.rule(tenant, rule_id))
        if not {current, "*"} & {tag.strip() for tag in if_match.split(",")}:
            raise RuleConflictError(
                f"the rule '{rule_id}' was changed meanwhile: read it again, its ETag is {current}"
            )

    def _keep_version(self, path: Path, rule_id: str) -> None:
        """Copy the present file, if there is one, to the versions of the rule."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        folder = path.parent / _VERSIONS / rule_id
        folder.mkdir(parents=True, exist_ok=True)
        kept = _numbered(folder)
        number = int(kept[-1].stem) + 1 if kept else 1
        _write_durably(folder / f"{number:08d}.yaml", data)
        for old in kept[: max(0, len(kept) + 1 - KEPT_VERSIONS)]:
            old.unlink()

    def _forget_deleted(self, folder: Path) -> None:
        """Keep the versions of the rules deleted last only."""
        deleted = [
            versions
            for versions in (folder / _VERSIONS).iterdir()
            if not (folder / f"{versions.name}.yaml").exists()
        ]
        deleted.sort(key=lambda versions: versions.stat().st_mtime_ns)
        for versions in deleted[: max(0, len(deleted) - KEPT_DELETED)]:
            shutil.rmtree(versions)

    # Reading

    def _scan(self) -> None:
        """Bring the rules up to date with the files."""
        problems: dict[str, str] = {}
        try:
            paths = self._list(problems)
        except OSError as error:  # keep everything: a directory that is away may come back
            self._problems = {str(self._directory): f"cannot be read: {error.strerror or error}"}
            self._unlisted = None
            return
        files = {path: self._read(path, tenant) for path, tenant in paths.items()}
        if problems == self._unlisted and list(files.items()) == list(self._files.items()):
            return  # as nearly always
        self._files, self._unlisted = files, dict(problems)
        self._combine(problems)

    def _list(self, problems: dict[str, str]) -> dict[Path, str]:
        """The rule files with their tenants, in the order in which they count."""
        found: dict[Path, str] = {}
        folders: list[Path] = []
        for entry in _entries(self._directory):
            path = Path(entry.path)
            if _is_rule_file(entry):
                found[path] = DEFAULT_TENANT
            elif entry.name[0] != "." and entry.is_dir():
                if is_tenant_name(entry.name):
                    folders.append(path)
                else:
                    problems[entry.path] = f"is not named as a tenant: {TENANT_RULE}"
        for folder in folders:
            try:
                paths = [Path(entry.path) for entry in _entries(folder) if _is_rule_file(entry)]
            except OSError as error:
                problems[str(folder)] = f"cannot be read: {error.strerror or error}"
                paths = [path for path in self._files if path.parent == folder]
            found.update(dict.fromkeys(paths, folder.name))
        return found

    def _read(self, path: Path, tenant: str) -> _File:
        known = self._files.get(path)
        try:
            signature = _signature(path)
        except OSError:
            signature = None  # reading it reports why
        if known is not None and signature is not None and known.signature == signature:
            return known
        try:
            return _File(tenant, signature, tuple(load_file(path)))
        except RuleFileError as error:
            return _File(tenant, signature, known.rules if known else (), str(error))

    def _combine(self, problems: dict[str, str]) -> None:
        rules: dict[str, dict[str, Rule]] = {}
        origins: dict[tuple[str, str], Path] = {}
        for path, file in self._files.items():
            own = rules.setdefault(file.tenant, {})
            faults = [file.problem] if file.problem else []
            for rule in file.rules:
                first = origins.get((file.tenant, rule.id))
                if first is not None:
                    faults.append(f"{path}: rule {rule.id}: left out, its id is used in {first}")
                elif len(own) >= MAX_RULES:
                    faults.append(f"{path}: the tenant has more than {MAX_RULES} rules")
                    break
                else:
                    own[rule.id] = rule
                    origins[file.tenant, rule.id] = path
            if faults:
                problems[str(path)] = "\n".join(faults)
        combined = {tenant: tuple(own.values()) for tenant, own in rules.items() if own}
        for tenant in combined.keys() | self._rules.keys():
            if combined.get(tenant) != self._rules.get(tenant):
                self._changed.add(tenant)
        self._rules, self._origins, self._problems = combined, origins, problems


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_rule_file(entry: os.DirEntry[str]) -> bool:
    if entry.name[0] == "." or not entry.name.endswith((".yaml", ".yml")):
        return False
    # Reading a pipe would wait; reading a link that leads nowhere says so.
    return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())


def _signature(path: Path) -> Signature:
    status = path.stat()
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.yaml") if path.stem.isdecimal())


def _write_durably(path: Path, data: bytes) -> None:
    # The temporary file is hidden, so it is never read as a rule file.
    write_atomically(path, data, path.with_name(f".{path.name}.tmp"))
