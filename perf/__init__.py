"""Load tests, benchmarks and curves. Run each with ``python -m perf.NAME``; see ``--help``."""
