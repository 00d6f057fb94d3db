"""Readers of the sources of `tools/convert.py`: one module per kind of source, and helper modules.

Each `open_*` function validates a source and returns a `pipelines.convert.source.Source`. Import these modules inside
functions, so that h5py and scikit-learn are imported only if a source needs them.
"""
