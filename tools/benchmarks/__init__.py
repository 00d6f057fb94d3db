"""The benchmarks of tools/benchmark.py: interleaved measurement, limits of the machine, peers and suites."""
