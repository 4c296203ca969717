"""Sends signals over HTTP, to an OTLP logs endpoint or a webhook."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping

import httpx

from betrace.service.export.exporter import Deliver, Unacceptable, Unavailable
from betrace.service.export.formats import PageUrl, alert_groups, alertmanager, otlp_logs
from betrace.service.signals import Kind, Signal

# Statuses that a retry cannot change. Others, such as 401, an operator can fix.
_FINAL = frozenset({400, 413, 415, 422})
_SHOWN = 200  # characters of an answer in messages


def otlp_delivery(
    client: httpx.AsyncClient,
    endpoint: str,
    headers: Mapping[str, str],
    version: str,
    page_url: PageUrl,
) -> Deliver:
    """Return a function that posts log records to ``endpoint``, for example
    ``http://collector:4318/v1/logs``."""

    async def deliver(signals: list[Signal]) -> None:
        kind = {"Content-Type": "application/x-protobuf"}
        await post(client, endpoint, otlp_logs(signals, version, page_url), {**kind, **headers})

    return deliver


def webhook_delivery(
    client: httpx.AsyncClient,
    url: str,
    headers: Mapping[str, str],
    external_url: str,
    page_url: PageUrl,
    muted: Callable[[Signal], bool],
) -> Deliver:
    """Return a function that posts one request for each tenant and rule to ``url``, without raised
    signals that are ``muted``. Retractions are sent, to resolve what was raised before the mute."""

    async def deliver(signals: list[Signal]) -> None:
        heard = [each for each in signals if each.kind is not Kind.RAISED or not muted(each)]
        for group in alert_groups(heard):
            body = alertmanager(group, external_url, page_url)
            await post(client, url, body, {"Content-Type": "application/json", **headers})

    return deliver


async def post(
    client: httpx.AsyncClient, url: str, body: bytes, headers: Mapping[str, str]
) -> None:
    """Post a body. Raises :exc:`Unavailable` or :exc:`Unacceptable`."""
    try:
        answer = await client.post(url, content=body, headers=dict(headers))
    except httpx.HTTPError as error:
        raise Unavailable(f"{url}: {error or type(error).__name__}") from error
    if answer.is_success:
        return
    said = f"{url} answered {answer.status_code}: {answer.text[:_SHOWN]}"
    if answer.status_code in _FINAL:
        raise Unacceptable(said)
    raise Unavailable(said, _seconds(answer.headers.get("Retry-After", "")))


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0


def make_client(timeout: float) -> httpx.AsyncClient:
    """Return a client that ignores redirects and the environment's proxy settings. It trusts the
    system's certificates, or those in ``SSL_CERT_FILE``."""
    limits = httpx.Limits(max_connections=2, max_keepalive_connections=1)
    return httpx.AsyncClient(
        timeout=timeout, limits=limits, trust_env=False, verify=ssl.create_default_context()
    )
