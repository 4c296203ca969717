"""Load tests, benchmarks and curves, each run by command: ``python -m perf.NAME --help``."""
