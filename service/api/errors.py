"""Errors of the API: an HTTP status, what happened, and what to do about it.

Endpoints let the errors of the stores pass; :func:`translate` turns the expected ones into
answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson

from betrace.service.api.audit import AuditError
from betrace.service.api.rule_writer import (
    RuleExistsError,
    TenantDeletedError,
    TooManyTenantsError,
)
from betrace.service.rules.definition import Problem, RuleFileError
from betrace.service.rules.store import (
    RuleConflictError,
    RuleLimitError,
    RuleNotFoundError,
    RuleReadOnlyError,
)
from betrace.service.storage.dead_letters import DeadLetterError
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.queries import BadQuery
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.triage import TriageError
from betrace.service.storage.undecided import UndecidedStoreError
from betrace.service.tenancy.changes import TenantError, UnknownTenantError
from betrace.service.tenancy.directory import DirectoryError
from betrace.service.tenancy.tokens import BadKeyError


@dataclass(slots=True)
class ApiError(Exception):
    """Ends a request. ``details`` are further fields of the answer's ``error`` object."""

    status: int
    message: str
    hint: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def body(self) -> bytes:
        """``{"error": {"code", "message", "hint", ...details}}``; the code is the name of the
        status, such as ``not_found``."""
        code = HTTPStatus(self.status).name.lower()
        error = {"code": code, "message": self.message, "hint": self.hint, **self.details}
        return orjson.dumps({"error": error})


def unavailable(message: str, hint: str) -> ApiError:
    """A 503 that may be retried in a few seconds."""
    return ApiError(503, message, hint, {"retry-after": "5"})


def translate(error: Exception) -> ApiError | None:
    """The answer to an expected error of the stores; None for an unexpected one."""
    text = str(error)
    match error:
        case BadQuery():
            return ApiError(400, text, "see /docs")
        case StoreError() | PoolTimeout():
            return unavailable(
                f"the store cannot answer: {text}", "try again; see its component at /readyz"
            )
        case NatsUnavailable():
            return unavailable(f"the cluster cannot be read: {text}", "try again")
        case (
            AuditError()
            | DeadLetterError()
            | DirectoryError()
            | TriageError()
            | UndecidedStoreError()
        ):
            return ApiError(503, text, "nothing was done; free disk space and try again")
        case TenantDeletedError():
            return ApiError(403, text, "see /docs")
        case TooManyTenantsError():
            return ApiError(403, text, "use a tenant that exists")
        case UnknownTenantError():
            return ApiError(404, text, error.hint)
        case TenantError():
            return ApiError(409, text, error.hint)
        case BadKeyError():
            return ApiError(400, text, "see docs/security.md")
        case RuleNotFoundError():
            return ApiError(404, text, "list the rules: /api/v1/rules")
        case RuleExistsError():
            hint = f"to replace it, read it and send its ETag, If-Match: {error.etag}, or *"
            return ApiError(428, text, hint, {"etag": error.etag})
        case RuleConflictError():
            hint = "read the rule again, apply your change to it, and send its new ETag"
            return ApiError(412, text, hint)
        case RuleReadOnlyError() | RuleLimitError():
            return ApiError(409, text, "nothing was changed")
        case RuleFileError():
            faults = [_fault(problem) for problem in error.problems]
            return ApiError(
                400,
                f"the rule has errors: {faults[0]['message']}",
                faults[0]["hint"] or "nothing was saved",
                details={"errors": faults},
            )
    return None


def _fault(problem: Problem) -> dict[str, Any]:
    if problem.syntax is not None:
        return problem.syntax.to_json()
    return {"line": None, "column": None, "message": problem.message, "hint": problem.hint}
