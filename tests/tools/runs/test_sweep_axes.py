"""Tests of tools.runs.sweep_axes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tools.runs.sweep_axes import split_outside_brackets


@given(st.lists(st.sampled_from(["1e-3", "[0.9,0.99]", "(1, 2)", "{a: [1,2], b: 3}", '"x,y"', "", "none"]), min_size=1))
def test_splitting_inverts_joining(parts: list[str]) -> None:
    assert split_outside_brackets(",".join(parts), ",") == parts
