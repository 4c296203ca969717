"""A client for the part of the HTTP API (docs/http-api.md) that the TUI uses."""

from __future__ import annotations

import getpass
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import httpx

from betrace.tui.json_values import Json, as_text, objects

Kind = Literal["unreachable", "timed out", "refused", "conflict", "not understood"]

TIMEOUT = 5.0
"""Seconds allowed for connecting and for each read."""

SILENCE = 10.0
"""Seconds of silence after which a stream of snapshots counts as lost; it normally sends one every
second."""

QUIET = 40.0
"""The same for a stream of signals, which sends a comment after 15 s without a signal."""

CHANGED_MEANWHILE = 412
"""The status of a change whose If-Match no longer holds."""

MAX_EVENT = 8 << 20
"""Maximum size of one server-sent event in bytes."""


class ClientError(Exception):
    """A request failed; the message is one plain sentence.

    ``kind`` says whether the service was unreachable, did not answer in time, refused (``status``
    is the HTTP status), refused because someone else changed the object (``conflict``), or
    answered something that is not understood.
    """

    def __init__(self, kind: Kind, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.detail: Json = {}
        """The ``error`` object of the answer. It may list the errors of a rule."""


class ApiClient:
    """An asynchronous client. Use it as a context manager, or call :meth:`close`.

    Args:
      url: the URL of the API, such as ``http://127.0.0.1:8090``.
      token: sent as a bearer token.
      tenant: the tenant whose signals, traces and rules to read; an operator's token may read all.
      ca: a PEM file of certificates to trust, in place of the system's.
      transport: replaces the network in tests.

    Every method raises :exc:`ClientError`. Proxy variables in the environment are ignored.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        tenant: str | None = None,
        ca: Path | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        _check_url(self.url)
        self.tenant: str | None = None
        """The tenant of signals, traces and rules; None for the token's tenant, or `default`."""
        headers = {"x-operator": operator_name()}
        if token:
            headers["authorization"] = f"Bearer {token}"
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=TIMEOUT,
            trust_env=False,
            verify=_trusted(ca) if self.url.startswith("https:") else False,
            transport=transport,
        )
        self.view(tenant)

    def view(self, tenant: str | None) -> None:
        """Request this tenant's signals, traces and rules from now on."""
        self.tenant = tenant
        if tenant:
            self._http.headers["x-scope-orgid"] = tenant
        else:
            self._http.headers.pop("x-scope-orgid", None)

    async def __aenter__(self) -> ApiClient:
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
        """Send a request and return its JSON; empty for 204. Omits ``params`` that are None.
        Statuses in ``accept`` are not errors."""
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

    async def in_cluster(self) -> bool:
        """Whether the service is a query node of a cluster. Also false if the token may not ask."""
        found = await self.request("GET", "/api/cluster", accept=(401, 403, 404))
        return "partitions" in found

    async def events(
        self,
        path: str,
        silence: float = SILENCE,
        opened: Callable[[], None] | None = None,
        **params: Any,
    ) -> AsyncIterator[tuple[str, Json]]:
        """Yield server-sent events as (name, data) until the service ends the stream. Fails after
        ``silence`` seconds without data. Calls ``opened`` when the stream has started."""
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
        """Read one snapshot, as `GET /api/performance/stream` sends it, in several requests."""
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
        """Follow the snapshots; the service sends one per second."""
        return self.events("/api/performance/stream")

    # Changes

    async def act_on_breaker(self, name: str, action: str) -> Json:
        """Trip, reset, force-open or disable a breaker, and return it."""
        return await self.post(f"/api/admin/breakers/{segment(name)}/{action}")

    async def pause(self) -> Json:
        return await self.post("/api/admin/pipeline/pause")

    async def resume(self) -> Json:
        return await self.post("/api/admin/pipeline/resume")

    async def drain(self, wait: int = 10) -> Json:
        """Wait at most ``wait`` seconds until the channels are empty, and return the pipeline."""
        return await self.post("/api/admin/pipeline/drain", timeout=wait + TIMEOUT, wait=wait)

    async def invalidate_cache(self, name: str, tenant: str | None = None) -> Json:
        """Empty a cache for one tenant or for all."""
        path = f"/api/performance/cache-invalidate/{segment(name)}"
        return await self.post(path, tenantId=tenant)

    async def warm_caches(self) -> Json:
        return await self.post("/api/admin/cache-warmup", timeout=60.0)

    async def dead_letter(self, action: str, letter: str) -> Json:
        """Retry or discard one dead letter."""
        return await self.post(f"/api/admin/dead-letters/{segment(letter)}/{action}")

    async def retry_dead_letters(self) -> Json:
        """Retry all dead letters, and return how many."""
        return await self.post("/api/admin/dead-letters/retry", timeout=60.0)

    async def create_tenant(self, body: Json) -> Json:
        return await self.post("/api/admin/tenants", body)

    async def delete_tenant(self, name: str, wait: int = 10) -> Json:
        path = f"/api/admin/tenants/{segment(name)}"
        return await self.request("DELETE", path, {"wait": wait}, timeout=wait + TIMEOUT)

    async def set_quota(self, name: str, quota: int | None) -> Json:
        """Set spans per second; 0 for no limit, None for the configured default."""
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

    # Signals, traces and rules of one tenant

    def signals(
        self, opened: Callable[[], None], **filters: str | None
    ) -> AsyncIterator[tuple[str, Json]]:
        """Follow the signals as they are stored."""
        return self.events("/api/v1/signals/stream", QUIET, opened, **filters)

    async def signal(self, signal_id: str) -> Json:
        return await self.get(f"/api/v1/signals/{segment(signal_id)}")

    async def trace(self, trace_id: str) -> Json:
        return await self.get(f"/api/v1/traces/{segment(trace_id)}")

    async def acknowledge(self, signal_id: str, note: str) -> Json:
        """Acknowledge a signal, and return the acknowledgement."""
        path = f"/api/v1/signals/{segment(signal_id)}/acknowledge"
        return await self.post(path, {"note": note} if note else {})

    async def mute(self, rule_id: str, duration: str, reason: str) -> Json:
        """Mute a rule for a duration such as 2h, and return the mute."""
        path = f"/api/v1/rules/{segment(rule_id)}/mute"
        return await self.request("PUT", path, body={"for": duration, "reason": reason})

    async def unmute(self, rule_id: str) -> None:
        await self.request("DELETE", f"/api/v1/rules/{segment(rule_id)}/mute")

    async def rule(self, rule_id: str) -> Json:
        return await self.get(f"/api/v1/rules/{segment(rule_id)}")

    async def check_condition(self, condition: str) -> tuple[list[Json], str]:
        """Return the errors of a rule's condition, and how it is decided if it relates spans."""
        answer = await self.post("/api/v1/rules/validate", {"condition": condition})
        return objects(answer.get("errors")), as_text(answer.get("plan"))

    async def test_condition(self, condition: str, trace: Json) -> Json:
        """Evaluate a condition on a trace in OTLP JSON."""
        given = {"resourceSpans": trace.get("resourceSpans") or []}
        body = {"condition": condition, "trace": given}
        return await self.post("/api/v1/rules/test", body, timeout=30.0)

    async def put_rule(self, rule_id: str, rule: Json, etag: str | None) -> Json:
        """Replace the rule with this entity tag; create it without one."""
        headers = {"if-match": etag} if etag else None
        path = f"/api/v1/rules/{segment(rule_id)}"
        return await self.request("PUT", path, body=rule, headers=headers)

    async def delete_rule(self, rule_id: str, etag: str) -> None:
        path = f"/api/v1/rules/{segment(rule_id)}"
        await self.request("DELETE", path, headers={"if-match": etag})


def _trusted(ca: Path | None) -> ssl.SSLContext:
    """The certificates of a PEM file, or those of the system or SSL_CERT_FILE, which take 20 ms to
    load."""
    try:
        return ssl.create_default_context(cafile=ca)
    except (ssl.SSLError, OSError) as error:
        raise ClientError(
            "refused", f"{ca} has no certificates ({error}); name a PEM file with --ca"
        ) from error


def _check_url(url: str) -> None:
    """Raise :exc:`ClientError` if this is not an HTTP URL."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as an invalid port
        right = False
    if not right:
        raise ClientError(
            "unreachable", f"{url} is not a URL; write one such as http://127.0.0.1:8090"
        )


def segment(text: str) -> str:
    """Quote text as one segment of a path."""
    return quote(text, safe="")


def operator_name() -> str:
    """The user's name in the characters that the audit log accepts."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = ""
    return re.sub(r"[^A-Za-z0-9_.@+-]", "_", name)[:64] or "tui"


async def read_events(parts: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, bytes]]:
    """Parse server-sent events (WHATWG HTML, 9.2.6) from a byte stream into (name, data).

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
            raise ClientError(
                "not understood", f"the service sent an event larger than {MAX_EVENT} bytes"
            )


def _text(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _object(content: bytes) -> Json:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ClientError(
            "not understood", "this is not a BeTrace API: the answer is not JSON"
        ) from error
    if not isinstance(value, dict):
        raise ClientError("not understood", "the service sent JSON that is not an object")
    return _without_controls(value) if _SUSPECT.search(content) else value


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SUSPECT = re.compile(
    rb"\\u00[01789]|\\u20[26]|\xc2[\x80-\x9f]|\xe2\x80|\xe2\x81|\x7f", re.IGNORECASE
)


def _without_controls(value: Any) -> Any:
    """Replace control characters, because anyone's spans could send them to this terminal."""
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_controls(each) for each in value]
    if isinstance(value, dict):
        return {_without_controls(name): _without_controls(each) for name, each in value.items()}
    return value


def _refused(status: int, content: bytes) -> ClientError:
    """The service's own error message and hint."""
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
