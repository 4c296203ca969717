"""A request for a page: who looks, at which tenant, and what the page may ask the API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from betrace.service.api.endpoint import OPERATOR_HEADER, Call, Tools
from betrace.service.api.errors import ApiError
from betrace.service.api.pages.evidence import finding
from betrace.service.api.pages.renderer import Templates
from betrace.service.api.params import Param, read_params
from betrace.service.api.rendering import signals_json
from betrace.service.storage.duck.queries import StoredSignal


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks. ``scope`` is the tenant that the address names, None if it names none;
    ``session`` is empty without one; ``name`` is what they last signed a change with."""

    tenant: str
    scope: str | None = None
    session: str = ""
    signed_in: bool = False
    may_change: bool = True
    name: str = ""


@dataclass(slots=True)
class Page:
    """An answer. ``location`` makes it a redirect."""

    body: bytes | AsyncIterator[bytes] = b""
    status: int = 200
    location: str | None = None
    media_type: str = "text/html; charset=utf-8"
    cookies: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Values and lifetimes in seconds by name; a lifetime of 0 deletes the cookie."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Visit:
    """A request for a page. ``args`` are the parameters of the address without ``tenant``, ``form``
    the fields of a form that was sent."""

    tools: Tools
    templates: Templates
    viewer: Viewer
    path: str
    args: dict[str, str]
    form: dict[str, str]
    client: str
    form_token: str

    # Links

    def link(self, path: str, fragment: str = "", **query: object) -> str:
        """The address of a page of the same tenant; parameters that are None are omitted."""
        given = {name: value for name, value in query.items() if value not in (None, "")}
        if self.viewer.scope is not None:
            given["tenant"] = self.viewer.scope
        text = quote(path, safe="/") + (f"?{urlencode(given)}" if given else "")
        return text + (f"#{fragment}" if fragment else "")

    def again(self, fragment: str = "", **changed: object) -> str:
        """The address of this page with other parameters."""
        return self.link(self.path, fragment, **(self.args | changed))

    def arg(self, name: str) -> str:
        """A parameter of the address, empty without one."""
        return self.args.get(name, "")

    # The API

    def call(self, params: dict[str, Any], body: dict[str, Any] | None = None) -> Call:
        """A call of an endpoint of the API, by the viewer."""
        headers: dict[str, str] = {}
        if name := self.form.get("by", "").strip():
            headers[OPERATOR_HEADER] = name
        data = b"" if body is None else orjson.dumps(body)
        return Call(self.tools, self.viewer.tenant, params, headers, data, self.client)

    def params(self, known: Iterable[Param], *own: Param) -> dict[str, Any]:
        """The checked parameters of the address; empty fields of a form count as missing."""
        given = [(name, text) for name, text in self.args.items() if text]
        return read_params([*known, *own], given)

    def signals(self, found: Sequence[StoredSignal]) -> list[dict[str, Any]]:
        """The JSON of signals, with what broke as ``finding``. Blocks."""
        api = self.tools.sources.settings.api
        shown = signals_json(self.tools.triage, self.viewer.tenant, found, api)
        return [{**each, "finding": finding(each)} for each in shown]

    async def show(
        self, template: str, build: Callable[[], dict[str, Any]], status: int = 200
    ) -> Page:
        """Render a template with what ``build`` returns; both run in a query thread."""

        def render() -> bytes:
            return self.render(template, build())

        return Page(await self.call({}).blocking(render), status)

    def render(self, template: str, values: dict[str, Any]) -> bytes:
        """A page with ``values``."""
        common = {"visit": self, "viewer": self.viewer, "link": self.link, "again": self.again}
        return self.templates.render(template, common | values)


def not_found(what: str) -> ApiError:
    """The answer for something that does not exist, or belongs to another tenant."""
    return ApiError(404, f"there is no {what}")
