"""Sources that `tools/convert.py` reads, one module per kind.

Each `open_*` function validates a source and returns a `pipelines.convert.source.Source`. Import these modules inside
functions, so that h5py and scikit-learn are loaded only if a source needs them.
"""
