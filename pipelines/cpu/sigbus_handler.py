"""The handler of SIGBUS: memory of a mapped file that is gone becomes zeros, and is marked as lost. See `bus_guard`.

It may run in any thread, in the middle of anything, so it is machine code that Numba compiles: it takes no lock and no
memory, and calls nothing but mmap, sigaction and raise. Layouts are those of 64-bit Linux.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipelines.cpu.jit import native_callback

# The table, int64: how many rows there are, bytes of a page, address of the handler that was there before; then rows
ROWS, PAGE, PREVIOUS, FIRST_ROW = 0, 1, 2, 3
BEGIN, END, LOST, COLUMNS = 0, 1, 2, 3  # of a row: addresses of a mapped file, and where it was found to be lost (or 0)
TAKE_TABLE = 0  # no signal has this number
CODE, ADDRESS = 1, 2  # of siginfo_t, in steps of 8 bytes
READABLE, FIXED_PRIVATE_ANONYMOUS = 1, 0x32  # of mmap

_integers = types.CPointer(types.int64)
_mmap = types.ExternalFunction(
    "mmap", types.intp(types.intp, types.intp, types.int32, types.int32, types.int32, types.intp)
)
_sigaction = types.ExternalFunction("sigaction", types.int32(types.int32, types.intp, types.intp))
_raise = types.ExternalFunction("raise", types.int32(types.int32))


@intrinsic
def _table_of_process(typing: Any) -> Any:
    """A variable of the machine code itself that holds the table's address, so that the code can be kept on disk."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(64).as_pointer()
        variable = ir.GlobalVariable(builder.module, pointer, builder.module.get_unique_name("table"))
        variable.linkage, variable.initializer = "internal", ir.Constant(pointer, None)
        return variable

    return types.CPointer(_integers)(), generate


def _handle(signal: int, information: Any, context: Any) -> None:
    """Called by the system, see sigaction(2); once before that with TAKE_TABLE and the table."""
    variable = _table_of_process()
    if signal == TAKE_TABLE:
        variable[0] = information
        return
    table = variable[0]
    is_fault = types.int32(information[CODE]) > 0  # else somebody sent the signal
    if is_fault:
        address = information[ADDRESS]
        for number in range(table[ROWS]):
            row = FIRST_ROW + number * COLUMNS
            if table[row + BEGIN] <= address and address < table[row + END]:
                table[row + LOST] = address  # first, so that nobody takes the zeros for content
                page = address & -table[PAGE]
                size = table[row + END] - page  # the rest as well: page by page there would be too many maps
                if _mmap(page, size, READABLE, FIXED_PRIVATE_ANONYMOUS, -1, 0) == page:
                    return
                break
    _sigaction(signal, table[PREVIOUS], 0)  # it happens again, as it would have without us
    if not is_fault:
        _raise(signal)


handler = native_callback(types.void(types.int32, _integers, _integers))(_handle)
