# make setup | demo | demo-live | check | test | lint | format | dist-check | clean, and the measurements below
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LINKS := .links/betrace
STAMP := $(VENV)/.installed

# Hypothesis examples per test: in make check, in make test, and while kernels run as ordinary Python.
CHECK_EXAMPLES ?= 10
EXAMPLES ?= 100
UNCOMPILED_EXAMPLES ?= 10

# Processes that run tests. More than two do not pay on two cores.
WORKERS ?= 2
# More processes than cores, because many tests wait; those of the cluster most of all.
CHECK_WORKERS ?= 6
CLUSTER_WORKERS ?= 4

# A test that hangs fails after 300 s, and the stacks of all threads are printed before.
PYTEST := $(BIN)/pytest --timeout 300 -o faulthandler_timeout=240

# Write bytecode even if the environment forbids it. Otherwise every test process compiles and
# rewrites all modules again, which takes about half of its start.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo demo-live check test lint format dist-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(LINKS)
	ln -sfn ../../channels $(LINKS)/channels
	ln -sfn ../../service $(LINKS)/service
	ln -sfn ../../tui $(LINKS)/tui
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

# Sends every kind of trace once, compares the signals with the expected ones, and exits.
demo: setup
	$(BIN)/betrace demo --once

demo-live: setup
	$(BIN)/betrace demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# For every change: lint, types, and all tests that are not slow, with compiled kernels.
check: lint
	BETRACE_EXAMPLES=$(CHECK_EXAMPLES) \
		$(PYTEST) -q -m "not slow" -n $(CHECK_WORKERS) --dist worksteal

# Everything. First the kernels are compiled, so that this takes no test's time. Then they run as
# ordinary Python, for their coverage. Then the tests of the cluster run, and then all others, whose
# slow tests run one after another in one of the processes (tests/conftest.py).
test: lint
	$(BIN)/coverage erase
	for part in json relations traces; do $(BIN)/python -m betrace.service.pipeline.warmup $$part; done >/dev/null
	NUMBA_DISABLE_JIT=1 BETRACE_EXAMPLES=$(UNCOMPILED_EXAMPLES) \
		$(PYTEST) -q -m "kernel and not slow" -n $(WORKERS) --dist worksteal --cov --cov-report=
	BETRACE_EXAMPLES=$(EXAMPLES) \
		$(PYTEST) -q -m cluster -n $(CLUSTER_WORKERS) --dist worksteal --cov --cov-append --cov-report=
	BETRACE_EXAMPLES=$(EXAMPLES) \
		$(PYTEST) -m "not cluster" -n $(WORKERS) --dist loadgroup --cov --cov-append --cov-fail-under=90

# What a release consists of: the source distribution, the wheel built from it, and that wheel in a
# fresh environment.
dist-check: setup
	rm -rf dist
	$(BIN)/python -m build
	BETRACE_WHEEL=$$(ls $(CURDIR)/dist/*.whl) $(BIN)/pytest -q tests/packaging

clean:
	rm -rf dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
	find channels service tui tests perf -name __pycache__ -type d -prune -exec rm -rf {} +

# Measurements. Each perf/*.py describes itself (make load PERF=--help); perf/REPORT.md has the latest
# results. make report runs all of them in an hour and rewrites it. See also docs/performance.md.
.PHONY: load bench beside curves relations memory flamegraph regress soak overload attacks cachehits summary queries report

# load must not come first, because make reads a line that begins with it as a directive
bench load beside curves relations memory flamegraph regress soak overload attacks cachehits summary: setup
	$(BIN)/python -m perf.$@ $(PERF)

queries: setup
	$(BIN)/python -m perf.bench_queries $(PERF)

report: setup
	$(BIN)/python -m perf.everything $(PERF)

# The dashboard is generated from grafana/*.py, the page of metrics from their declarations.
.PHONY: grafana

grafana: setup
	$(BIN)/python -m grafana.generate
	$(BIN)/python -m betrace.service.cli.docs.metrics > docs/metrics.md
