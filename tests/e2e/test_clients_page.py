"""The lines to paste in docs/clients.md, pasted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.process import Running, wait_for

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


def pasted(heading: str, language: str) -> str:
    """The block of that language below a heading."""
    section = PAGE.read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found is not None, heading
    return found[1]


def broke_a_rule(service: Running, name: str) -> bool:
    """Whether a signal was recorded for a trace of the service with that name."""
    answer = service.get(f"/api/v1/traces?service={name}").json()
    return any(service.signals(trace["trace_id"]) for trace in answer["traces"])


def environment(service: Running, grpc: bool) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    return own | {"OTEL_EXPORTER_OTLP_ENDPOINT": service.grpc if grpc else service.ingest}


@pytest.mark.parametrize("kind", ["gRPC", "HTTP"])
def test_python(service: Running, kind: str) -> None:
    code = pasted(f"Python, {kind}", "python")
    given = environment(service, kind == "gRPC")
    subprocess.run([sys.executable, "-c", code], env=given, check=True, timeout=60)
    wait_for(lambda: broke_a_rule(service, f"python-{kind.lower()}"))


@pytest.fixture(scope="module")
def json_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the JSON exporter, which cannot be installed beside the
    other exporters: it pins packages that they share to an older version."""
    directory = tmp_path_factory.mktemp("json-exporter")
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    (line,) = re.findall("`pip install (.*-json-http)`", PAGE.read_text("utf-8"))
    ran = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *line.split()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if ran.returncode:
        pytest.skip(f"the JSON exporter cannot be installed: {ran.stderr[-300:]}")
    return python


def test_python_json(service: Running, json_python: Path) -> None:
    given = environment(service, grpc=False)
    code = pasted("Python, JSON", "python")
    subprocess.run([json_python, "-c", code], env=given, check=True, timeout=60)
    wait_for(lambda: broke_a_rule(service, "python-json"))


@pytest.mark.parametrize(
    ("kind", "name"), [("protobuf", "js-proto"), ("JSON", "js-json"), ("gRPC", "js-grpc")]
)
def test_javascript(service: Running, folder: Path, kind: str, name: str) -> None:
    script = folder / f"{name}.mjs"
    script.write_text(pasted(f"JavaScript, {kind}", "js"))
    given = environment(service, kind == "gRPC")
    subprocess.run(["node", script.name], cwd=folder, env=given, check=True, timeout=60)
    wait_for(lambda: broke_a_rule(service, name))


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(service: Running) -> None:
    code = pasted("curl", "sh").replace("http://127.0.0.1:4318", service.ingest)
    ran = subprocess.run(["sh", "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("{}", "")
    wait_for(lambda: broke_a_rule(service, "curl"))
