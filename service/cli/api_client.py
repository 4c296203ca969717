"""A client of a running service's API."""

from __future__ import annotations

import getpass
import json
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from betrace.service.cli.common import Failure, Server

PAGE = 1000
_SILENCE_SECONDS = 45.0  # the service breaks the silence of a stream every 15 s


class ServiceApi:
    """The part of the API below ``path``, for ``tenant`` if it is given. ``who`` is the name of the
    person who acts."""

    def __init__(
        self,
        server: Server,
        path: str,
        timeout: float = 10.0,
        tenant: str | None = None,
        who: str | None = None,
    ) -> None:
        self._client = make_client(server, timeout)
        if tenant is not None:
            self._client.headers["x-scope-orgid"] = tenant
        if who is not None:
            self._client.headers["x-operator"] = who
        self._server = server
        self._path = path

    def ask(self, method: str, path: str = "", **more: Any) -> dict[str, Any]:
        """The answer; ``more`` is for :meth:`httpx.Client.request`. Raises :exc:`Failure`."""
        return _checked(*self._request(method, path, more))

    def find(self, method: str, path: str, **more: Any) -> dict[str, Any] | None:
        """Like :meth:`ask`, but None if the service answers 404."""
        status, body = self._request(method, path, more)
        return None if status == 404 else _checked(status, body)

    @contextmanager
    def stream(self, path: str, params: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The objects of a stream of server-sent events, as they arrive. Raises :exc:`Failure`."""
        try:
            with self._client.stream(
                "GET", self._path + path, params=params, timeout=_SILENCE_SECONDS
            ) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    _checked(answer.status_code, answer.json())
                yield (
                    json.loads(line.removeprefix("data:"))
                    for line in answer.iter_lines()
                    if line.startswith("data:")
                )
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Failure(_explain(error, self._server)) from None

    def _request(self, method: str, path: str, more: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            answer = self._client.request(method, self._path + path, **more)
            return answer.status_code, answer.json() if answer.content else {}
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Failure(_explain(error, self._server)) from None


def user_name() -> str | None:
    """The name of the user who runs the command, if the service accepts it."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name
        return None
    return name if re.fullmatch(r"[A-Za-z0-9_.@+-]{1,64}", name) else None


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
