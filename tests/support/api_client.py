"""A client of the API of a service in this process."""

from __future__ import annotations

import json
from typing import Any

from betrace.service.api.app import create_api
from betrace.service.app.service import Service


class ApiClient:
    """Quart's test client. Reads JSON answers and checks the form of errors."""

    def __init__(self, service: Service, authenticator: Any = None) -> None:
        self.service = service
        self.client = create_api(
            service.tools, authenticator or service.gate.authenticator, service.gate.closed
        ).test_client()
        self.headers: Any = None
        """Headers of the last answer."""

    async def ask(
        self, method: str, path: str, status: int = 200, body: Any = None, **headers: str
    ) -> Any:
        """The body of the answer, which must have ``status``; of an error its ``error`` object."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        options = {"json": body} if isinstance(body, dict | list) else {"data": body}
        answer = await self.client.open(
            path, method=method, headers=names, **(options if body is not None else {})
        )
        self.headers = answer.headers
        text = await answer.get_data()
        assert answer.status_code == status, text
        if answer.content_type != "application/json" or not text:
            return text
        parsed = json.loads(text)
        if status >= 400 and "error" in parsed:
            assert set(parsed["error"]) >= {"code", "message", "hint"}
            return parsed["error"]
        return parsed

    async def get(self, path: str, status: int = 200, **headers: str) -> Any:
        return await self.ask("GET", path, status, **headers)

    async def post(self, path: str, status: int = 200, body: Any = None, **headers: str) -> Any:
        return await self.ask("POST", path, status, body, **headers)
