"""Transforms on a GPU: DALI graphs and a Triton kernel."""
