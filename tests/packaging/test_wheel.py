"""The wheel in a fresh environment, next to Django Channels, which has a package `channels` too.

The environment sees the other packages of this one through a path file, but not betrace itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "service/api/pages"
DEMO_RULES = ROOT / "service/cli/demo/rules"
LIBRARY = ROOT / "service/cli/library"

# Hides packages, as if they were not installed.
BLOCKER = """\
import os, sys

class Blocker:
    names = tuple(filter(None, os.environ.get("TEST_WITHOUT", "").split()))

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
EXTRAS = "textual textual_plotext plotext tigerbeetle opentelemetry.sdk opentelemetry.exporter"


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    ran = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Downloaded: Django Channels, and what builds the wheel."""
    directory = tmp_path_factory.mktemp("packages")
    try:
        pip("download", "--no-deps", "--dest", directory, "channels", "hatchling>=1.27")
    except AssertionError as error:
        pytest.skip(f"the package index cannot be reached: {str(error)[-300:]}")
    return directory


@pytest.fixture(scope="module")
def wheel(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if built := os.environ.get("BETRACE_WHEEL"):
        return Path(built)
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", directory, ROOT)
    (path,) = directory.glob("betrace-*.whl")
    return path


class Environment:
    """A virtual environment with the wheel, which runs its commands without the right to write to
    its packages."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        venv.create(directory, with_pip=False)
        self.python = directory / "bin/python"
        (self.packages,) = directory.glob("lib/python*/site-packages")
        self.cache = directory / "cache"

    def pip(self, *arguments: str | Path) -> None:
        pip("--python", self.python, *arguments)

    def show_other_packages(self) -> None:
        paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.packages / "zz_others.pth").write_text("\n".join(paths))
        (self.packages / "sitecustomize.py").write_text(BLOCKER)

    def set_writable(self, writable: bool) -> None:
        for path in [self.packages, *self.packages.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755 if writable else 0o555)

    def command(
        self, *arguments: str | Path, without: str = "", **settings: str
    ) -> dict[str, object]:
        """Arguments for subprocess."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("BETRACE_", "NUMBA_", "OTEL_", "PYTHON"))
        }
        environment = kept | {
            "XDG_CACHE_HOME": str(self.cache),
            "NUMBA_DISABLE_JIT": "1",  # kernels take a minute to compile
            "TEST_WITHOUT": without,
            **settings,
        }
        return {
            "args": [*unprivileged(), self.python, *map(str, arguments)],
            "env": environment,
            "cwd": self.directory,
            "text": True,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }

    def run(
        self, *arguments: str | Path, without: str = "", code: int = 0, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(**self.command(*arguments, without=without, **settings), timeout=120)  # type: ignore[call-overload]
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran

    def betrace(
        self, *arguments: str | Path, without: str = "", code: int = 0, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "betrace.service", *arguments, without=without, code=code, **settings)


def unprivileged() -> list[str]:
    """A prefix of commands that takes from root the right to write what is read-only."""
    if os.geteuid():
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]


@pytest.fixture(scope="module")
def environment(
    wheel: Path, packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
    if (prefix := unprivileged()) and (
        not shutil.which("setpriv") or subprocess.run([*prefix, "true"]).returncode
    ):
        pytest.skip("root can write everywhere here: setpriv cannot take this right away")
    made = Environment(tmp_path_factory.mktemp("environment"))
    (channels,) = packages.glob("channels-*.whl")
    made.pip("install", "--no-deps", wheel, channels)
    made.show_other_packages()
    made.set_writable(False)
    yield made
    made.set_writable(True)


def test_the_wheel_has_betrace_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"betrace"}
    assert len(tops) == 2
    inside = {name.split("/")[1] for name in names if name.startswith("betrace/")}
    assert inside == {"channels", "service", "tui"}
    assert [name for name in names if name.endswith(".pyc")] == []
    for data in [*PAGES.glob("templates/*"), *PAGES.glob("assets/*")]:
        assert f"betrace/service/api/pages/{data.parent.name}/{data.name}" in names
    for data in DEMO_RULES.glob("*.yaml"):
        assert f"betrace/service/cli/demo/rules/{data.name}" in names
    for data in LIBRARY.glob("*.yaml"):
        assert f"betrace/service/cli/library/{data.name}" in names


def test_the_environment_is_what_the_tests_think(environment: Environment) -> None:
    code = "import betrace.service; print(betrace.service.__file__)"
    where = environment.run("-c", code).stdout.strip()
    assert Path(where).is_relative_to(environment.packages)
    code = f"import os; print(os.access({str(environment.packages)!r}, os.W_OK))"
    assert environment.run("-c", code).stdout == "False\n"


def test_the_demo(environment: Environment) -> None:
    report = json.loads(environment.betrace("demo", "--once", "--json").stdout)
    assert report["ok"] is True
    assert report["expected"] > 0


def serve(environment: Environment, data: Path, **options: str) -> None:
    """Start the service, and stop it when it is ready."""
    free = [f"--{name}=127.0.0.1:0" for name in ("ingest", "grpc", "api", "metrics")]
    arguments = ["-m", "betrace.service", "serve", "--json", "--data", data, *free]
    with subprocess.Popen(**environment.command(*arguments, **options)) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        ready = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert ready, log
    assert json.loads(ready)["api"].startswith("http://127.0.0.1:")
    assert process.returncode == 0, log


def test_the_service(environment: Environment, tmp_path: Path) -> None:
    serve(environment, tmp_path)


def test_the_tui(environment: Environment) -> None:
    assert "betrace tui --url" in environment.betrace("tui", "--help").stdout
    ran = environment.betrace("tui", "--url", "http://127.0.0.1:9", code=3)
    assert ran.stderr.startswith("betrace: ")
    assert "Traceback" not in ran.stderr


def test_kernels_are_cached_in_the_users_folder(environment: Environment) -> None:
    code = "from betrace.service.otlp import primitives; from numba.core import config\n"
    code += "print(config.CACHE_DIR)"
    folder = Path(environment.run("-c", code).stdout.strip())
    assert folder.parent == environment.cache / "betrace"


def test_without_the_extras(environment: Environment, tmp_path: Path) -> None:
    environment.betrace("--help", without=EXTRAS)
    environment.betrace("rules", "check", DEMO_RULES, without=EXTRAS)
    serve(environment, tmp_path, without=EXTRAS)
    for arguments, settings, says in (
        (["tui"], {}, "betrace tui needs Textual; install it with: pip install 'betrace[tui]'"),
        (["demo", "--once"], {}, "SDK; install it with: pip install 'betrace[demo]'"),
        (["serve"], {"LEDGER__KIND": "tigerbeetle"}, "pip install 'betrace[tigerbeetle]'"),
        (["serve"], {"TRACING__ENDPOINT": "http://127.0.0.1:9"}, "pip install 'betrace[tracing]'"),
    ):
        given = {f"BETRACE_{name}": value for name, value in settings.items()}
        given |= {"BETRACE_STORAGE__PATH": str(tmp_path)}
        given |= {
            f"BETRACE_{name}__ADDRESS": "127.0.0.1:0" for name in ("INGEST", "API", "METRICS")
        }
        given |= {"BETRACE_INGEST__GRPC_ADDRESS": "127.0.0.1:0"}
        ran = environment.betrace(*arguments, without=EXTRAS, code=3, **given)
        assert says in ran.stderr
        assert len(ran.stderr.splitlines()) <= 2, ran.stderr  # a line of the log, perhaps


def test_uninstalling_leaves_django_channels(
    wheel: Path, packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Environment(tmp_path_factory.mktemp("uninstalled"))
    (channels,) = packages.glob("channels-*.whl")
    other.pip("install", "--no-deps", channels, wheel)
    before = sorted(path.name for path in (other.packages / "channels").iterdir())
    other.pip("uninstall", "--yes", "betrace")
    assert sorted(path.name for path in (other.packages / "channels").iterdir()) == before
    assert [path for path in other.packages.glob("betrace*/**/*") if path.is_file()] == []
    other.run("-c", "import channels; print(channels.__version__)")
