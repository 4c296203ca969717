"""The rules of all tenants, as files in a directory.

``DIR/*.yaml`` and ``DIR/default/*.yaml`` are the rules of the tenant ``default``,
``DIR/<tenant>/*.yaml`` those of other tenants. Files are written by hand or through the API, which
stores each rule in its own file, ``DIR/<tenant>/<rule id>.yaml``.

Files in a second directory, the operator's, are rules for all tenants. Tenants see them and cannot
change them.
"""

from __future__ import annotations

import os
import shutil
import threading
from bisect import bisect_left
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from betrace.service.durable import sync_directory, write_atomically
from betrace.service.rules.definition import (
    Rule,
    RuleFileError,
    etag,
)
from betrace.service.rules.patterns import patterns_size
from betrace.service.rules.syntax import span_sets
from betrace.service.rules.yaml_file import MAX_RULES, dump_rules, load_file
from betrace.service.tenants import DEFAULT_TENANT, TENANT_RULE, is_tenant_name

KEPT_VERSIONS = 20  # of each rule
KEPT_DELETED = 100  # deleted rules of a tenant whose versions are kept
MAX_PATTERNS = 500_000  # RE2 instructions of the patterns in a tenant's enabled rules
_KNOWN_SIZES = 100_000
_VERSIONS = ".versions"
_MOST_FOLLOWED = 10_000  # tenants without files of their own

ALL_TENANTS = "*"
"""In place of a tenant: the rules for all tenants. No tenant can have this name."""

Signature = tuple[int, int, int, int]


class RuleStoreError(Exception):
    """A change to a rule was rejected; the message says why and what to do."""


class RuleNotFoundError(RuleStoreError):
    """The tenant has no such rule."""


class RuleConflictError(RuleStoreError):
    """The rule has changed since the caller read it: its entity tag differs."""


class RuleReadOnlyError(RuleStoreError):
    """The rule is in a file that is written by hand."""


class RuleLimitError(RuleStoreError):
    """The tenant has the maximum number of rules."""


@dataclass(frozen=True, slots=True)
class _RuleFile:
    tenant: str
    signature: Signature | None
    rules: tuple[Rule, ...]  # of the last valid version
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class RuleTexts:
    """The rule files at one moment, with :data:`ALL_TENANTS` for those for all tenants.

    ``texts`` has the valid files by tenant and by path in the directory; ``broken`` those that
    cannot be read or are invalid, with whether an earlier version is in force. ``rules`` are the
    tenants' own rules.
    """

    texts: dict[str, dict[str, str]]
    broken: dict[str, dict[str, bool]]
    rules: dict[str, tuple[Rule, ...]]


class RuleStore:
    """The rules in ``directory``, and those for all tenants in ``shared``. Methods block; they may
    be called from any thread.

    If a file cannot be read or is invalid, its last valid version stays in force, and ``problems``
    has the reason until the file is corrected.
    """

    def __init__(self, directory: Path, shared: Path | None = None) -> None:
        self._directory = directory
        self._shared_directory = shared
        within = shared is not None and shared.resolve().parent == directory.resolve()
        self._not_a_tenant = shared.name if shared is not None and within else None
        self._shared: tuple[Rule, ...] = ()
        self._followed: dict[str, None] = {}
        self._lock = threading.Lock()
        self._files: dict[Path, _RuleFile] = {}
        self._paths: dict[str, Path] = {}  # the same files
        self._rules: dict[str, tuple[Rule, ...]] = {}
        self._origins: dict[tuple[str, str], Path] = {}
        self._problems: dict[str, str] = {}
        self._unlisted: dict[str, str] | None = None  # problems of the last listing
        self._changed: set[str] = set()
        self._sizes: dict[str, int] = {}  # of the patterns, by version of the rule

    @property
    def problems(self) -> dict[str, str]:
        """The current problems, by path."""
        return dict(self._problems)

    def load(self) -> None:
        """Read all files; :meth:`poll` reports changes from here on."""
        with self._lock:
            self._scan()
            self._changed.clear()

    def poll(self) -> set[str]:
        """Read the files that changed. Returns the tenants whose rules changed since the last call,
        including changes by :meth:`put` and :meth:`delete`, and :data:`ALL_TENANTS` if rules for
        all tenants changed."""
        with self._lock:
            self._scan()
            changed, self._changed = self._changed, set()
            return changed

    def follow(self, tenant: str) -> None:
        """Note that a tenant exists. If there are rules for all tenants, it is from now on one of
        :meth:`tenants`, also without files of its own."""
        if tenant in self._followed or len(self._followed) >= _MOST_FOLLOWED:
            return
        with self._lock:
            self._followed[tenant] = None
            if self._shared and tenant not in self._rules:
                self._rules = self._rules | {tenant: self._shared}

    def tenants(self) -> tuple[str, ...]:
        """The tenants that have rules, sorted."""
        return tuple(sorted(self._rules))

    def all_rules(self) -> Mapping[str, tuple[Rule, ...]]:
        """The rules by tenant. A change of rules makes a new mapping."""
        return self._rules

    def rules(self, tenant: str) -> tuple[Rule, ...]:
        """The tenant's rules, including disabled ones: those for all tenants, then its own in the
        order of their files."""
        return self._rules.get(tenant, self._shared)

    def shared(self) -> tuple[Rule, ...]:
        """The rules for all tenants."""
        return self._shared

    def for_all_tenants(self, rule_id: str) -> bool:
        """Whether a rule is one for all tenants."""
        return (ALL_TENANTS, rule_id) in self._origins

    @property
    def directories(self) -> tuple[Path, Path | None]:
        """The directory of the rules, and of those for all tenants."""
        return self._directory, self._shared_directory

    @property
    def files(self) -> Mapping[Path, object]:
        """The files as they were read last. A change of a file makes a new mapping."""
        return self._files

    def texts(self) -> RuleTexts:
        """Read the content of all rule files."""
        with self._lock:
            self._scan()
            found = RuleTexts({}, {}, {ALL_TENANTS: self._shared})
            for path, file in self._files.items():
                name = self._name(path, file.tenant)
                with suppress(OSError, UnicodeDecodeError):
                    text = path.read_bytes().decode()
                    if file.problem is None and _signature(path) == file.signature:
                        found.texts.setdefault(file.tenant, {})[name] = text
                        continue
                found.broken.setdefault(file.tenant, {})[name] = bool(file.rules)
            for tenant, rules in self._rules.items():
                found.rules[tenant] = rules[len(self._shared) :]
            return found

    def write_texts(
        self, tenant: str, changes: Mapping[str, str | None], aside: Collection[str] = ()
    ) -> None:
        """Replace and delete (None) files of a tenant, as another node has them. Versions of rules
        are kept as by :meth:`put`; of the files ``aside``, a copy named ``….conflict`` is kept.
        Raises OSError, and ValueError for a path that no file of the tenant can have."""
        with self._lock:
            for name, text in changes.items():
                path = self._path_of(tenant, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if name in aside and path.exists():
                    _write_durably(path.with_name(f"{path.name}.conflict"), path.read_bytes())
                if path == self._own_path(tenant, path.stem):
                    self._keep_version(path, path.stem)
                if text is None:
                    path.unlink(missing_ok=True)
                    sync_directory(path.parent)
                else:
                    _write_durably(path, text.encode())
            self._scan()

    def _name(self, path: Path, tenant: str) -> str:
        """The path of a file, relative to its directory."""
        return path.name if tenant == ALL_TENANTS else path.relative_to(self._directory).as_posix()

    def _path_of(self, tenant: str, name: str) -> Path:
        """The inverse of :meth:`_name`."""
        folder, _, file = name.rpartition("/")
        if not _is_rule_name(file) or "\\" in file:
            raise ValueError(f"{name!r} is not the path of a rule file")
        if tenant == ALL_TENANTS:
            if folder or self._shared_directory is None:
                raise ValueError(f"{name!r} cannot be a file with rules for all tenants")
            return self._shared_directory / file
        if folder != tenant and (folder or tenant != DEFAULT_TENANT):
            raise ValueError(f"{name!r} cannot be a file of the tenant {tenant}")
        return self._directory / name

    def rule(self, tenant: str, rule_id: str) -> Rule:
        """One rule. Raises :exc:`RuleNotFoundError`."""
        for rule in self.rules(tenant):
            if rule.id == rule_id:
                return rule
        raise RuleNotFoundError(f"there is no rule '{rule_id}'")

    def source(self, tenant: str, rule_id: str) -> tuple[str, bool]:
        """The file of a rule, relative to its directory, and whether the API may change it. Raises
        :exc:`RuleNotFoundError`."""
        shared = self._origins.get((ALL_TENANTS, rule_id))
        if shared is not None:
            return self._name(shared, ALL_TENANTS), False
        origin = self._origins.get((tenant, rule_id))
        if origin is None:
            raise RuleNotFoundError(f"there is no rule '{rule_id}'")
        return self._name(origin, tenant), self._may_change(origin, tenant, rule_id)

    def put(self, tenant: str, rule_id: str, rule: Rule, *, if_match: str | None = None) -> bool:
        """Save a rule durably; returns whether it is new. The last 20 earlier versions are kept.

        ``if_match`` is the value of an If-Match header: the rule must then exist and have that
        entity tag. Raises :exc:`RuleConflictError` if it does not, :exc:`RuleReadOnlyError` for a
        rule in a file written by hand, :exc:`RuleLimitError`, and OSError if the file cannot be
        written.
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
            others = [other for other in self.rules(tenant) if other.id != rule_id]
            if sum(map(self._size, [*others, rule])) > MAX_PATTERNS:
                raise RuleLimitError(
                    f"the patterns of the tenant's rules would have more than {MAX_PATTERNS} RE2 "
                    r"instructions in all; use fewer or smaller ones (large classes such as \p{L} "
                    "count most)"
                )
            if not exists and len(self.rules(tenant)) - len(self._shared) >= MAX_RULES:
                raise RuleLimitError(
                    f"the tenant has {MAX_RULES} rules, the maximum; delete one first"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_version(path, rule_id)
            _write_durably(path, dump_rules([rule]).encode())
            self._written(path, tenant)
            return not exists

    def delete(self, tenant: str, rule_id: str, *, if_match: str | None = None) -> None:
        """Delete a rule; its versions are kept. Raises the same errors as :meth:`put`, and
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
        """The kept earlier versions of a rule, newest first."""
        with self._lock:
            folder = self._directory / tenant / _VERSIONS / rule_id
            found: list[Rule] = []
            for path in reversed(_numbered(folder)):
                with suppress(RuleFileError):  # the file was invalid when it was replaced
                    found += load_file(path)
            return found

    def delete_tenant(self, tenant: str) -> None:
        """Delete the tenant's folder with all rules and their versions."""
        if not is_tenant_name(tenant):
            raise ValueError(TENANT_RULE)
        with self._lock:
            with suppress(FileNotFoundError):
                shutil.rmtree(self._directory / tenant)
            self._followed.pop(tenant, None)
            self._rules = {name: own for name, own in self._rules.items() if name != tenant}
            self._scan()

    # Changing

    def _path_to_change(self, tenant: str, rule_id: str) -> Path:
        """The file of a rule, if the API may write it."""
        if self.for_all_tenants(rule_id):
            raise RuleReadOnlyError(
                f"the rule '{rule_id}' is one for all tenants, which only the operator can change; "
                "choose another id"
            )
        path = self._own_path(tenant, rule_id)
        origin = self._origins.get((tenant, rule_id), path)
        if not self._may_change(origin, tenant, rule_id):
            raise RuleReadOnlyError(
                f"the rule '{rule_id}' cannot be changed here: edit the file {origin}"
            )
        return path

    def _own_path(self, tenant: str, rule_id: str) -> Path:
        """The file that the API writes a rule to."""
        return self._directory / tenant / f"{rule_id}.yaml"

    def _may_change(self, origin: Path, tenant: str, rule_id: str) -> bool:
        file = self._files.get(origin)
        alone = file is None or all(rule.id == rule_id for rule in file.rules)
        return alone and origin == self._own_path(tenant, rule_id)

    def _check_match(self, tenant: str, rule_id: str, if_match: str | None) -> None:
        if if_match is None:
            return
        if (tenant, rule_id) not in self._origins:
            raise RuleConflictError(f"there is no rule '{rule_id}' to match If-Match")
        current = etag(self.rule(tenant, rule_id))
        if not {current, "*"} & {tag.strip() for tag in if_match.split(",")}:
            raise RuleConflictError(
                f"the rule '{rule_id}' has changed: read it again; its ETag is now {current}"
            )

    def _keep_version(self, path: Path, rule_id: str) -> None:
        """Copy the current file, if there is one, to the versions of the rule."""
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
        """Keep only the versions of the most recently deleted rules."""
        deleted = [
            versions
            for versions in (folder / _VERSIONS).iterdir()
            if not (folder / f"{versions.name}.yaml").exists()
        ]
        deleted.sort(key=lambda versions: versions.stat().st_mtime_ns)
        for versions in deleted[: max(0, len(deleted) - KEPT_DELETED)]:
            shutil.rmtree(versions)

    # Reading

    def _written(self, path: Path, tenant: str) -> None:
        """Read one file after a scan, because listing all again takes long if there are many."""
        if self._unlisted is None:
            self._scan()
            return
        path = self._paths.setdefault(str(path), path)
        files = list(self._files.items())
        new = path, self._read(path, tenant, _signature(path))
        at = bisect_left(files, self._order(path), key=lambda item: self._order(item[0]))
        files[at : at + (path in self._files)] = [new]
        self._files = dict(files)
        self._combine(dict(self._unlisted))

    def _order(self, path: Path) -> tuple[bool, str, str]:
        """The place of a file in a listing."""
        folder = "" if path.parent == self._directory else path.parent.name
        return path.parent != self._shared_directory, folder, path.name

    def _scan(self) -> None:
        """Update the rules from the files."""
        problems: dict[str, str] = {}
        paths = self._list_shared(problems)
        try:
            paths |= self._list(problems)
        except OSError as error:  # keep all rules: the directory may become available again
            self._problems = {str(self._directory): f"cannot be read: {error.strerror or error}"}
            self._unlisted = None
            return
        files = {
            path: self._read(path, tenant, signature) for path, (tenant, signature) in paths.items()
        }
        if problems == self._unlisted and self._same(files):
            return  # almost always
        self._files, self._unlisted = files, dict(problems)
        self._paths = {str(path): path for path in files}
        self._combine(problems)

    def _list_shared(self, problems: dict[str, str]) -> dict[Path, tuple[str, Signature | None]]:
        """The files with rules for all tenants. They stay in force while they cannot be listed."""
        directory = self._shared_directory
        if directory is None:
            return {}
        try:
            files = [entry for entry in _entries(directory) if _is_rule_file(entry)]
        except OSError as error:
            problems[str(directory)] = f"cannot be read: {error.strerror or error}"
            return {
                path: (ALL_TENANTS, file.signature)
                for path, file in self._files.items()
                if file.tenant == ALL_TENANTS
            }
        return {self._path(entry): (ALL_TENANTS, _signature(entry)) for entry in files}

    def _same(self, files: dict[Path, _RuleFile]) -> bool:
        """Whether the files are the known ones, in the same order. Paths and files that did not
        change are the same objects, so nothing is compared by value."""
        return len(files) == len(self._files) and all(
            path is known and file is self._files[known]
            for (path, file), known in zip(files.items(), self._files, strict=True)
        )

    def _list(self, problems: dict[str, str]) -> dict[Path, tuple[str, Signature | None]]:
        """The rule files with their tenants and signatures; if two have the same rule, the first
        one counts."""
        found: dict[Path, tuple[str, Signature | None]] = {}
        folders: list[os.DirEntry[str]] = []
        for entry in _entries(self._directory):
            if _is_rule_file(entry):
                found[self._path(entry)] = DEFAULT_TENANT, _signature(entry)
            elif entry.name == self._not_a_tenant:
                continue
            elif entry.name[0] != "." and entry.is_dir():
                if entry.is_symlink():
                    problems[entry.path] = "is a link to a folder: move the folder here instead"
                elif is_tenant_name(entry.name):
                    folders.append(entry)
                else:
                    problems[entry.path] = f"is not the name of a tenant: {TENANT_RULE}"
        for folder in folders:
            try:
                for entry in _entries(Path(folder.path)):
                    if _is_rule_file(entry):
                        found[self._path(entry)] = folder.name, _signature(entry)
            except OSError as error:
                problems[folder.path] = f"cannot be read: {error.strerror or error}"
                for path, file in self._files.items():
                    if path.parent == Path(folder.path):
                        found[path] = folder.name, file.signature
        return found

    def _path(self, entry: os.DirEntry[str]) -> Path:
        """The path of a file. Known files keep theirs, because making one takes 10 µs."""
        return self._paths.get(entry.path) or Path(entry.path)

    def _read(self, path: Path, tenant: str, signature: Signature | None) -> _RuleFile:
        known = self._files.get(path)
        if known is not None and signature is not None and known.signature == signature:
            return known
        try:
            return _RuleFile(tenant, signature, tuple(load_file(path)))
        except RuleFileError as error:
            return _RuleFile(tenant, signature, known.rules if known else (), str(error))

    def _size(self, rule: Rule) -> int:
        """Instructions of the rule's patterns, 0 if it is disabled."""
        if not rule.enabled:
            return 0
        size = self._sizes.get(rule.version)
        if size is None:
            clauses = (rule.syntax.when, rule.syntax.always, rule.syntax.never)
            checks = {spans for clause in clauses for spans in span_sets(clause)}
            if len(self._sizes) >= _KNOWN_SIZES:
                self._sizes.clear()
            size = self._sizes[rule.version] = patterns_size(spans.where for spans in checks)
        return size

    def _combine(self, problems: dict[str, str]) -> None:
        """Combine the files, those for all tenants first."""
        sizes: dict[str, int] = {}
        rules: dict[str, dict[str, Rule]] = {ALL_TENANTS: {}}
        origins: dict[tuple[str, str], Path] = {}
        shared = rules[ALL_TENANTS]
        for path, file in self._files.items():
            own = rules.setdefault(file.tenant, {})
            faults = [file.problem] if file.problem else []
            if file.tenant not in sizes:
                sizes[file.tenant] = sizes.get(ALL_TENANTS, 0)
            for rule in file.rules:
                first = origins.get((file.tenant, rule.id))
                common = origins.get((ALL_TENANTS, rule.id))
                size = sizes[file.tenant] + self._size(rule)
                if first is not None:
                    faults.append(f"{path}: rule {rule.id}: ignored, its id is used in {first}")
                elif common is not None:
                    faults.append(
                        f"{path}: rule {rule.id}: ignored, its id is that of a rule for all "
                        f"tenants, in {common}; choose another id"
                    )
                elif size > MAX_PATTERNS:
                    faults.append(
                        f"{path}: rule {rule.id}: ignored, the patterns of the tenant's rules have "
                        f"more than {MAX_PATTERNS} RE2 instructions in all"
                    )
                elif len(own) >= MAX_RULES:
                    faults.append(f"{path}: the tenant has more than {MAX_RULES} rules")
                    break
                else:
                    own[rule.id] = rule
                    sizes[file.tenant] = size
                    origins[file.tenant, rule.id] = path
            if faults:
                problems[str(path)] = "\n".join(faults)
        del rules[ALL_TENANTS]
        common_rules = tuple(shared.values())
        combined = {tenant: (*common_rules, *own.values()) for tenant, own in rules.items()}
        combined |= {each: common_rules for each in self._followed if each not in combined}
        combined = {tenant: found for tenant, found in combined.items() if found}
        if common_rules != self._shared:
            self._changed.add(ALL_TENANTS)
        for tenant in combined.keys() | self._rules.keys():
            if combined.get(tenant) != self._rules.get(tenant):
                self._changed.add(tenant)
        self._shared, self._rules = common_rules, combined
        self._origins, self._problems = origins, problems


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_rule_name(name: str) -> bool:
    return not name.startswith(".") and name.endswith((".yaml", ".yml"))


def _is_rule_file(entry: os.DirEntry[str]) -> bool:
    if not _is_rule_name(entry.name):
        return False
    # Reading a pipe would block; reading a broken link reports the error.
    return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())


def _signature(entry: os.DirEntry[str] | Path) -> Signature | None:
    """What changes when a file changes; None if it cannot be looked at, which reading reports."""
    try:
        status = entry.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.yaml") if path.stem.isdecimal())


def _write_durably(path: Path, data: bytes) -> None:
    # The temporary file is hidden, so it is never read as a rule file.
    write_atomically(path, data, path.with_name(f".{path.name}.tmp"))
