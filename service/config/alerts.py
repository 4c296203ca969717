"""Settings of alerts by rule."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from betrace.service.config.base import Count, Seconds, SecondsOrZero, SettingsSection

ALERTMANAGER, ALERT_WEBHOOK = "alerts-alertmanager", "alerts-webhook"
"""Names of the destinations, and of their breakers. Alertmanagers after the first are numbered."""


def _is_url(url: str) -> str:
    if url and not url.startswith(("http://", "https://")):
        raise ValueError(f"is {url!r}: write a URL that begins with http:// or https://")
    return url.rstrip("/")


_Url = Annotated[str, AfterValidator(_is_url)]


class Alertmanager(SettingsSection):
    """Alerts for Prometheus' Alertmanager."""

    urls: list[_Url] = Field(default_factory=list, max_length=8)
    """Its URL, such as ["http://127.0.0.1:9093"]; of a cluster, those of all its members. Empty for
    off."""
    headers: str = ""
    """Request headers: name=value,name2=value2."""


class AlertWebhook(SettingsSection):
    """Alerts for another receiver, in the format of Alertmanager's webhooks: one request when a
    rule begins to break, and one when it no longer does."""

    url: _Url = ""
    """The URL to post to; empty for off."""
    headers: str = ""
    """Request headers: name=value,name2=value2."""
    wait_seconds: SecondsOrZero = 5
    """How long a new alert waits for further signals, so that its first notification has a
    meaningful count. Alertmanager has group_wait for this."""


class AlertSettings(SettingsSection):
    """Alerts: one for each tenant and rule while the rule breaks, however many traces break it. See
    docs/alerts.md."""

    resolve_after_seconds: Annotated[float, Field(ge=1, le=86_400)] = 300
    """An alert resolves after this long without a new signal, or at once if all of its signals are
    retracted or the rule is muted."""
    resend_seconds: Seconds = 60
    """How often an unchanged alert is sent to Alertmanager again, in case it was restarted. Changed
    alerts are sent within seconds."""
    max_active: Count = 5000
    """Maximum alerts at a time. Signals of further rules are counted and logged, and page nobody
    until another alert resolves."""
    runbook_url: str = ""
    """For the annotation runbook_url, such as https://wiki.example.org/rules/{rule}; {tenant} and
    {rule} are replaced. Empty for none."""
    alertmanager: Alertmanager = Alertmanager()
    webhook: AlertWebhook = AlertWebhook()

    @property
    def destinations(self) -> dict[str, str]:
        """The URLs of the destinations that are on, by name."""
        found = {
            ALERTMANAGER + (f"-{number}" if number > 1 else ""): url
            for number, url in enumerate(self.alertmanager.urls, 1)
        }
        return found | ({ALERT_WEBHOOK: self.webhook.url} if self.webhook.url else {})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not all(self.alertmanager.urls):
            raise ValueError("alerts.alertmanager.urls has an empty URL; remove it")
        if len(set(self.alertmanager.urls)) < len(self.alertmanager.urls):
            raise ValueError("alerts.alertmanager.urls names a URL twice; name each once")
        if self.runbook_url and not self.runbook_url.startswith(("http://", "https://")):
            raise ValueError("alerts.runbook_url must begin with http:// or https://")
        return self
