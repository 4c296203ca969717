"""The service's HTTP interface (docs/http-api.md), as the TUI uses it."""

from __future__ import annotations

import getpass
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import httpx

Json = dict[str, Any]
Kind = Literal["unreachable", "timed out", "refused", "conflict", "not understood"]

TIMEOUT = 5.0
"""Seconds that connecting, and a part of an answer, may take."""

SILENCE = 10.0
"""Seconds after which a stream of snapshots that sends nothing is given up; where nothing is wrong
it sends one each second."""

QUIET = 40.0
"""The same for signals: a comment comes after 15 s without one."""

CHANGED_MEANWHILE = 412
"""The status of a change that was refused since the thing is not what it was (If-Match)."""

MAX_EVENT = 8 << 20
"""Bytes of one server-sent event, at most."""


class ClientError(Exception):
    """A request that was not answered as it should be: a plain sentence.

    ``kind`` tells whether the service was unreachable, answered too late, refused (``status`` is
    its status; ``conflict`` is that of a thing that was changed meanwhile), or said what cannot be
    understood.
    """

    def __init__(self, kind: Kind, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.detail: Json = {}
        """The ``error`` object of the answer, such as with the errors of a rule."""


class Client:
    """An asynchronous client. Use it as a context manager, or call :meth:`close`.

    Args:
      url: where the API is, such as ``http://127.0.0.1:8090``.
      token: sent as bearer token.
      tenant: whose signals, traces and rules; an operator's token is good for all.
      transport: another transport, in tests.

    Every method raises :exc:`ClientError`. Proxies of the environment are not used.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        tenant: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        _check_url(self.url)
        self.tenant: str | None = None
        """Whose signals, traces and rules are asked for; None for the token's, or `default`."""
        headers = {"x-operator": operator_name()}
        if token:
            headers["authorization"] = f"Bearer {token}"
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=TIMEOUT,
            trust_env=False,
            verify=ssl.create_default_context(),  # the system's, or SSL_CERT_FILE
            transport=transport,
        )
        self.view(tenant)

    def view(self, tenant: str | None) -> None:
        """Ask for this tenant's signals, traces and rules from now on."""
        self.tenant = tenant
        if tenant:
            self._http.headers["x-scope-orgid"] = tenant
        else:
            self._http.headers.pop("x-scope-orgid", None)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # One request

    async def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None = None,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
        accept: tuple[int, ...] = (),
    ) -> Json:
        """A request and its JSON answer, empty for 204. ``params`` that are None are left out;
        statuses in ``accept`` are no errors."""
        given = {name: _text(value) for name, value in (params or {}).items() if value is not None}
        try:
            response = await self._http.request(
                method, path, params=given, json=body, headers=headers, timeout=timeout
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise self._failed(error) from error
        if not response.is_success and response.status_code not in accept:
            raise _refused(response.status_code, response.content)
        return _object(response.content) if response.content else {}

    async def get(self, path: str, **params: Any) -> Json:
        return await self.request("GET", path, params)

    async def post(
        self, path: str, body: Json | None = None, *, timeout: float = TIMEOUT, **params: Any
    ) -> Json:
        return await self.request("POST", path, params, body, timeout=timeout)

    async def events(
        self,
        path: str,
        silence: float = SILENCE,
        opened: Callable[[], None] | None = None,
        **params: Any,
    ) -> AsyncIterator[tuple[str, Json]]:
        """Server-sent events: (name, data). Ends when the service ends the stream; gives it up
        after ``silence`` seconds without anything. ``opened`` is called when it has begun."""
        given = {name: _text(value) for name, value in params.items() if value is not None}
        timeout = httpx.Timeout(TIMEOUT, read=silence)
        try:
            async with self._http.stream("GET", path, params=given, timeout=timeout) as response:
                if not response.is_success:
                    raise _refused(response.status_code, await response.aread())
                if opened is not None:
                    opened()
                async for name, data in read_events(response.aiter_bytes()):
                    yield name, _object(data)
        except (httpx.HTTPError, OSError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ClientError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(
            error, httpx.ConnectTimeout
        ):
            return ClientError("timed out", "the service did not answer in time")
        return ClientError(
            "unreachable", f"no service answers at {self.url} ({error or type(error).__name__})"
        )

    # The state of the service

    async def snapshot(self) -> Json:
        """What an event of `GET /api/performance/stream` has, read piece by piece."""
        ready = await self.request("GET", "/readyz", accept=(503,))
        queues = await self.get("/api/performance/queue-stats")
        breakers = await self.get("/api/admin/breakers")
        return {
            "metrics": await self.get("/api/performance/metrics"),
            "queues": queues.get("queues"),
            "caches": await self.get("/api/performance/cache-stats"),
            "traceWindows": await self.get("/api/performance/trace-windows"),
            "system": await self.get("/api/performance/system-stats"),
            "breakers": breakers.get("breakers"),
            "pipeline": await self.get("/api/admin/pipeline"),
            "ready": ready.get("status") == "ready",
            "components": ready.get("components"),
        }

    def snapshots(self) -> AsyncIterator[tuple[str, Json]]:
        """Snapshots as they come, once a second."""
        return self.events("/api/performance/stream")

    # What operators do

    async def act_on_breaker(self, name: str, action: str) -> Json:
        """``action`` is trip, reset, force-open or disable; the breaker after it."""
        return await self.post(f"/api/admin/breakers/{segment(name)}/{action}")

    async def pause(self) -> Json:
        return await self.post("/api/admin/pipeline/pause")

    async def resume(self) -> Json:
        return await self.post("/api/admin/pipeline/resume")

    async def drain(self, wait: int = 10) -> Json:
        """Wait at most ``wait`` seconds until the channels are empty; the pipeline."""
        return await self.post("/api/admin/pipeline/drain", timeout=wait + TIMEOUT, wait=wait)

    async def invalidate_cache(self, name: str, tenant: str | None = None) -> Json:
        """Empty a cache, of one tenant or of all."""
        path = f"/api/performance/cache-invalidate/{segment(name)}"
        return await self.post(path, tenantId=tenant)

    async def warm_caches(self) -> Json:
        return await self.post("/api/admin/cache-warmup", timeout=60.0)

    async def dead_letter(self, action: str, letter: str) -> Json:
        """``action`` is retry or discard."""
        return await self.post(f"/api/admin/dead-letters/{segment(letter)}/{action}")

    async def retry_dead_letters(self) -> Json:
        """All of them; how many."""
        return await self.post("/api/admin/dead-letters/retry", timeout=60.0)

    async def create_tenant(self, body: Json) -> Json:
        return await self.post("/api/admin/tenants", body)

    async def delete_tenant(self, name: str, wait: int = 10) -> Json:
        path = f"/api/admin/tenants/{segment(name)}"
        return await self.request("DELETE", path, {"wait": wait}, timeout=wait + TIMEOUT)

    async def set_quota(self, name: str, quota: int | None) -> Json:
        """Spans a second, 0 for no limit, None for what is configured."""
        body = {} if quota is None else {"spansPerSecond": quota}
        return await self.request("PUT", f"/api/admin/tenants/{segment(name)}/quota", body=body)

    async def add_key(self, name: str, public_key: str) -> Json:
        body = {"publicKey": public_key}
        return await self.post(f"/api/admin/tenants/{segment(name)}/keys", body)

    async def revoke_key(self, name: str, kid: str) -> Json:
        path = f"/api/admin/tenants/{segment(name)}/keys/{segment(kid)}"
        return await self.request("DELETE", path)

    async def save_checkpoint(self) -> Json:
        return await self.post("/api/admin/checkpoint", timeout=60.0)

    async def replay_fallback(self) -> Json:
        return await self.post("/api/admin/fallback/replay")

    # Signals, traces and rules of the tenant

    def signals(
        self, opened: Callable[[], None], **filters: str | None
    ) -> AsyncIterator[tuple[str, Json]]:
        """Signals as they are stored."""
        return self.events("/api/v1/signals/stream", QUIET, opened, **filters)

    async def signal(self, signal_id: str) -> Json:
        return await self.get(f"/api/v1/signals/{segment(signal_id)}")

    async def trace(self, trace_id: str) -> Json:
        return await self.get(f"/api/v1/traces/{segment(trace_id)}")

    async def rule(self, rule_id: str) -> Json:
        return await self.get(f"/api/v1/rules/{segment(rule_id)}")

    async def check_condition(self, condition: str) -> list[Json]:
        """The errors of a rule's condition."""
        answer = await self.post("/api/v1/rules/validate", {"condition": condition})
        return [each for each in answer.get("errors") or [] if isinstance(each, dict)]

    async def test_condition(self, condition: str, trace: Json) -> Json:
        """What a condition says of a trace in OTLP JSON."""
        given = {"resourceSpans": trace.get("resourceSpans") or []}
        body = {"condition": condition, "trace": given}
        return await self.post("/api/v1/rules/test", body, timeout=30.0)

    async def put_rule(self, rule_id: str, rule: Json, etag: str | None) -> Json:
        """Replace the rule that has this entity tag, or create it where there is none."""
        headers = {"if-match": etag} if etag else None
        path = f"/api/v1/rules/{segment(rule_id)}"
        return await self.request("PUT", path, body=rule, headers=headers)

    async def delete_rule(self, rule_id: str, etag: str) -> None:
        path = f"/api/v1/rules/{segment(rule_id)}"
        await self.request("DELETE", path, headers={"if-match": etag})


def _check_url(url: str) -> None:
    """Raise :exc:`ClientError` for what is no base of an API."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port that is none
        right = False
    if not right:
        raise ClientError("unreachable", f"{url} is no URL such as http://127.0.0.1:8090")


def segment(text: str) -> str:
    """Text as one segment of a path."""
    return quote(text, safe="")


def operator_name() -> str:
    """The user's name for the audit log, in the letters that it takes."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = ""
    return re.sub(r"[^A-Za-z0-9_.@+-]", "_", name)[:64] or "tui"


async def read_events(parts: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, bytes]]:
    """Server-sent events of a byte stream (WHATWG HTML, 9.2.6): (name, data).

    Raises :exc:`ClientError` for an event larger than `MAX_EVENT`."""
    name, data, left, size = "message", list[bytes](), b"", 0
    async for part in parts:
        *lines, left = (left + part).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if data:
                    yield name, b"\n".join(data)
                name, data, size = "message", [], 0
                continue
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"event":
                name = value.decode(errors="replace")
            elif field == b"data":
                data.append(value)
                size += len(value)
        if size + len(left) > MAX_EVENT:
            raise ClientError("not understood", "the service sent an event that is too large")


def _text(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _object(content: bytes) -> Json:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ClientError(
            "not understood", "what answers there is no BeTrace API: it sent no JSON"
        ) from error
    if not isinstance(value, dict):
        raise ClientError("not understood", "the service sent JSON that is no object")
    return _harmless(value) if _SUSPECT.search(content) else value


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SUSPECT = re.compile(
    rb"\\u00[01789]|\\u20[26]|\xc2[\x80-\x9f]|\xe2\x80|\xe2\x81|\x7f", re.IGNORECASE
)


def _harmless(value: Any) -> Any:
    """Without the control characters that anyone's spans may bring to an operator's terminal."""
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value)
    if isinstance(value, list):
        return [_harmless(each) for each in value]
    if isinstance(value, dict):
        return {_harmless(name): _harmless(each) for name, each in value.items()}
    return value


def _refused(status: int, content: bytes) -> ClientError:
    """An error as the service words it: what is wrong, and what to do."""
    try:
        detail = json.loads(content)["error"]
        message = str(detail["message"])
        hint = detail.get("hint")
    except (ValueError, KeyError, TypeError):
        return ClientError("refused", f"the service answered with status {status}", status)
    kind: Kind = "conflict" if status == CHANGED_MEANWHILE else "refused"
    error = ClientError(kind, f"{message}; {hint}" if hint else message, status)
    error.detail = detail
    return error
