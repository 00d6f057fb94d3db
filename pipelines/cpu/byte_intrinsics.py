"""Intrinsics for byte operations that Numba does not generate by itself: wide moves, shuffles and prefetches.

The intrinsics are written in LLVM IR, so they compile for any CPU. They do not check bounds, and arrays are flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

from llvmlite import ir
from llvmlite.ir import IRBuilder, Value
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

LINE = 64  # bytes per cache line
PIXELS = 16  # pixels moved at once by `mirror_pixels`, `split_pixels` and `join_pixels`

I8, I32 = ir.IntType(8), ir.IntType(32)
_PLANE, _BLOCK = ir.VectorType(I8, PIXELS), ir.VectorType(I8, 3 * PIXELS)


class Array:
    """Array argument of an intrinsic: flat memory that the intrinsic's code reads and writes."""

    def __init__(self, context: BaseContext, builder: IRBuilder, kind: types.Array, value: Value) -> None:
        self._builder = builder
        self._data = context.make_array(kind)(context, builder, value).data
        self._align = kind.dtype.bitwidth // 8  # bytes

    def address(self, offset: Value, kind: ir.Type) -> Value:
        """Return a pointer to element `offset`, cast to a pointer to `kind`."""
        return self._builder.bitcast(self._builder.gep(self._data, [offset]), kind.as_pointer())

    def load(self, offset: Value, kind: ir.Type) -> Value:
        """Return the value of type `kind` whose first element is element `offset`."""
        return self._builder.load(self.address(offset, kind), align=self._align)

    def store(self, value: Value, offset: Value, align: int | None = None) -> ir.Instruction:
        """Write `value` from element `offset` on. `align` is the alignment of the address, by default one element."""
        return self._builder.store(value, self.address(offset, value.type), align=align or self._align)


def array_intrinsic(generate: Callable[..., None]) -> Callable[..., None]:
    """Turn a function that writes LLVM code into an intrinsic without a result.

    The first argument of `generate` is the IRBuilder. The others are the arguments of the intrinsic: an `Array` for
    each array, an index (64 bits) for each integer and a float32 for each float.
    """

    @intrinsic
    @wraps(generate)
    def declare(typing: object, *given: types.Type) -> tuple[Signature, Callable[..., None]]:
        def lower(context: BaseContext, builder: IRBuilder, signature: Signature, values: list[Value]) -> None:
            arguments = [
                Array(context, builder, kind, value) if isinstance(kind, types.Array) else value
                for kind, value in zip(signature.args, values, strict=True)
            ]
            generate(builder, *arguments)

        return types.void(*map(_parameter_type, given)), lower

    return declare


def _parameter_type(given: types.Type) -> types.Type:
    if isinstance(given, types.Array):
        return given
    return types.intp if isinstance(given, types.Integer) else types.float32


def shuffle(builder: IRBuilder, first: Value, second: Value | None, lanes: Sequence[int]) -> Value:
    """Return a vector of `lanes` of two vectors, counted from the first lane of `first`. None: an undefined vector."""
    order = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(first, ir.Constant(first.type, ir.Undefined) if second is None else second, order)


@array_intrinsic
def copy_bytes(builder: IRBuilder, target: Array, at: Value, source: Array, begin: Value, count: Value) -> None:
    """Copy source[begin : begin + count] to target[at : at + count]. Both arrays are uint8."""
    cgutils.raw_memcpy(builder, target.address(at, I8), source.address(begin, I8), count, 1)


@array_intrinsic
def copy_four(builder: IRBuilder, target: Array, at: Value, source: Array, begin: Value) -> None:
    """Copy four bytes, a pixel and the byte after it, from source[begin:] to target[at:]. Both arrays are uint8."""
    target.store(source.load(begin, I32), at)


@array_intrinsic
def stream_line(builder: IRBuilder, target: Array, at: Value, source: Array, begin: Value) -> None:
    """Copy LINE bytes from source[begin:] to target[at:] with a store that bypasses the cache.

    The address of target[at] must be a multiple of LINE.
    """
    store = target.store(source.load(begin, ir.VectorType(I8, LINE)), at, align=LINE)
    store.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


@array_intrinsic
def prefetch(builder: IRBuilder, source: Array, begin: Value) -> None:
    """Prefetch the cache line of source[begin] into the outer cache. `begin` can be out of bounds."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, outer, data = I32(0), I32(1), I32(1)
    builder.call(function, [source.address(begin, I8), read, outer, data])


@array_intrinsic
def mirror_pixels(builder: IRBuilder, target: Array, at: Value, source: Array, begin: Value) -> None:
    """Copy PIXELS pixels of three bytes from source[begin:] to target[at:], with the pixels in reverse order."""
    lanes = [3 * (PIXELS - 1 - lane // 3) + lane % 3 for lane in range(3 * PIXELS)]
    target.store(shuffle(builder, source.load(begin, _BLOCK), None, lanes), at)


@array_intrinsic
def split_pixels(
    builder: IRBuilder, red: Array, green: Array, blue: Array, at: Value, source: Array, begin: Value
) -> None:
    """Split PIXELS pixels of source[begin:] into red[at:], green[at:] and blue[at:]. All arrays are uint8."""
    pixels = source.load(begin, _BLOCK)
    for channel, plane in enumerate((red, green, blue)):
        plane.store(shuffle(builder, pixels, None, range(channel, 3 * PIXELS, 3)), at)


@array_intrinsic
def join_pixels(
    builder: IRBuilder, target: Array, at: Value, red: Array, green: Array, blue: Array, begin: Value
) -> None:
    """Interleave red[begin:], green[begin:] and blue[begin:] into PIXELS pixels of target[at:], all uint8."""
    reds, greens, blues = (plane.load(begin, _PLANE) for plane in (red, green, blue))
    first = shuffle(builder, reds, greens, range(2 * PIXELS))
    second = shuffle(builder, blues, blues, range(2 * PIXELS))
    order = [PIXELS * (lane % 3) + lane // 3 for lane in range(3 * PIXELS)]
    target.store(shuffle(builder, first, second, order), at)
