"""The few instructions that the kernels need and Numba does not emit on its own: wide moves, a shuffle, lanes of floats.

Each is LLVM IR, so it compiles for any processor; none checks a bound.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes of a cache line
PIXELS = 16  # that `mirror_pixels`, `split_pixels` and `join_pixels` move at once
LANES = 32  # values that `blur_down` and `blur_across` work out at once

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


@intrinsic
def split_pixels(typing: Any, red: Any, green: Any, blue: Any, at: Any, source: Any, begin: Any) -> Any:
    """The channels of PIXELS pixels from source[begin:] to red[at:], green[at:] and blue[at:]; all uint8, flat."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        block, plane = ir.VectorType(_I8, 3 * PIXELS), ir.VectorType(_I8, PIXELS)
        value = builder.load(_address(context, builder, signature, args, 4, args[5], block), align=1)
        for channel in range(3):
            lanes = ir.Constant(ir.VectorType(_I32, PIXELS), [3 * pixel + channel for pixel in range(PIXELS)])
            levels = builder.shuffle_vector(value, ir.Constant(block, ir.Undefined), lanes)
            builder.store(levels, _address(context, builder, signature, args, channel, args[3], plane), align=1)

    return types.void(red, green, blue, _INDEX, source, _INDEX), generate


@intrinsic
def join_pixels(typing: Any, target: Any, at: Any, red: Any, green: Any, blue: Any, begin: Any) -> Any:
    """PIXELS pixels to target[at:] from their channels red[begin:], green[begin:] and blue[begin:]; all uint8, flat."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        block, plane = ir.VectorType(_I8, 3 * PIXELS), ir.VectorType(_I8, PIXELS)
        planes = [
            builder.load(_address(context, builder, signature, args, 2 + channel, args[5], plane), align=1)
            for channel in range(3)
        ]
        in_a_row = ir.Constant(ir.VectorType(_I32, 2 * PIXELS), list(range(2 * PIXELS)))
        first = builder.shuffle_vector(planes[0], planes[1], in_a_row)
        second = builder.shuffle_vector(planes[2], planes[2], in_a_row)
        order = [PIXELS * (lane % 3) + lane // 3 for lane in range(3 * PIXELS)]
        value = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(order)), order))
        builder.store(value, _address(context, builder, signature, args, 0, args[1], block), align=1)

    return types.void(target, _INDEX, red, green, blue, _INDEX), generate


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


@intrinsic
def fused(typing: Any, first: Any, second: Any, added: Any) -> Any:
    """first * second + added in float32, rounded once; one instruction where the processor has it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def copy_four(typing: Any, target: Any, at: Any, source: Any, begin: Any) -> Any:
    """target[at : at + 4] = source[begin : begin + 4] for flat uint8 arrays: a pixel and one byte."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        value = builder.load(_address(context, builder, signature, args, 2, args[3], _I32), align=1)
        builder.store(value, _address(context, builder, signature, args, 0, args[1], _I32), align=1)

    return types.void(target, _INDEX, source, _INDEX), generate


def _widened(builder: Any, levels: Any, kind: Any) -> Any:
    return builder.zext(levels, ir.VectorType(kind, levels.type.count))


def _fused(builder: Any, first: Any, second: Any, added: Any) -> Any:
    """first * second + added for vectors of floats, rounded once."""
    kind = first.type
    function = ir.FunctionType(kind, [kind] * 3)
    name = f"llvm.fma.v{kind.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [first, second, added])


def _splat(builder: Any, value: Any, count: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _I32(0)), undefined, zeros)


def _rounded(builder: Any, values: Any) -> Any:
    """Floats from 0 to 255 as uint8, halves to even: beside 2 ** 23 nothing but a whole number has room."""
    count = values.type.count
    moved = builder.fadd(values, ir.Constant(values.type, [2.0**23] * count))
    return builder.trunc(builder.bitcast(moved, ir.VectorType(_I32, count)), ir.VectorType(_I8, count))


@intrinsic
def mix_four_pixels(
    typing: Any, target: Any, at: Any, source: Any, upper: Any, lower: Any, right_share: Any, lower_share: Any
) -> Any:
    """target[at : at + 3] = the mean of the pixels at upper, upper + 3, lower and lower + 3 of source, weighted.

    target, source: uint8, flat; shares: float32 from 0 to 1. target[at + 3] is overwritten.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        four = ir.VectorType(_I8, 4)

        def pixel(at: Any) -> Any:
            levels = builder.load(_address(context, builder, signature, args, 2, at, four), align=1)
            return builder.uitofp(_widened(builder, levels, _I32), _FOUR)

        def between(first: Any, second: Any, share: Any) -> Any:
            return _fused(builder, builder.fsub(second, first), share, first)

        right, below = _splat(builder, args[5], 4), _splat(builder, args[6], 4)
        three = args[3].type(3)
        top = between(pixel(args[3]), pixel(builder.add(args[3], three)), right)
        bottom = between(pixel(args[4]), pixel(builder.add(args[4], three)), right)
        levels = _rounded(builder, between(top, bottom, below))
        builder.store(levels, _address(context, builder, signature, args, 0, args[1], four), align=1)

    share = types.float32
    return types.void(target, _INDEX, source, _INDEX, _INDEX, share, share), generate


def _symmetric(builder: Any, weight: Any, value: Any, pair: Any, reach: Any) -> Any:
    """weight(0) * value + sum over k from 1 to reach of weight(k) * pair(k), for vectors of LANES floats."""
    total = cgutils.alloca_once_value(builder, builder.fmul(value, _splat(builder, weight(reach.type(0)), LANES)))
    with cgutils.for_range(builder, reach) as loop:
        tap = builder.add(loop.index, loop.index.type(1))
        builder.store(_fused(builder, pair(tap), _splat(builder, weight(tap), LANES), builder.load(total)), total)
    return builder.load(total)


@intrinsic
def blur_down(typing: Any, line: Any, at: Any, source: Any, begin: Any, stride: Any, weights: Any, reach: Any) -> Any:
    """line[at + i] = sum over k from -reach to reach of weights[abs(k)] * source[begin + k * stride + i], i < LANES.

    line, weights: float32; source: uint8.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        bytes_, floats = ir.VectorType(_I8, LANES), ir.VectorType(_FLOAT, LANES)

        def weight(tap: Any) -> Any:
            return builder.load(_address(context, builder, signature, args, 5, tap, _FLOAT), align=4)

        def levels(at: Any) -> Any:
            return builder.load(_address(context, builder, signature, args, 2, at, bytes_), align=1)

        def pair(tap: Any) -> Any:
            away = builder.mul(tap, args[4])
            before = _widened(builder, levels(builder.sub(args[3], away)), ir.IntType(16))
            after = _widened(builder, levels(builder.add(args[3], away)), ir.IntType(16))
            return builder.sitofp(_widened(builder, builder.add(before, after), _I32), floats)

        middle = builder.sitofp(_widened(builder, levels(args[3]), _I32), floats)
        total = _symmetric(builder, weight, middle, pair, args[6])
        builder.store(total, _address(context, builder, signature, args, 0, args[1], floats), align=4)

    return types.void(line, _INDEX, source, _INDEX, _INDEX, weights, _INDEX), generate


@intrinsic
def blur_across(typing: Any, target: Any, at: Any, line: Any, begin: Any, weights: Any, reach: Any) -> Any:
    """target[at + i] = sum over k from -reach to reach of weights[abs(k)] * line[begin + 3 * k + i], i < LANES, rounded.

    target: uint8; line, weights: float32.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        floats = ir.VectorType(_FLOAT, LANES)

        def weight(tap: Any) -> Any:
            return builder.load(_address(context, builder, signature, args, 4, tap, _FLOAT), align=4)

        def values(at: Any) -> Any:
            return builder.load(_address(context, builder, signature, args, 2, at, floats), align=4)

        def pair(tap: Any) -> Any:
            away = builder.mul(tap, tap.type(3))
            return builder.fadd(values(builder.sub(args[3], away)), values(builder.add(args[3], away)))

        levels = _rounded(builder, _symmetric(builder, weight, values(args[3]), pair, args[5]))
        builder.store(levels, _address(context, builder, signature, args, 0, args[1], levels.type), align=1)

    return types.void(target, _INDEX, line, _INDEX, weights, _INDEX), generate
