"""Settings of alerts, of read-only tokens, and of rules for all tenants."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from betrace.service.config.settings import Settings


def test_destinations_by_name() -> None:
    urls = ["http://one:9093/", "https://two:9093/prefix"]
    given = {"alertmanager": {"urls": urls}, "webhook": {"url": "http://hook"}}
    assert Settings.model_validate({"alerts": given}).alerts.destinations == {
        "alerts-alertmanager": "http://one:9093",
        "alerts-alertmanager-2": "https://two:9093/prefix",
        "alerts-webhook": "http://hook",
    }
    assert Settings().alerts.destinations == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"alerts": {"alertmanager": {"urls": ["localhost:9093"]}}}, "begins with http://"),
        ({"alerts": {"alertmanager": {"urls": [""]}}}, "has an empty URL"),
        ({"alerts": {"alertmanager": {"urls": ["http://a", "http://a/"]}}}, "names a URL twice"),
        ({"alerts": {"runbook_url": "wiki/{rule}"}}, "must begin with http://"),
        ({"alerts": {"resolve_after_seconds": 0.5}}, "greater than or equal to 1"),
        ({"rules": {"directory": "a", "all_tenants_directory": "a"}}, "are the same"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Settings.model_validate(given)
