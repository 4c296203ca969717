"""A client of a running service's administration, ``/api/admin``."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any

import httpx

from betrace.service.cli.common import Failure, Server

PAGE = 1000


class AdminApi:
    """The part of the administration below ``path``."""

    def __init__(self, server: Server, path: str, timeout: float = 10.0) -> None:
        self._client = make_client(server, timeout)
        self._server = server
        self._path = f"/api/admin{path}"

    def ask(self, method: str, path: str = "", **more: Any) -> dict[str, Any]:
        """The answer; ``more`` is for :meth:`httpx.Client.request`. Raises :exc:`Failure`."""
        return _checked(*self._request(method, path, more))

    def find(self, method: str, path: str, **more: Any) -> dict[str, Any] | None:
        """Like :meth:`ask`, but None if the service answers 404."""
        status, body = self._request(method, path, more)
        return None if status == 404 else _checked(status, body)

    def _request(self, method: str, path: str, more: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            answer = self._client.request(method, self._path + path, **more)
            return answer.status_code, answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Failure(_explain(error, self._server)) from None


def make_client(server: Server, timeout: float) -> httpx.Client:
    """A client that ignores the environment's proxies. It trusts ``server.ca``, or the system's
    certificates and SSL_CERT_FILE. Raises :exc:`Failure` if ``server.ca`` has no certificates."""
    try:
        context = ssl.create_default_context(cafile=None if server.ca is None else str(server.ca))
    except OSError as error:  # SSLError is an OSError
        raise Failure(
            f"{server.ca} has no certificates ({error}); name a PEM file with --ca"
        ) from None
    return httpx.Client(
        base_url=server.url,
        headers={"authorization": f"Bearer {server.token}"} if server.token else {},
        timeout=timeout,
        trust_env=False,
        verify=context,
    )


def _explain(error: Exception, server: Server) -> str:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {server.url} is not trusted ({cause.verify_message}); "
                "if it is yours, name it or its CA with --ca FILE"
            )
        if isinstance(cause, ssl.SSLError):
            return (
                f"{server.url} does not answer with TLS ({cause.reason or cause}); "
                "use http:// in --url if the service has no certificate"
            )
    if isinstance(error, httpx.TimeoutException):
        return f"{server.url} did not answer in time; try again, or look at the service's log"
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return (
            f"{server.url} did not answer with HTTP ({error or type(error).__name__}); "
            "use https:// in --url if the service has a certificate"
        )
    return (
        f"there is no BeTrace service at {server.url} ({error}); start it with `betrace serve`, "
        "or name its address with --url"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _checked(status: int, body: dict[str, Any]) -> dict[str, Any]:
    if status >= 400:
        error = body.get("error", {})
        raise Failure(f"{error.get('message', status)}; {error.get('hint', '')}")
    return body
