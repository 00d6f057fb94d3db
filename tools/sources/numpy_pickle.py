"""Reads pickles that hold dicts, lists, strings, numbers and NumPy arrays, as data: nothing they name is ever called.

A pickle is a program, and Python's own interpreter of it lets a few bytes call functions, ask for gigabytes (a memo of
2^32 places), or take forever (the hash of a tuple that holds another one twice, which holds another one twice …). This
one knows some forty of the seventy instructions, and no call: NumPy's reconstruction names stand for inert values.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any

import numpy as np

from configs.errors import UserError

MAX_OPCODES = 2_000_000  # ten times those of the largest official file; each may take some hundred bytes of memory
MAX_TEXT = 200  # characters of a reason


def load_pickle(content: bytes, file: str) -> dict[str, Any]:
    """The dict in a pickle of Python 2 or 3, keys as str, arrays of integers as NumPy arrays, other strings as bytes.

    `file` names the pickle in errors.
    """
    try:
        loaded = _Reader(file).read(content)
        if not isinstance(loaded, dict):
            raise UserError(
                f"{file} holds a {type(loaded).__name__}, but a CIFAR batch is a dict; fetch the file again"
            )
        keys = [key.decode() if isinstance(key, bytes) else key for key in loaded]
        values = [value.to_numpy() if isinstance(value, _Array) else value for value in loaded.values()]
        return dict(zip(keys, values, strict=True))
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        reason = f"{type(error).__name__}: {str(error)[:MAX_TEXT]}"
        raise UserError(f"{file} is damaged ({reason}); fetch the file again") from None


class _Dtype:
    """Stands for numpy.dtype: its name and byte order."""

    def __init__(self, name: Any) -> None:
        self.name, self.byte_order = _text(name), "|"


class _Array:
    """Stands for numpy.ndarray: its pickled state."""

    state: tuple[Any, ...] = ()

    def to_numpy(self) -> np.ndarray:
        """The array, a read-only view of the pickle's bytes; raises TypeError unless it holds integers."""
        _, shape, dtype, fortran_order, raw = self.state
        if not isinstance(dtype, _Dtype) or not re.fullmatch("[iu][1248]", dtype.name) or not isinstance(raw, bytes):
            what = f"dtype {dtype.name[:40]!r}" if isinstance(dtype, _Dtype) else "no dtype"
            raise TypeError(f"an array of {what} where integers belong")
        if not isinstance(shape, tuple) or not all(type(length) is int for length in shape):
            raise TypeError("an array whose shape is not a tuple of whole numbers")
        if dtype.byte_order not in ("|", "<", ">", "="):
            raise ValueError(f"an array of byte order {dtype.byte_order[:40]!r}")
        array = np.frombuffer(raw, dtype.byte_order + dtype.name)
        return array.reshape(shape, order="F" if fortran_order is True else "C")


def _text(value: Any) -> str:
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"a {type(value).__name__} where text belongs")
    return value.decode() if isinstance(value, bytes) else value


class _Name(str):
    """A name that the pickle would import."""


_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # of NumPy 1 and 2
_ADMITTED = (*_RECONSTRUCT, "numpy.ndarray", "numpy.dtype")
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # of Python 2, which are bytes; read as Latin-1
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Reader:
    """The stack machine, for one pickle. What it builds is never hashed, compared, printed or walked through here."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def read(self, content: bytes) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if opcode.name == "STOP":
                return self._stack.pop()
            if number >= MAX_OPCODES:
                raise ValueError(f"more than {MAX_OPCODES:,} instructions")
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _STRINGS:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("LIST", "TUPLE"):
            items = self._since_mark()
            stack.append(items if name == "LIST" else tuple(items))
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else self._pop(1)
            self._top(list).extend(items)
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._since_mark()
            if name == "DICT":
                stack.append({})
            self._set_items(self._top(dict), items)
        elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            parts = [_text(part) for part in self._pop(2)] if name == "STACK_GLOBAL" else argument.split(" ", 1)
            stack.append(self._admitted(".".join(parts)))
        elif name == "REDUCE":
            stack.append(self._reduced(*self._pop(2)))
        elif name == "BUILD":
            self._build(*self._pop(1))
        elif name not in ("PROTO", "FRAME"):
            raise UserError(
                f"{self._file} holds the pickle instruction {name}, which a CIFAR batch never does and which could run "
                "code: nothing was loaded; fetch the file from its official source"
            )

    def _pop(self, count: int) -> list[Any]:
        """The last `count` values, which may not reach below the last mark."""
        start = len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes more values than it gave")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _since_mark(self) -> list[Any]:
        return self._pop(len(self._stack) - self._marks.pop())

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise TypeError(f"items for what is no {kind.__name__}")
        return self._stack[-1]

    def _set_items(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes):
                raise TypeError(f"a {type(key).__name__} as a key, where text belongs")
            target[key] = value

    def _admitted(self, name: str) -> _Name:
        if name not in _ADMITTED:
            raise UserError(
                f"{self._file} names {name[:120]!r}, which a CIFAR batch never does and which could run code: "
                "nothing was loaded; fetch the file from its official source"
            )
        return _Name(name)

    def _reduced(self, name: Any, arguments: Any) -> _Array | _Dtype:
        """What a call of numpy's `_reconstruct` or `dtype` stands for."""
        if type(name) is _Name and name in _RECONSTRUCT:
            return _Array()
        if type(name) is _Name and name == "numpy.dtype" and isinstance(arguments, tuple) and arguments:
            return _Dtype(arguments[0])
        raise TypeError("a call of what is no function")

    def _build(self, state: Any) -> None:
        target = self._stack[-1] if self._stack else None
        if not isinstance(state, tuple) or len(state) > 9 or not isinstance(target, (_Array, _Dtype)):
            raise TypeError("a state of what has none")
        if isinstance(target, _Array):
            target.state = state
        else:
            target.byte_order = _text(state[1])
