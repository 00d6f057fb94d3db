"""What `tools/convert.py` can read, one module per kind of source; each module's `open_*` returns a
`pipelines.source.Source`. Owns validation and fingerprints of sources; knows nothing of shards.

The modules are imported where they are used: a worker process needs h5py or scikit-learn only for its own source.
"""
