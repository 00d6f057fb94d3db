"""The few instructions that `kernels` needs and Numba does not emit on its own: wide moves, a shuffle, four lanes.

Each is LLVM IR, so it compiles for any processor; none checks a bound.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes of a cache line
PIXELS = 16  # that `mirror_pixels` moves at once

_I8, _I32, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
_FOUR = ir.VectorType(_FLOAT, 4)
_HALVES = ir.Constant(_FOUR, [0.5] * 4)
_INDEX = types.intp


def _address(context: Any, builder: Any, signature: Any, args: Any, array: int, offset: Any, kind: ir.Type) -> Any:
    """A pointer of `kind` to an element of the array argument number `array`."""
    data = context.make_array(signature.args[array])(context, builder, args[array]).data
    return builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())


@intrinsic
def copy_bytes(typing: Any, target: Any, at: Any, source: Any, begin: Any, count: Any) -> Any:
    """target[at : at + count] = source[begin : begin + count] for flat uint8 arrays."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        to = _address(context, builder, signature, args, 0, args[1], _I8)
        cgutils.raw_memcpy(builder, to, _address(context, builder, signature, args, 2, args[3], _I8), args[4], 1)

    return types.void(target, _INDEX, source, _INDEX, _INDEX), generate


@intrinsic
def stream_line(typing: Any, target: Any, at: Any, source: Any, begin: Any) -> Any:
    """One cache line from source[begin:] to target[at:], whose address is a multiple of LINE, past the cache."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        line = ir.VectorType(_I8, LINE)
        value = builder.load(_address(context, builder, signature, args, 2, args[3], line), align=1)
        store = builder.store(value, _address(context, builder, signature, args, 0, args[1], line), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))

    return types.void(target, _INDEX, source, _INDEX), generate


@intrinsic
def prefetch(typing: Any, source: Any, begin: Any) -> Any:
    """Ask for the cache line of source[begin], into the outer cache; any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        pointer = _address(context, builder, signature, args, 0, args[1], _I8)
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, outer, data = _I32(0), _I32(1), _I32(1)
        builder.call(function, [pointer, read, outer, data])

    return types.void(source, _INDEX), generate


@intrinsic
def mirror_pixels(typing: Any, target: Any, at: Any, source: Any, begin: Any) -> Any:
    """PIXELS pixels of three bytes from source[begin:] to target[at:], the last one first."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        block = ir.VectorType(_I8, 3 * PIXELS)
        lanes = [3 * (PIXELS - 1 - lane // 3) + lane % 3 for lane in range(3 * PIXELS)]
        order = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
        value = builder.load(_address(context, builder, signature, args, 2, args[3], block), align=1)
        mirrored = builder.shuffle_vector(value, ir.Constant(block, ir.Undefined), order)
        builder.store(mirrored, _address(context, builder, signature, args, 0, args[1], block), align=1)

    return types.void(target, _INDEX, source, _INDEX), generate


def _four(builder: Any, pointer: Any, weight: Any) -> Any:
    """Four floats times one."""
    undefined = ir.Constant(_FOUR, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_I32, 4), [0] * 4)
    lanes = builder.shuffle_vector(builder.insert_element(undefined, weight, _I32(0)), undefined, zeros)
    return builder.fmul(builder.load(pointer, align=4), lanes)


def _to_levels(builder: Any, total: Any) -> Any:
    return builder.trunc(builder.fptosi(total, ir.VectorType(_I32, 4)), ir.VectorType(_I8, 4))


@intrinsic
def mix_pixels(typing: Any, target: Any, at: Any, line: Any, begin: Any, weights: Any, first: Any, taps: Any) -> Any:
    """target[at : at + 3] = round(sum over k < taps of weights[first + k] * line[begin + 3 * k :][:3]), within 0..255.

    target: uint8, line and weights: float32, all flat. Four lanes: line is read one float past the last pixel, and
    target[at + 3] is overwritten.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        def limited(value: Any, limit: float, comparison: str) -> Any:
            bound = ir.Constant(_FOUR, [limit] * 4)
            return builder.select(builder.fcmp_ordered(comparison, value, bound), value, bound)

        total = cgutils.alloca_once_value(builder, _HALVES)
        with cgutils.for_range(builder, args[6]) as loop:
            tap = builder.add(args[5], loop.index)
            weight = builder.load(_address(context, builder, signature, args, 4, tap, _FLOAT), align=4)
            at_tap = builder.add(args[3], builder.mul(loop.index, loop.index.type(3)))
            product = _four(builder, _address(context, builder, signature, args, 2, at_tap, _FOUR), weight)
            builder.store(builder.fadd(builder.load(total), product), total)
        levels = _to_levels(builder, limited(limited(builder.load(total), 0.0, ">"), 255.0, "<"))
        builder.store(levels, _address(context, builder, signature, args, 0, args[1], levels.type), align=1)

    return types.void(target, _INDEX, line, _INDEX, weights, _INDEX, _INDEX), generate


def _mix_of(taps: int) -> Any:
    @intrinsic
    def mix(typing: Any, target: Any, at: Any, line: Any, begin: Any, weights: Any, first: Any) -> Any:
        """`mix_pixels` of a fixed number of taps with weights from 0 to 1 that sum up to 1."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
            total = _HALVES
            for k in range(taps):
                tap = builder.add(args[5], args[5].type(k))
                weight = builder.load(_address(context, builder, signature, args, 4, tap, _FLOAT), align=4)
                at_tap = builder.add(args[3], args[3].type(3 * k))
                product = _four(builder, _address(context, builder, signature, args, 2, at_tap, _FOUR), weight)
                total = builder.fadd(total, product)
            levels = _to_levels(builder, total)
            builder.store(levels, _address(context, builder, signature, args, 0, args[1], levels.type), align=1)

        return types.void(target, _INDEX, line, _INDEX, weights, _INDEX), generate

    return mix


mix_two_pixels, mix_three_pixels = _mix_of(2), _mix_of(3)
