"""The running service alerts a real Alertmanager, also when it is killed in between."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.alertmanager import PROGRAM, WHY_NOT, AlertmanagerProcess, alertmanager
from tests.support.http_receiver import Receiver, receiving
from tests.support.process import Running, running, wait_for
from tests.support.spans import S, body

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)]

CONFIG = """\
route: {{receiver: hook, group_by: [tenant], group_wait: 1s, group_interval: 1s}}
receivers:
  - name: hook
    webhook_configs: [{{url: "{url}", send_resolved: true}}]
"""
WAIT = 60


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


def break_rule(service: Running, first: int, number: int) -> None:
    """Send traces that break too-many-spans."""
    spans = [
        S(span, "loop", trace.to_bytes(16, "big"))
        for trace in range(first, first + number)
        for span in range(1, 6)
    ]
    assert service.send(body(*spans)).status_code == 200


def count(manager: AlertmanagerProcess) -> str:
    found = manager.alerts()
    return found[0]["annotations"]["count"] if found else ""


def test_an_alert_survives_kill_9(tmp_path: Path, hook: Receiver) -> None:
    with alertmanager(tmp_path / "am", CONFIG.format(url=hook.url)) as manager:
        options = {
            "alerts__alertmanager__urls": json.dumps([manager.url]),
            "alerts__resolve_after_seconds": "600",
            "api__public_url": "https://b.example",
        }
        with running(tmp_path, **options) as service:
            break_rule(service, 1, 200)
            wait_for(lambda: count(manager) == "200", WAIT)
            (alert,) = manager.alerts()
            assert alert["labels"] == {
                "alertname": "too-many-spans",
                "severity": "low",
                "tenant": "default",
            }
            assert len(alert["annotations"]["examples"].split("\n")) == 5
            wait_for(lambda: len(hook.taken()) == 1, WAIT)
            break_rule(service, 1001, 50)
            service.process.send_signal(signal.SIGKILL)
            service.process.wait()
        with running(tmp_path, **options) as service:
            wait_for(lambda: count(manager) == "250", WAIT)
            (after,) = manager.alerts()
            assert after["startsAt"] == alert["startsAt"]
            samples = service.samples(service.api)
            assert samples["betrace_alerts_firing"] == 1
            mute = {"for": "1h", "reason": "the test ends"}
            path = "/api/v1/rules/too-many-spans/mute"
            httpx.put(service.api + path, json=mute, trust_env=False).raise_for_status()
            wait_for(lambda: len(hook.taken()) == 2, WAIT)
            assert service.samples(service.api)["betrace_alerts_firing"] == 0
    told = [json.loads(each) for each in hook.taken()]
    assert [each["status"] for each in told] == ["firing", "resolved"]
    assert told[1]["alerts"][0]["annotations"]["count"] == "250"
