"""Benchmarks: one file per result in `results/`, run by `make bench-…`."""
