"""Transforms on a GPU: the DALI graph and the Triton kernel."""
