"""A running service whose pages are asked for as a browser would, without JavaScript."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from html import unescape
from urllib.parse import urlsplit

import pytest

from betrace.service.api.app import create_api
from betrace.service.storage.duck.queries import SignalFilter
from tests.support.inprocess import closed, running, send, settings
from tests.support.spans import S

RULES = """\
rules:
  - id: fraud-check
    name: Payments are checked
    description: Every charge needs a check.
    severity: critical
    labels: {team: payments}
    condition: |
      when   { charge.where(x > 1000) }
      always { fraud_check }
      never  { skipped or ignored }
  - id: no-bypass
    severity: low
    condition: bypass
"""
TRACE = bytes(range(1, 17))


class Browser:
    """Quart's test client, with the cookies of one person."""

    def __init__(self, service):
        app = create_api(service.tools, service.gate.authenticator, service.gate.closed)
        self.service = service
        self.client = app.test_client()
        self.page = ""
        self.headers = None

    async def get(self, path, status=200, **headers):
        """The text of a page, which must have ``status``."""
        answer = await self.client.get(path, headers=headers)
        return await self._read(answer, status)

    async def post(self, path, fields, status=303, token=True, **headers):
        """Send a form, with the token of the page that was read last."""
        if token:
            fields = {"form_token": self.form_token(), **fields}
        answer = await self.client.post(path, form=fields, headers=headers)
        return await self._read(answer, status)

    async def _read(self, answer, status):
        text = await answer.get_data(as_text=True)
        assert answer.status_code == status, text
        self.headers = answer.headers
        if text:
            self.page = text
        return text

    def form_token(self):
        return re.search('name="form_token" value="([^"]+)"', self.page)[1]

    def links(self, start):
        """The addresses on the page that begin with ``start``."""
        found = re.findall('href="([^"]+)"', self.page)
        return [link for link in map(unescape, found) if link.startswith(start)]

    @property
    def location(self):
        return self.headers["location"]

    def path(self):
        return urlsplit(self.location).path


@asynccontextmanager
async def browsing(directory, text=RULES, **sections):
    """A running service with rules of the tenant ``default``."""
    folder = directory / "rules" / "default"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.yaml").write_text(text)
    async with running(settings(directory, **sections)) as service:
        yield Browser(service)


@asynccontextmanager
async def broken(directory, *spans, **sections):
    """A service with a closed trace that breaks rules."""
    found = spans or (
        S(1, "POST /pay", TRACE, 0, 100, 0, "shop"),
        S(2, "charge", TRACE, 10, 60, 1, "bank", x="1500"),
        S(3, "bypass", TRACE, 20, 30, 2, "bank", error=True),
    )
    async with browsing(directory, **sections) as browser:
        await send(browser.service, found)
        await closed(browser.service)
        yield browser


def signal_id(browser, rule="fraud-check", tenant="default"):
    found, _ = browser.service.store.signals(tenant, SignalFilter(rule=rule))
    return found[0].signal.id


@pytest.fixture
async def browser(tmp_path):
    async with broken(tmp_path) as browser:
        yield browser
