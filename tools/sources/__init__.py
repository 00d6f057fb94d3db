"""Sources that `tools/convert.py` reads, one module per kind.

Each `open_*` function validates a source and returns a `pipelines.convert.source.Source`. Import the modules where they
are used, since a worker process needs h5py or scikit-learn for its own source only.
"""
