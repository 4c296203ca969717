"""The regression gate fails on a slowdown, but not on a slower machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from perf import regress
from perf.lib import everyday
from perf.report import output

OWN, BESIDE = 0.002, 0.001  # CPU seconds of a figure and of the reference


def every(*seconds: float) -> Callable[[], float]:
    turn = cycle(seconds)
    return lambda: next(turn)


@pytest.fixture
def baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(output, "OUT", tmp_path)
    monkeypatch.setattr(regress, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.delenv("PERF_SLOWDOWN", raising=False)
    return tmp_path / "baseline.json"


def test_speed_is_a_ratio_to_the_reference_so_a_slow_machine_does_not_change_it() -> None:
    fast = regress.speed("x", every(OWN), every(BESIDE))
    slow = regress.speed("x", every(3 * OWN), every(3 * BESIDE))
    assert fast["speed"] == pytest.approx(0.5)
    assert slow["speed"] == pytest.approx(fast["speed"])


def test_disturbances_in_some_turns_do_not_change_it() -> None:
    disturbed = regress.speed("x", every(OWN, OWN, 9 * OWN), every(BESIDE, 5 * BESIDE, BESIDE))
    assert disturbed["speed"] == pytest.approx(0.5)
    assert disturbed["max"] == pytest.approx(9)


def test_the_gate_passes_just_above_the_limit_and_fails_below() -> None:
    assert regress.judge("x", every(OWN), every(BESIDE), 0.5 / 0.91).good
    judged = regress.judge("x", every(OWN), every(BESIDE), 0.5 / 0.89)
    assert not judged.good
    assert judged.tries == 1 + regress.RETRIES
    assert judged.row()[-1] == "SLOWER"
    assert judged.row()[3] == "0.89"


def test_a_figure_that_was_disturbed_once_is_measured_again() -> None:
    turns = 1 + regress.REPEATS  # one to warm up
    disturbed = [3 * OWN] * turns + [OWN] * turns
    judged = regress.judge("x", every(*disturbed), every(BESIDE), 0.5)
    assert judged.good
    assert judged.tries == 2


def test_a_new_figure_is_good() -> None:
    judged = regress.judge("x", every(OWN), every(BESIDE), None)
    assert judged.good
    assert judged.row()[-1] == "new"


def test_an_injected_slowdown_has_the_requested_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERF_SLOWDOWN", "other=2,x=1.3")
    slowed = regress.speed("x", every(OWN), every(BESIDE))
    assert slowed["speed"] == pytest.approx(0.5 / 1.3, rel=0.05)
    assert regress.speed("y", every(OWN), every(BESIDE))["speed"] == pytest.approx(0.5)


def test_the_median_of_three_tries_is_accepted() -> None:
    turns = 1 + regress.REPEATS
    tries = [2 * OWN] * turns + [OWN] * turns + [4 * OWN] * turns
    judged = regress.measured("x", every(*tries), every(BESIDE), None)
    assert judged.found["speed"] == pytest.approx(0.25)


def test_the_gate_passes_and_fails_on_an_injected_slowdown(
    baseline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Uses fixed CPU times, so the load of the machine does not matter. The real figures are
    measured by ``test_each_processor_has_its_own_baseline``."""
    monkeypatch.setattr(regress, "figures", lambda directory: {"fold": every(OWN)})
    monkeypatch.setattr(regress, "Reference", lambda: every(BESIDE))
    with pytest.raises(SystemExit, match="there is no baseline"):
        regress.main(["--only", "fold"])
    regress.main(["--only", "fold", "--accept"])
    (accepted,) = json.loads(baseline.read_text()).values()
    assert accepted["figures"]["fold"]["speed"] == pytest.approx(0.5)

    regress.main(["--only", "fold"])
    assert json.loads((output.OUT / "regress.json").read_text())["slower"] == []

    monkeypatch.setenv("PERF_SLOWDOWN", "fold=1.3")
    with pytest.raises(SystemExit, match="below 90% of the accepted speed: fold"):
        regress.main(["--only", "fold"])
    assert json.loads((output.OUT / "regress.json").read_text())["slower"] == ["fold"]
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.slow
def test_each_processor_has_its_own_baseline(
    baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = output.machine()
    monkeypatch.setattr(output, "machine", lambda: real | {"cpu": "one"})
    regress.main(["--only", "decode", "--accept"])
    monkeypatch.setattr(output, "machine", lambda: real | {"cpu": "other"})
    with pytest.raises(SystemExit, match=r"no baseline for this processor \(other\)"):
        regress.main(["--only", "decode"])
    regress.main(["--only", "decode", "--accept"])
    kept = json.loads(baseline.read_text())
    assert kept.keys() == {"one", "other"}
    assert all(each["figures"].keys() == {"decode"} for each in kept.values())


def test_a_run_with_a_slowdown_cannot_be_accepted(
    baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERF_SLOWDOWN", "fold=1.3")
    with pytest.raises(SystemExit, match="cannot be accepted"):
        regress.main(["--accept"])
    assert not baseline.exists()


def test_an_unknown_figure_is_named(baseline: Path) -> None:
    with pytest.raises(SystemExit, match="unknown figure 'folding'; the figures are decode"):
        regress.main(["--only", "folding"])


def test_the_accepted_baselines_have_every_figure(tmp_path: Path) -> None:
    processors = json.loads(regress.BASELINE.read_text())
    assert processors
    for kept in processors.values():
        figures = set(regress.figures(tmp_path))
        assert figures <= set(kept["figures"]) <= figures | set(everyday.ROWS)
