"""What commands of the command line share: how they fail, and how they ask a running service."""

from __future__ import annotations

import ssl
from typing import Any

import click
import httpx

URL = "http://127.0.0.1:8090"
PAGE = 1000


class Failure(click.ClickException):
    """What keeps a command from running, or what the service refused: sentences, each with a
    remedy, a line each. The exit code is 3."""

    exit_code = 3

    def show(self, file: Any = None) -> None:
        for line in self.message.splitlines():
            click.echo(f"betrace: {line}", err=True)


class AdminApi:
    """A part of the administration of a running service, ``/api/admin`` and ``path``."""

    def __init__(self, url: str, token: str | None, path: str, timeout: float = 10.0) -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        # Without the environment's proxies, but with the system's certificates and SSL_CERT_FILE.
        self._client = httpx.Client(
            base_url=url,
            headers=headers,
            timeout=timeout,
            trust_env=False,
            verify=ssl.create_default_context(),
        )
        self._url = url
        self._path = path

    def ask(self, method: str, path: str = "", **more: Any) -> dict[str, Any]:
        """The answer; ``more`` is for :meth:`httpx.Client.request`. Raises :exc:`Failure`."""
        return _good(*self._request(method, path, more))

    def find(self, method: str, path: str, **more: Any) -> dict[str, Any] | None:
        """The same, None where the service has no such thing."""
        status, body = self._request(method, path, more)
        return None if status == 404 else _good(status, body)

    def _request(self, method: str, path: str, more: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            answer = self._client.request(method, f"/api/admin{self._path}{path}", **more)
            return answer.status_code, answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Failure(
                f"there is no BeTrace service at {self._url} ({error}); start it with `betrace "
                "serve`, or name it with --url"
            ) from None


def _good(status: int, body: dict[str, Any]) -> dict[str, Any]:
    if status >= 400:
        told = body.get("error", {})
        raise Failure(f"{told.get('message', status)}; {told.get('hint', '')}")
    return body


def remote_options(command: Any) -> Any:
    """Options of commands that ask a running service: ``url``, ``token``, ``as_json``."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option(
            "--token",
            envvar="BETRACE_AUTH__OPERATOR_TOKEN",
            help="The operator token, where authentication is on.",
        ),
        click.option(
            "--url", default=URL, envvar="BETRACE_URL", show_default=True, help="Of the API."
        ),
    ):
        command = option(command)
    return command
