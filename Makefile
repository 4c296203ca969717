# make setup | demo | demo-live | test | lint | format | clean, and what perf/ has
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LINKS := .links/betrace
STAMP := $(VENV)/.installed

# How many examples hypothesis tries where kernels run as ordinary Python, for their coverage.
UNCOMPILED_EXAMPLES ?= 10

.PHONY: setup demo demo-live test lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(LINKS)
	ln -sfn ../../channels $(LINKS)/channels
	ln -sfn ../../service $(LINKS)/service
	ln -sfn ../../tui $(LINKS)/tui
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Ends by itself: every kind of trace once, each signal compared with what is expected.
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

# The kernels once as ordinary Python, which shows their coverage; then everything, compiled.
test: lint
	$(BIN)/coverage erase
	NUMBA_DISABLE_JIT=1 BETRACE_EXAMPLES=$(UNCOMPILED_EXAMPLES) \
		$(BIN)/pytest -q -m "kernel and not slow" --cov --cov-report=
	$(BIN)/pytest --cov --cov-append --cov-fail-under=90

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
	find channels service tui tests perf -name __pycache__ -type d -prune -exec rm -rf {} +

# Measurements: perf/*.py say what each does (make load PERF=--help), perf/REPORT.md has the last
# ones. make report runs all of them, an hour, and writes it anew. docs/performance.md: more.
.PHONY: load bench beside curves memory flamegraph regress soak overload cachehits summary queries report

# load is not the first: a line that begins with that word is a directive of make
bench load beside curves memory flamegraph regress soak overload cachehits summary: setup
	$(BIN)/python -m perf.$@ $(PERF)

queries: setup
	$(BIN)/python -m perf.bench_queries $(PERF)

report: setup
	$(BIN)/python -m perf.everything $(PERF)

# The dashboard from the panels in grafana/*.py, and the page of metrics from their declaration.
.PHONY: grafana

grafana: setup
	$(BIN)/python -m grafana.generate
	$(BIN)/python -m betrace.service.cli.docs.metrics > docs/metrics.md
