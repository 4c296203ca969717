"""The roles of a process of a cluster, and the parts that each role needs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from betrace.service.config.settings import Settings

DAY_SECONDS = 86_400


class Role(StrEnum):
    """What a process of a cluster does."""

    EDGE = "edge"
    """Receives spans and appends them to the partitions' logs."""
    EVALUATOR = "evaluator"
    """Evaluates the partitions that it owns."""
    QUERY = "query"
    """Stores what was decided, and answers queries."""


class RoleError(Exception):
    """The roles and the configuration contradict each other; the message says what to do."""


KERNELS: dict[Role, tuple[str, ...]] = {
    Role.EDGE: ("json",),
    Role.EVALUATOR: ("relations", "traces"),
    Role.QUERY: ("relations", "traces"),
}
"""The parts of :data:`betrace.service.pipeline.warmup.PARTS` that each role needs. An edge compiles
the others that it needs itself."""


def read_roles(text: str | None, clustered: bool) -> tuple[Role, ...]:
    """The roles in the text of ``--role``; none without a cluster. Raises :exc:`RoleError` if only
    one of the two is given, and for unknown roles."""
    names = [each.strip() for each in (text or "").split(",") if each.strip()]
    valid = ", ".join(Role)
    if clustered and not names:
        raise RoleError(
            "config.toml has a section [cluster], so say what this process does with --role: one "
            f"or several of {valid}, separated by commas"
        )
    if names and not clustered:
        raise RoleError(
            "--role is for a cluster, but there is no section [cluster] in config.toml; add one, "
            "or leave --role out"
        )
    for name in names:
        if name not in set(Role):
            raise RoleError(f"{name!r} is no role; roles are {valid}")
    return tuple(role for role in Role if role in names)


def refuse_unsupported(settings: Settings) -> None:
    """Raise :exc:`RoleError` for settings that do not work on a cluster."""
    days, max_age = settings.retention.log_days, settings.traces.max_age_seconds
    if days and max_age > days * DAY_SECONDS / 2:
        raise RoleError(
            f"retention.log_days ({days}) is less than twice traces.max_age_seconds ({max_age:g}), "
            "so spans of open traces could be deleted; raise the first or lower the second"
        )


def kernels_of(roles: Sequence[Role]) -> tuple[str, ...]:
    """The parts that must be compiled."""
    return tuple(dict.fromkeys(part for role in roles for part in KERNELS[role]))
