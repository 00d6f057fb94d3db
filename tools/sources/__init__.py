"""Source readers for `tools/convert.py`. Each kind of source has a module, and the other modules are helpers.

Each `open_*` function validates a source and returns a `pipelines.convert.source.Source`. Import these modules inside
functions, so that h5py and scikit-learn are imported only if a source needs them.
"""
