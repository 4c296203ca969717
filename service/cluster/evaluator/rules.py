"""The rules in force in a partition, which markers in its log change.

A marker carries the revision of the tenant's entry in the configuration bucket. Markers with lower
revisions come from former owners, or were sent twice, and are ignored.

A trace is decided by the rules in force at its first span, also if it left memory and is read again
because of late spans. So the last versions are kept, with the positions of their markers. Positions
grow from a partition to those that continue it.

Tenants are named as in the log: one that was deleted and created again has another name
(:func:`betrace.service.tenants.log_name`). Rules belong to the present one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import orjson

from betrace.service.cluster.rule_keys import SHARED
from betrace.service.cluster.tenant_entries import GONE
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import Rule, make_rule
from betrace.service.rules.registry import rules_version
from betrace.service.tenants import split_log_name

KEPT_VERSIONS = 16
"""Of a tenant's rules. Traces from before the oldest one are read again with that one."""

_Versions = list[tuple[int, tuple[Rule, ...]]]
"""Rules with the position from which they are in force, oldest first."""


class RulesInForce:
    """Compiled rules by tenant. Not thread-safe, and not shared by partitions, because compiled
    rules learn names while they are used. A version of rules is one object, for all tenants."""

    def __init__(self) -> None:
        self.revisions: dict[str, int] = {}
        """By tenant, as named in the markers."""
        self._versions: dict[str, _Versions] = {}
        self._compiled: dict[str, CompiledRules] = {}
        self._in_use: WeakValueDictionary[str, CompiledRules] = WeakValueDictionary()

    def change(self, tenant: str, revision: int, definitions: bytes, position: int) -> list[str]:
        """Take the marker at ``position`` into account. Returns what is wrong with rules that
        cannot be compiled: their former definitions stay in force."""
        if revision <= self.revisions.get(tenant, 0):
            return []
        self.revisions[tenant] = revision
        problems = self._add(tenant, definitions, position)
        if tenant == SHARED:
            self._compiled.clear()
        else:
            self._compiled.pop(tenant, None)
        return problems

    def generation(self, tenant: str) -> int:
        """The present generation of a tenant; spans of former ones are not evaluated."""
        return self.revisions.get(GONE + tenant, 0)

    def is_current(self, name: str) -> bool:
        """Whether the tenant with this name was not deleted."""
        tenant, generation = split_log_name(name)
        return generation == self.generation(tenant)

    def delete(self, tenant: str, generation: int, position: int) -> bool:
        """Note that a tenant was deleted, at a position of the log, and has this generation from
        now on. Rules from before are removed. Returns False if that was known."""
        if generation <= self.generation(tenant):
            return False
        self.revisions[GONE + tenant] = generation
        if self.revisions.get(tenant, 0) < generation:
            self.revisions[tenant] = generation
            self._add(tenant, b"", position)
        self._compiled.pop(tenant, None)
        return True

    def begin(self, tenant: str, revision: int, definitions: bytes) -> None:
        """Use these rules before their marker, which is still to come and reports what is wrong
        with them."""
        self._add(tenant, definitions, 0)
        self.revisions[tenant] = revision - 1
        self._compiled.clear()

    def _add(self, tenant: str, definitions: bytes, position: int) -> list[str]:
        before = {rule.id: rule for rule in self._rules(tenant)}
        rules, problems = _read(definitions, before)
        versions = self._versions.setdefault(tenant, [])
        if not versions or versions[-1][1] != rules:
            versions.append((position, rules))
            if len(versions) > KEPT_VERSIONS:
                versions[:2] = [(0, versions[1][1])]
        return problems

    def _rules(self, tenant: str, position: int | None = None) -> tuple[Rule, ...]:
        """The rules for this name, now or at a position."""
        found: tuple[Rule, ...] = ()
        for since, rules in self._versions.get(tenant, ()):
            if position is not None and since > position:
                break
            found = rules
        return found

    def at(self, tenant: str, position: int) -> CompiledRules:
        """The tenant's rules for traces that begin at a position."""
        tenant, _ = split_log_name(tenant)
        names = (tenant, SHARED)
        if any(self._rules(name) is not self._rules(name, position) for name in names):
            return self._compile(tenant, position)
        return self.compiled(tenant)

    def compiled(self, tenant: str) -> CompiledRules:
        """The tenant's rules: those for all tenants, then its own."""
        tenant, _ = split_log_name(tenant)
        known = tenant if tenant in self._versions else ""  # the others have the same
        found = self._compiled.get(known)
        if found is None:
            found = self._compiled[known] = self._compile(tenant)
        return found

    def _compile(self, tenant: str, position: int | None = None) -> CompiledRules:
        shared = {rule.id: rule for rule in self._rules(SHARED, position)}
        own = self._rules(tenant, position)
        rules = (*shared.values(), *(rule for rule in own if rule.id not in shared))
        version = rules_version(rules)
        found = self._in_use.get(version)
        if found is None:
            found = self._in_use[version] = compile_rules(rules, version)
        return found

    def adopt(self, rules: Iterable[CompiledRules]) -> None:
        """Use these objects, which traces have, instead of compiling the same rules again."""
        for each in rules:
            self._in_use.setdefault(each.version, each)

    def saved(self) -> dict[str, Any]:
        """Rules and revisions as JSON, for a snapshot."""
        return {
            tenant: [
                revision,
                [
                    [since, [rule.definition(examples=False) for rule in rules]]
                    for since, rules in self._versions.get(tenant, ())
                ],
            ]
            for tenant, revision in self.revisions.items()
        }

    def restore(self, saved: dict[str, Any], before: int = 0) -> None:
        """Continue from what :meth:`saved` returned. ``before`` is added to the positions of
        markers: former snapshots have sequences."""
        self.revisions = {tenant: revision for tenant, (revision, _) in saved.items()}
        self._versions = {
            tenant: [
                (
                    since + before if since else 0,
                    tuple(_checked(orjson.dumps(each)) for each in definitions),
                )
                for since, definitions in versions
            ]
            for tenant, (_, versions) in saved.items()
        }
        self._compiled.clear()


@lru_cache(maxsize=100_000)
def _checked(definition: bytes) -> Rule:
    """A rule that compiles. It is read once for all partitions of this process."""
    rule = make_rule(orjson.loads(definition))
    compile_rules((rule,))
    return rule


def _read(definitions: bytes, before: dict[str, Rule]) -> tuple[tuple[Rule, ...], list[str]]:
    """The rules that compile, or else those of the same ids from before; and what is wrong."""
    try:
        listed = orjson.loads(definitions) if definitions else []
        if not isinstance(listed, list):
            raise TypeError("the definitions are not a list")
    except (TypeError, ValueError) as error:
        return tuple(before.values()), [f"the rules cannot be read: {error}"]
    rules: dict[str, Rule] = {}
    problems = []
    for each in listed:
        try:
            rule = _checked(orjson.dumps(each))
        except Exception as error:  # whatever it is, the log has the marker forever
            problems.append(str(error) or repr(error))
            former = before.get(each.get("id", "")) if isinstance(each, dict) else None
            if former is not None:
                rules[former.id] = former
        else:
            rules[rule.id] = rule
    return tuple(rules.values()), problems
