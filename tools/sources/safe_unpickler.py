"""Unpickle the dict of a CIFAR batch without running code that the pickle names.

A pickle names the functions that create its objects. `find_class` replaces those for bytes and for NumPy's arrays,
dtypes and scalars with functions in this module, which check their arguments and do not allocate more bytes than the
pickle contains. All other names are refused.

The base class is the standard library's pure-Python unpickler. The C version has no hook that runs before it hashes a
dict key or sets the state of an object. A pickle of 100 bytes can contain a key that takes years to hash (nested tuples
that each contain one tuple twice), and 8 bytes can make the C version allocate 64 GiB for its memo.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

from configs.utils.errors import UserError
from pipelines import memory_limit

LOADING_BYTES = 256 << 20  # memory for labels, file names and the unpickler itself
COPIES = 3  # of the pixels; Python 3 stores them in protocol 2 as UTF-8 text, which is decoded and encoded as Latin-1
MAX_TEXT = 200  # characters of an error in a message


def load_pickle(content: bytes, file: str) -> dict[str, object]:
    """Load a dict from a pickle written by Python 2 or 3, with any protocol.

    Keys are converted to str, text arrays to lists, and NumPy scalars to Python types. Numeric arrays stay NumPy
    arrays, and Python 2 strings in values become bytes.

    Args:
        content: The pickle.
        file: Name of the pickle for messages.

    Raises:
        UserError: The pickle is damaged, is not a dict, or contains an object of an unsupported type.
    """
    try:
        with memory_limit.at_most(LOADING_BYTES + COPIES * len(content)):
            loaded = _to_plain(_Unpickler(content, file).load())
            if not isinstance(loaded, dict):
                raise UserError(
                    f"{file} contains a {type(loaded).__name__}, but a CIFAR batch is a dict; fetch the file again"
                )
            keys = [key.decode() if isinstance(key, bytes) else key for key in loaded]
            return dict(zip(keys, map(_to_plain, loaded.values()), strict=True))
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises any type of error
        reason = f"{type(error).__name__}: {str(error)[:MAX_TEXT]}".removesuffix(": ")
        raise UserError(f"{file} is damaged ({reason}); fetch the file again") from None


class _Content(io.BytesIO):
    """Stream that raises EOFError if the pickle ends early, so that a truncated name is never used."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if size is not None and len(content) < size:
            raise EOFError("it ends early")
        return content

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n"):
            raise EOFError("it ends early")
        return line


class _Dtype:
    """Stand-in for numpy.dtype. NumPy's own `__setstate__` does not check sizes and flags."""

    def __init__(self, name: object, *_: object) -> None:
        text = name.decode() if isinstance(name, bytes) else name
        if not isinstance(text, str) or not re.fullmatch("[biuf][1248]|[SU][0-9]{1,6}", text):
            raise pickle.UnpicklingError(f"an array of {text[:40]!r}" if isinstance(text, str) else "a bad type name")
        self.type = np.dtype(text)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """Set the byte order. The other items of the state are ignored, since the type name determines them."""
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError("an unknown byte order")
        self.type = np.dtype(order + self.type.str[1:])


class _Array:
    """Stand-in for the empty array that unpickling creates first. `__setstate__` sets its shape, type and content."""

    content: np.ndarray | None = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[object, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.content = _array(raw, dtype, shape, "F" if is_fortran is True else "C")


def _to_plain(value: object) -> object:
    """Replace a stand-in with its array, and an array of text with a list. Return other values unchanged."""
    if isinstance(value, _Array):
        value = value.content
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "SU" else value


def _array(
    raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"], axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """Return an array that views the bytes `raw`, like NumPy's `_frombuffer`.

    A pickle may pass arguments of any types, so they are checked.

    Args:
        raw: Bytes of the elements.
        dtype: Stand-in for the type of the elements.
        shape: Shape of the array before its axes are transposed.
        order: Order of the elements, "C" or "F". Ignored if `axes` is given.
        axes: Permutation of the axes, or None if they are not transposed.

    Raises:
        pickle.UnpicklingError: An argument has the wrong type.
        ValueError: The number of bytes does not match the dtype and shape.
    """
    if not isinstance(raw, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array of neither numbers nor text")
    for numbers in (shape, axes or ()):
        if not isinstance(numbers, tuple) or not all(type(number) is int for number in numbers):
            raise pickle.UnpicklingError("an array whose shape is not a tuple of whole numbers")
    array = np.frombuffer(raw, dtype.type)
    return array.reshape(shape, order=order) if axes is None else array.reshape(shape).transpose(axes)


def _scalar(dtype: object, raw: object) -> object:
    """Return the value of a NumPy scalar as an int, float, bool, str or bytes.

    Raises:
        pickle.UnpicklingError: The scalar is invalid.
    """
    if not isinstance(raw, bytes) or not isinstance(dtype, _Dtype) or len(raw) != dtype.type.itemsize:
        raise pickle.UnpicklingError("a scalar that is neither a number nor text")
    return np.frombuffer(raw, dtype.type)[0].item()


_NUMPY: dict[str, object] = {
    "numpy.ndarray": None,  # names the type to reconstruct; never called
    "numpy.dtype": _Dtype,
    # In protocols 0 to 2, Python 3 pickles empty bytes as this call, and other bytes as a call of _codecs.encode.
    "__builtin__.bytes": lambda: b"",
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},  # NumPy 1 and 2
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},  # protocol 5
}


_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickler that calls only functions in this module and hashes only text and bytes."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, content: bytes, file: str) -> None:
        super().__init__(_Content(content), encoding="bytes")
        self._file, self._text_left = file, len(content)

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in for the function or class `module.name`.

        Raises:
            UserError: There is no stand-in, since NumPy does not use this name to pickle arrays and scalars.
        """
        full_name = f"{module}.{name}"
        if full_name == "_codecs.encode":
            return self._encode
        if full_name not in _NUMPY:
            raise UserError(
                f"{self._file} names {full_name[:120]!r}, which no CIFAR batch does and which could run code, so "
                "nothing was loaded; fetch the file from its official source"
            )
        return _NUMPY[full_name]

    def _encode(self, text: object, encoding: object) -> bytes:
        """Encode text as Latin-1. In protocols 0 to 2, Python 3 pickles bytes as calls of `_codecs.encode`."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("an encoding other than latin1")
        self._text_left -= len(text)  # encoding one memoized text a million times would take hours
        if self._text_left < 0:
            raise pickle.UnpicklingError("more encoded text than the file contains")
        return text.encode("latin-1")

    def load_setitem(self) -> None:
        self._check_items(self.stack[-3], self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_items(self.metastack[-1][-1], self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_items({}, self.stack[::2])
        super().load_dict()

    def _check_items(self, target: object, keys: list[object]) -> None:
        if type(target) is not dict or not all(type(key) in (str, bytes) for key in keys):
            raise pickle.UnpicklingError("keys that are not text, or items of an object other than a dict")

    def load_build(self) -> None:
        if type(self.stack[-2]) not in (_Array, _Dtype):
            raise pickle.UnpicklingError("a state for an object without one")
        super().load_build()

    def load_set(self) -> None:
        raise pickle.UnpicklingError("it contains a set")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BUILD[0]] = load_build
    dispatch |= dict.fromkeys((pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), load_set)
