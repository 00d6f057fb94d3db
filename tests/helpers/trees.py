"""Compare nested records of tensors."""

from __future__ import annotations

from typing import Any

import torch


def assert_equal_trees(ours: Any, theirs: Any) -> None:
    """Compare bitwise, through dicts and lists."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_equal_trees(ours[key], value)
    elif isinstance(theirs, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal_trees(one, other)
    else:
        assert ours == theirs
