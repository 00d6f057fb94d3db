"""Intrinsics for byte operations that Numba does not generate by itself: wide moves, shuffles and prefetches.

The intrinsics are written in LLVM IR, so they compile for any CPU. They do not check bounds, and arrays are flat.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes per cache line
PIXELS = 16  # pixels moved at once by `mirror_pixels`, `split_pixels` and `join_pixels`

_I8, _I32 = ir.IntType(8), ir.IntType(32)
_INDEX = types.intp


def address(
    context: Any, builder: ir.IRBuilder, signature: Any, args: Any, array: int, offset: Any, kind: ir.Type
) -> Any:
    """Return a pointer to element `offset` of the array args[array], cast to a pointer to `kind`."""
    data = context.make_array(signature.args[array])(context, builder, args[array]).data
    return builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())


@intrinsic
def copy_bytes(typing: Any, target: Any, at: Any, source: Any, begin: Any, count: Any) -> Any:
    """Copy source[begin : begin + count] to target[at : at + count]. Both arrays are uint8."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        to = address(context, builder, signature, args, 0, args[1], _I8)
        cgutils.raw_memcpy(builder, to, address(context, builder, signature, args, 2, args[3], _I8), args[4], 1)

    return types.void(target, _INDEX, source, _INDEX, _INDEX), generate


@intrinsic
def copy_four(typing: Any, target: Any, at: Any, source: Any, begin: Any) -> Any:
    """Copy four bytes, a pixel and the byte after it, from source[begin:] to target[at:]. Both arrays are uint8."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        value = builder.load(address(context, builder, signature, args, 2, args[3], _I32), align=1)
        builder.store(value, address(context, builder, signature, args, 0, args[1], _I32), align=1)

    return types.void(target, _INDEX, source, _INDEX), generate


@intrinsic
def stream_line(typing: Any, target: Any, at: Any, source: Any, begin: Any) -> Any:
    """Copy LINE bytes from source[begin:] to target[at:] with a store that bypasses the cache.

    The address of target[at] must be a multiple of LINE.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        line = ir.VectorType(_I8, LINE)
        value = builder.load(address(context, builder, signature, args, 2, args[3], line), align=1)
        store = builder.store(value, address(context, builder, signature, args, 0, args[1], line), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))

    return types.void(target, _INDEX, source, _INDEX), generate


@intrinsic
def prefetch(typing: Any, source: Any, begin: Any) -> Any:
    """Prefetch the cache line of source[begin] into the outer cache. `begin` can be out of bounds."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        pointer = address(context, builder, signature, args, 0, args[1], _I8)
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, outer, data = _I32(0), _I32(1), _I32(1)
        builder.call(function, [pointer, read, outer, data])

    return types.void(source, _INDEX), generate


@intrinsic
def mirror_pixels(typing: Any, target: Any, at: Any, source: Any, begin: Any) -> Any:
    """Copy PIXELS pixels of three bytes from source[begin:] to target[at:], with the pixels in reverse order."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        block = ir.VectorType(_I8, 3 * PIXELS)
        lanes = [3 * (PIXELS - 1 - lane // 3) + lane % 3 for lane in range(3 * PIXELS)]
        order = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
        value = builder.load(address(context, builder, signature, args, 2, args[3], block), align=1)
        mirrored = builder.shuffle_vector(value, ir.Constant(block, ir.Undefined), order)
        builder.store(mirrored, address(context, builder, signature, args, 0, args[1], block), align=1)

    return types.void(target, _INDEX, source, _INDEX), generate


@intrinsic
def split_pixels(typing: Any, red: Any, green: Any, blue: Any, at: Any, source: Any, begin: Any) -> Any:
    """Split PIXELS pixels of source[begin:] into red[at:], green[at:] and blue[at:]. All arrays are uint8."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        block, plane = ir.VectorType(_I8, 3 * PIXELS), ir.VectorType(_I8, PIXELS)
        value = builder.load(address(context, builder, signature, args, 4, args[5], block), align=1)
        for channel in range(3):
            lanes = ir.Constant(ir.VectorType(_I32, PIXELS), [3 * pixel + channel for pixel in range(PIXELS)])
            levels = builder.shuffle_vector(value, ir.Constant(block, ir.Undefined), lanes)
            builder.store(levels, address(context, builder, signature, args, channel, args[3], plane), align=1)

    return types.void(red, green, blue, _INDEX, source, _INDEX), generate


@intrinsic
def join_pixels(typing: Any, target: Any, at: Any, red: Any, green: Any, blue: Any, begin: Any) -> Any:
    """Interleave red[begin:], green[begin:] and blue[begin:] into PIXELS pixels of target[at:], all uint8."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        block, plane = ir.VectorType(_I8, 3 * PIXELS), ir.VectorType(_I8, PIXELS)
        planes = [
            builder.load(address(context, builder, signature, args, 2 + channel, args[5], plane), align=1)
            for channel in range(3)
        ]
        in_a_row = ir.Constant(ir.VectorType(_I32, 2 * PIXELS), list(range(2 * PIXELS)))
        first = builder.shuffle_vector(planes[0], planes[1], in_a_row)
        second = builder.shuffle_vector(planes[2], planes[2], in_a_row)
        order = [PIXELS * (lane % 3) + lane // 3 for lane in range(3 * PIXELS)]
        value = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(order)), order))
        builder.store(value, address(context, builder, signature, args, 0, args[1], block), align=1)

    return types.void(target, _INDEX, red, green, blue, _INDEX), generate
