"""Changes to the rules of tenants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from typing import Any

from betrace.service.rules.definition import Rule, RuleFileError, etag, make_rule
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleConflictError, RuleNotFoundError
from betrace.service.tenancy.tenant_limit import TenantLimit
from betrace.service.traces.example_runs import check_examples

EXAMPLE_SECONDS = 3.0  # of processor time, for the examples of a rule


class RuleExistsError(Exception):
    """The rule was to be created but exists; ``etag`` is its entity tag, in quotes."""

    def __init__(self, rule_id: str, etag: str) -> None:
        super().__init__(f"the rule {rule_id} exists already")
        self.etag = etag


class TenantDeletedError(Exception):
    """The tenant is deleted, or is being deleted."""


class TooManyTenantsError(Exception):
    """The rule would belong to one tenant more than there may be; the message says what to do."""


class RuleWriter:
    """Saves and deletes rules, one at a time: a rule that is new when it is checked is still new
    when it is saved. Methods block and may be called from any thread; they raise :exc:`OSError`
    and the errors of :class:`betrace.service.rules.store.RuleStore`.

    ``closed`` are the deleted tenants; ``limit`` bounds the tenants that anyone may name.
    ``exchange`` brings a tenant's rules up to date with the other query nodes of a cluster; with
    it, methods also raise :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`.
    """

    def __init__(
        self,
        registry: RuleRegistry,
        closed: Container[str],
        limit: TenantLimit | None = None,
        exchange: Callable[[str], None] | None = None,
    ) -> None:
        self._exchange = exchange
        self._limit = limit
        self._registry = registry
        self._rules = registry.store
        self._closed = closed
        self._changing = threading.Lock()

    def put(
        self, tenant: str, rule_id: str, definition: dict[str, Any], if_match: str | None
    ) -> tuple[Rule, bool]:
        """Check and save a rule, keeping its earlier versions; the rule, and whether it is new.
        ``if_match`` is the value of the header, None to create. Raises :exc:`RuleExistsError`,
        :exc:`TenantDeletedError`, :exc:`TooManyTenantsError`, and
        :exc:`betrace.service.rules.definition.RuleFileError` for a wrong definition and for
        examples that do not do what they say."""
        rule = make_rule({**definition, "id": rule_id})
        problems = check_examples([rule], cpu_seconds=EXAMPLE_SECONDS)
        if problems:
            raise RuleFileError(problems)
        with self._changing:
            if tenant in self._closed:
                raise TenantDeletedError(f"the tenant {tenant} is deleted")
            if self._limit is not None and (denied := self._limit.refusal(tenant)):
                raise TooManyTenantsError(denied.message)
            self._exchanged(tenant)
            if if_match is None:
                self._must_be_new(tenant, rule_id)
            try:
                created = self._rules.put(tenant, rule_id, rule, if_match=if_match)
            except RuleConflictError:
                self._rules.rule(tenant, rule_id)  # a missing rule is a RuleNotFoundError instead
                raise
            if self._exchanged(tenant) and all(
                etag(each) != etag(rule) for each in self._rules.rules(tenant)
            ):
                raise _changed_elsewhere(rule_id)
        self._registry.forget(tenant)
        return rule, created

    def delete(self, tenant: str, rule_id: str, if_match: str) -> None:
        """Delete a rule."""
        with self._changing:
            self._exchanged(tenant)
            self._rules.rule(tenant, rule_id)
            self._rules.delete(tenant, rule_id, if_match=if_match)
            if self._exchanged(tenant) and any(
                rule.id == rule_id for rule in self._rules.rules(tenant)
            ):
                raise _changed_elsewhere(rule_id)
        self._registry.forget(tenant)

    def settle(self) -> None:
        """Wait for the change in progress. Later ones are refused for tenants that are closed."""
        with self._changing:
            pass

    def delete_all(self, tenant: str) -> None:
        """Delete all rules of a deleted tenant."""
        with self._changing:
            self._rules.delete_tenant(tenant)
        self._registry.forget(tenant)

    def _exchanged(self, tenant: str) -> bool:
        """In a cluster, make the rules here and elsewhere the same; returns False without one."""
        if self._exchange is None:
            return False
        self._exchange(tenant)
        return True

    def _must_be_new(self, tenant: str, rule_id: str) -> None:
        if self._rules.for_all_tenants(rule_id):
            return  # the store refuses it, and says why
        try:
            present = self._rules.rule(tenant, rule_id)
        except RuleNotFoundError:
            return
        raise RuleExistsError(rule_id, etag(present))


def _changed_elsewhere(rule_id: str) -> RuleConflictError:
    return RuleConflictError(
        f"the rule '{rule_id}' was changed at another query node at the same time, and that change "
        "counts"
    )
