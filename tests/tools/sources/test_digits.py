"""scikit-learn's digits: pixels and a fixed split."""

from __future__ import annotations

import pickle

import numpy as np

from tools.sources.digits import open_digits


def test_digits_are_32x32_rgb_with_full_range() -> None:
    rows = open_digits().splits["train"]
    images = np.stack(list(rows.read(0, 100)))
    assert (images.shape, images.dtype) == ((100, 32, 32, 3), np.uint8)
    assert (images[..., 0] == images[..., 1]).all()
    assert (images[..., 0] == images[..., 2]).all()
    assert (images.min(), images.max()) == (0, 255)


def test_digits_split_is_complete_and_stratified() -> None:
    source = open_digits()
    train, val = source.splits["train"], source.splits["val"]
    names = [rows.describe(row) for rows in (train, val) for row in range(len(rows))]
    assert sorted(names) == sorted(f"digits[{row}]" for row in range(1797))
    assert train.labels is not None
    assert val.labels is not None
    shares = np.bincount(val.labels) / (np.bincount(train.labels) + np.bincount(val.labels))
    assert (shares.round(2).min(), shares.round(2).max()) == (0.2, 0.2)


def test_digits_split_is_reproducible() -> None:
    source, again = open_digits(), open_digits()
    assert source.fingerprint == again.fingerprint
    val = source.splits["val"]
    assert [val.describe(row) for row in range(4)] == ["digits[21]", "digits[24]", "digits[28]", "digits[34]"]
    sent = pickle.loads(pickle.dumps(val))
    np.testing.assert_array_equal(list(sent.read(5, 9)), list(val.read(5, 9)))
