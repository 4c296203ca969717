"""Rules that change before SIGKILL, and again before the restart, concern only spans that are sent
afterwards."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import Running, running, wait_for

pytestmark = pytest.mark.slow


def write_rule(directory: Path, needed: str) -> None:
    """Write the only rule: a trace with an order has a span named ``needed``."""
    (directory / "rules").mkdir(exist_ok=True)
    text = f"rules:\n  - id: has-{needed}\n    condition: when {{ order }} always {{ {needed} }}\n"
    (directory / "rules/rules.yaml").write_text(text)


def send(service: Running, trace: int, name: str, span: int = 1) -> None:
    """Send a span of a trace; it is in the log when this returns."""
    found: dict[str, Any] = {"traceId": f"{trace:032x}", "spanId": f"{span:016x}", "name": name}
    found |= {"startTimeUnixNano": str(span), "endTimeUnixNano": str(span + 1)}
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [found]}]}]}
    answer = service.send(json.dumps(body).encode(), {"content-type": "application/json"})
    assert answer.status_code == 200, answer.text


def signals(service: Running) -> list[tuple[int, str, str]]:
    found = service.get("/api/v1/signals?limit=1000").json()["signals"]
    return sorted((int(s["trace_id"], 16), s["rule_id"], s["kind"]) for s in found)


def test_rules_changed_before_a_kill_and_before_the_restart(tmp_path: Path) -> None:
    never = {"traces__idle_seconds": "3600", "rules__poll_seconds": "3600"}
    never["checkpoint__interval_seconds"] = "3600"
    write_rule(tmp_path, "payment")
    with running(tmp_path, **never) as service:
        send(service, 1, "order")
        send(service, 2, "order")
        write_rule(tmp_path, "invoice")
        service.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "has-invoice" in service.get("/api/v1/rules").text, 60)
        send(service, 3, "order")
        send(service, 2, "payment", span=2)
        service.process.kill()
        service.process.wait()
    write_rule(tmp_path, "delivery")  # while the service is down
    with running(tmp_path, **never) as service:
        send(service, 4, "order")
        send(service, 3, "x", span=2)
        service.process.kill()
        service.process.wait()
    write_rule(tmp_path, "nothing")
    expected = [(1, "has-payment"), (3, "has-invoice"), (4, "has-delivery"), (5, "has-nothing")]
    with running(tmp_path) as service:
        send(service, 5, "order")
        wait_for(lambda: len(signals(service)) >= 4, 60)
        assert signals(service) == [(*each, "raised") for each in expected]
        assert service.stop() == 0
    assert not [line for line in service.log if "Traceback" in line], "".join(service.log)
