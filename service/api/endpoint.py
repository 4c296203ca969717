"""What an endpoint of the API is: one description serves routing, checking and documentation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVarTuple

import orjson
import trio

from betrace.channels.threads import ThreadRunner, ThreadTimeout
from betrace.service.api.backend import Backend
from betrace.service.api.params import Param, near
from betrace.service.config.edge import Api
from betrace.service.receiver.responses import ApiError

Ts = TypeVarTuple("Ts")

Access = Literal["tenant", "operator", "scrape", "none"]
"""Who may call an endpoint: a tenant, an operator, who reads metrics, anyone."""
JSON_TYPE = "application/json"
HTML_TYPE = "text/html; charset=utf-8"
EVENTS_TYPE = "text/event-stream"
# Seconds between comments on a silent stream, so that proxies and clients keep it open.
KEEP_ALIVE = 15.0


@dataclass(slots=True)
class Answer:
    """A response other than 200 with JSON: ``body`` is JSON values, or bytes as they are, or an
    iterator of the parts of a stream."""

    body: Any
    status: int = 200
    media_type: str = JSON_TYPE
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Tools:
    """What all calls share."""

    backend: Backend
    settings: Api
    threads: ThreadRunner
    streams: int = 0


@dataclass(slots=True)
class Call:
    """A checked request: the caller's ``tenant`` (empty where none is needed), the values of
    the query and path ``params``, lower-case ``headers``, and the ``body``."""

    tools: Tools
    tenant: str
    params: dict[str, Any]
    headers: dict[str, str]
    body: bytes
    client: str = ""
    """The caller's address."""

    @property
    def backend(self) -> Backend:
        return self.tools.backend

    async def blocking(self, function: Callable[[*Ts], Any], *args: *Ts) -> Any:
        """Call a function that blocks in a thread. Raises :exc:`ApiError` 503 after the
        configured time; the call may then still go on."""
        timeout = self.tools.settings.query_timeout_seconds
        try:
            return await self.tools.threads.run(function, *args, timeout=timeout)
        except ThreadTimeout:
            raise ApiError(
                503,
                f"the query took longer than {timeout:g} s",
                "narrow it (since, until, limit) or try again later",
                {"retry-after": "5"},
            ) from None

    def json(self, required: dict[str, type], optional: dict[str, type]) -> dict[str, Any]:
        """The fields of a JSON object in the body. Raises :exc:`ApiError` 400."""
        example = ", ".join(f'"{name}": …' for name in required)
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"the body is not JSON: {error}", f"send {{{example}}}") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the body is not a JSON object", f"send {{{example}}}")
        known = required | optional
        for name, item in value.items():
            if name not in known:
                raise ApiError(400, f"unknown field {name[:80]!r} in the body", near(name, known))
            if type(item) is not known[name]:
                word = _JSON_NAMES[known[name]]
                raise ApiError(400, f"the field {name} is of the wrong type", f"it must be {word}")
        for name in required:
            if name not in value:
                raise ApiError(
                    400, f"the field {name} is missing in the body", f"send {{{example}}}"
                )
        return value

    def stream(self, source: Callable[[], AsyncIterator[bytes]]) -> Answer:
        """A stream of server-sent events from an async generator. Raises :exc:`ApiError` 503
        when there are too many."""
        tools = self.tools
        if tools.streams >= tools.settings.max_streams:
            raise ApiError(
                503,
                f"{tools.streams} streams are open already",
                "close one, or raise api.max_streams",
                {"retry-after": "5"},
            )

        async def counted() -> AsyncIterator[bytes]:
            # Counted while it runs: a generator that was never started is never closed either.
            tools.streams += 1
            parts = source()
            try:
                yield b": connected\n\n"
                async for part in parts:
                    yield part
            finally:
                tools.streams -= 1
                with trio.CancelScope(shield=True):
                    await parts.aclose()  # type: ignore[attr-defined]

        return Answer(counted(), media_type=EVENTS_TYPE, headers={"cache-control": "no-store"})


_JSON_NAMES = {
    str: "text",
    dict: "an object",
    bool: "true or false",
    list: "a list",
    int: "a whole number",
}


def event(name: str, data: Any, identity: str | None = None) -> bytes:
    """A server-sent event (WHATWG HTML, 9.2)."""
    head = f"id: {identity}\n" if identity else ""
    return f"{head}event: {name}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"


Handler = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint. ``path`` has its parameters in braces. ``answers`` maps each status to what it
    means; those of checks that every endpoint has are added by the documentation."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    description: str = ""
    params: tuple[Param, ...] = ()
    path_params: tuple[Param, ...] = ()
    body: dict[str, Any] | None = None
    answers: dict[int, str] = field(default_factory=dict)
    media_type: str = JSON_TYPE
    access: Access = "tenant"


class Endpoints:
    """A list of endpoints that a module declares, with a decorator."""

    def __init__(self, tag: str, access: Access = "tenant") -> None:
        self.tag = tag
        self.access = access
        self.all: list[Endpoint] = []

    def add(
        self,
        method: str,
        path: str,
        summary: str,
        *,
        params: Iterable[Param] = (),
        path_params: Iterable[Param] = (),
        body: dict[str, Any] | None = None,
        answers: dict[int, str] | None = None,
        media_type: str = JSON_TYPE,
        access: Access | None = None,
    ) -> Callable[[Handler], Handler]:
        """Declare the decorated function as the handler of ``method path``; its docstring is the
        description. ``access`` is that of the list if not given."""

        def declare(handler: Handler) -> Handler:
            self.all.append(
                Endpoint(
                    method,
                    path,
                    handler,
                    summary,
                    self.tag,
                    " ".join((handler.__doc__ or "").split()),
                    tuple(params),
                    tuple(path_params),
                    body,
                    answers or {},
                    media_type,
                    access or self.access,
                )
            )
            return handler

        return declare
