"""A SIGBUS handler that replaces a mapped file with zeros, from an unreadable page to the end of the file.

See `storage.sigbus`. The handler may interrupt any thread at any point. It is therefore machine code, compiled by
Numba, that does not use locks or allocate memory and calls only mmap, sigaction and raise. Structure layouts are those
of 64-bit Linux.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic
from numba.types import int32, intp

from pipelines.cpu.jit import native_callback

# The table is int64: number of rows, page size in bytes, address of the previous struct sigaction, then the rows.
ROWS, PAGE, PREVIOUS, FIRST_ROW = 0, 1, 2, 3
START, END, FAULT, COLUMNS = 0, 1, 2, 3  # row: address range of a mapped file; its last fault, or 0
TAKE_TABLE = 0  # not the number of a signal
CODE, ADDRESS = 1, 2  # fields of siginfo_t, in units of 8 bytes
READABLE, FIXED_PRIVATE_ANONYMOUS = 1, 0x32  # flags of mmap

_integers = types.CPointer(types.int64)
_mmap = types.ExternalFunction("mmap", intp(intp, intp, int32, int32, int32, intp))
_sigaction = types.ExternalFunction("sigaction", int32(int32, intp, intp))
_raise = types.ExternalFunction("raise", int32(int32))


@intrinsic
def _table_of_process(typing: object) -> tuple[Signature, Callable[..., ir.Value]]:
    """Return a pointer to a global variable that holds the address of the table.

    A signal handler has no argument for the address. As a constant of the machine code, it would prevent caching the
    machine code on disk.
    """

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, values: object) -> ir.Value:
        pointer = ir.IntType(64).as_pointer()
        variable = cgutils.add_global_variable(builder.module, pointer, "table")
        variable.linkage, variable.initializer = "internal", ir.Constant(pointer, None)
        return variable

    return types.CPointer(_integers)(), generate


def _handle(signal: int, information: types.CPointer, context: types.CPointer) -> None:
    """Handle SIGBUS. The arguments are those of a handler in sigaction(2).

    Before the handler is installed, call it once with TAKE_TABLE as `signal` and the address of the table as
    `information`.
    """
    variable = _table_of_process()
    if signal == TAKE_TABLE:
        variable[0] = information
        return
    table = variable[0]
    is_fault = int32(information[CODE]) > 0  # otherwise a process sent the signal
    if is_fault:
        address = information[ADDRESS]
        for number in range(table[ROWS]):
            row = FIRST_ROW + number * COLUMNS
            if table[row + START] <= address and address < table[row + END]:
                table[row + FAULT] = address  # recorded first, so that the zeros are never taken for content
                page = address & -table[PAGE]
                size = table[row + END] - page  # to the end of the file: one mapping per page would be too many
                if _mmap(page, size, READABLE, FIXED_PRIVATE_ANONYMOUS, -1, 0) == page:
                    return
                break
    _sigaction(signal, table[PREVIOUS], 0)  # the fault then repeats and reaches the previous handler
    if not is_fault:
        _raise(signal)


handler = native_callback(types.void(int32, _integers, _integers))(_handle)
