"""Unpickling of files that hold lists, strings, numbers and NumPy arrays, without running anything they name.

A pickle may call whatever it names. This unpickler knows NumPy's reconstruction names alone, and even these stand for
the inert classes below, so that no code of NumPy meets a crafted state either. Any other name is a `UserError`.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import numpy as np

from configs.errors import UserError


def load_pickle(content: bytes, file: str) -> dict[str, Any]:
    """The dict in a pickle of Python 2 or 3, keys as str, arrays of integers as NumPy arrays, other strings as bytes.

    `file` names the pickle in errors.
    """
    try:
        loaded = _Unpickler(content, file).load()
        if not isinstance(loaded, dict):
            raise UserError(
                f"{file} holds a {type(loaded).__name__}, but a CIFAR batch is a dict; fetch the file again"
            )
        keys = [key.decode() if isinstance(key, bytes) else str(key) for key in loaded]
        values = [value.to_numpy() if isinstance(value, _Array) else value for value in loaded.values()]
        return dict(zip(keys, values, strict=True))
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{file} is damaged ({reason}); fetch the file again") from None


class _Dtype:
    """Stands for numpy.dtype: keeps its name and byte order."""

    def __init__(self, name: bytes | str, align: object = None, copy: object = None) -> None:
        self.name = name.decode() if isinstance(name, bytes) else str(name)
        self.byte_order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.byte_order = order.decode() if isinstance(order, bytes) else str(order)


class _Array:
    """Stands for numpy.ndarray: keeps the pickled state."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        """The array, a read-only view of the pickle's bytes; raises TypeError unless it holds integers."""
        _, shape, dtype, fortran_order, raw = self.state
        if not re.fullmatch("[iu][1248]", dtype.name) or not isinstance(raw, bytes):
            raise TypeError(f"an array of dtype {dtype.name[:40]!r} where integers belong")
        return np.frombuffer(raw, dtype.byte_order + dtype.name).reshape(shape, order="F" if fortran_order else "C")


def _reconstruct(subtype: type, shape: object, dtype: object) -> _Array:
    return _Array()


class _Unpickler(pickle.Unpickler):
    ADMITTED = {  # noqa: RUF012 - never written
        "numpy.core.multiarray._reconstruct": _reconstruct,  # NumPy 1, and thereby the official files
        "numpy._core.multiarray._reconstruct": _reconstruct,  # NumPy 2
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
    }

    def __init__(self, content: bytes, file: str) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self.ADMITTED:
            raise UserError(
                f"{self._file} names {full_name[:120]!r}, which a CIFAR batch never does and which could run code: "
                "nothing was loaded; fetch the file from its official source"
            )
        return self.ADMITTED[full_name]
