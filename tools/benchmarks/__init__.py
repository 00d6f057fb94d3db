"""Benchmarks of tools/benchmark.py: interleaved measurement, machine limits, other libraries (peers) and suites."""
