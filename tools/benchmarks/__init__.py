"""What tools/benchmark.py measures: contestants that take turns, the limits of the machine, peers, and the tables."""
