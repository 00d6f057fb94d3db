"""Intrinsics for float32 that Numba does not generate by itself: vector lanes and fused multiply-adds.

The intrinsics are written in LLVM IR, so they compile for any CPU. They do not check bounds, and arrays are flat.
Products and sums are fused (rounded once) only by explicit calls, never by the compiler, so results are identical on
every CPU.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipelines.cpu.byte_intrinsics import address

LANES = 32  # values that `blur_down` and `blur_across` compute at once

_I8, _I32, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
_FOUR = ir.VectorType(_FLOAT, 4)
_HALVES = ir.Constant(_FOUR, [0.5] * 4)
_INDEX = types.intp


def _four(builder: ir.IRBuilder, pointer: Any, weight: Any) -> Any:
    """Return the four floats at `pointer`, each multiplied by `weight`."""
    undefined = ir.Constant(_FOUR, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_I32, 4), [0] * 4)
    lanes = builder.shuffle_vector(builder.insert_element(undefined, weight, _I32(0)), undefined, zeros)
    return builder.fmul(builder.load(pointer, align=4), lanes)


def _to_levels(builder: ir.IRBuilder, total: Any) -> Any:
    return builder.trunc(builder.fptosi(total, ir.VectorType(_I32, 4)), ir.VectorType(_I8, 4))


@intrinsic
def mix_pixels(typing: Any, target: Any, at: Any, line: Any, begin: Any, weights: Any, first: Any, taps: Any) -> Any:
    """Filter one pixel, and round and clamp the result to 0..255.

    target[at : at + 3] = sum over k < taps of weights[first + k] * line[begin + 3 * k :][:3].
    `target` is uint8; `line` and `weights` are float32. The intrinsic uses vectors of four lanes, so it reads one float
    past the last filtered pixel and also overwrites target[at + 3].
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        def limited(value: Any, limit: float, comparison: str) -> Any:
            bound = ir.Constant(_FOUR, [limit] * 4)
            return builder.select(builder.fcmp_ordered(comparison, value, bound), value, bound)

        total = cgutils.alloca_once_value(builder, _HALVES)
        with cgutils.for_range(builder, args[6]) as loop:
            tap = builder.add(args[5], loop.index)
            weight = builder.load(address(context, builder, signature, args, 4, tap, _FLOAT), align=4)
            at_tap = builder.add(args[3], builder.mul(loop.index, loop.index.type(3)))
            product = _four(builder, address(context, builder, signature, args, 2, at_tap, _FOUR), weight)
            builder.store(builder.fadd(builder.load(total), product), total)
        levels = _to_levels(builder, limited(limited(builder.load(total), 0.0, ">"), 255.0, "<"))
        builder.store(levels, address(context, builder, signature, args, 0, args[1], levels.type), align=1)

    return types.void(target, _INDEX, line, _INDEX, weights, _INDEX, _INDEX), generate


def _mix_of(taps: int) -> Any:
    @intrinsic
    def mix(typing: Any, target: Any, at: Any, line: Any, begin: Any, weights: Any, first: Any) -> Any:
        """Filter one pixel like `mix_pixels`, but with a fixed number of taps and without clamping.

        The weights must be between 0 and 1 and sum to 1.
        """

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
            total = _HALVES
            for k in range(taps):
                tap = builder.add(args[5], args[5].type(k))
                weight = builder.load(address(context, builder, signature, args, 4, tap, _FLOAT), align=4)
                at_tap = builder.add(args[3], args[3].type(3 * k))
                product = _four(builder, address(context, builder, signature, args, 2, at_tap, _FOUR), weight)
                total = builder.fadd(total, product)
            levels = _to_levels(builder, total)
            builder.store(levels, address(context, builder, signature, args, 0, args[1], levels.type), align=1)

        return types.void(target, _INDEX, line, _INDEX, weights, _INDEX), generate

    return mix


mix_two_pixels, mix_three_pixels = _mix_of(2), _mix_of(3)


@intrinsic
def fused(typing: Any, first: Any, second: Any, added: Any) -> Any:
    """Return first * second + added in float32, rounded once. This is one instruction on CPUs with FMA."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


def _widened(builder: ir.IRBuilder, levels: Any, kind: Any) -> Any:
    return builder.zext(levels, ir.VectorType(kind, levels.type.count))


def _fused(builder: ir.IRBuilder, first: Any, second: Any, added: Any) -> Any:
    """Return first * second + added for vectors of floats, rounded once."""
    kind = first.type
    function = ir.FunctionType(kind, [kind] * 3)
    name = f"llvm.fma.v{kind.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [first, second, added])


def _splat(builder: ir.IRBuilder, value: Any, count: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _I32(0)), undefined, zeros)


def _rounded(builder: ir.IRBuilder, values: Any) -> Any:
    """Round floats between 0 and 255 to uint8, with ties to even.

    The sum of such a float and 2 ** 23 has no fractional bits, so the addition rounds. The low byte is the result.
    """
    count = values.type.count
    moved = builder.fadd(values, ir.Constant(values.type, [2.0**23] * count))
    return builder.trunc(builder.bitcast(moved, ir.VectorType(_I32, count)), ir.VectorType(_I8, count))


@intrinsic
def mix_four_pixels(
    typing: Any, target: Any, at: Any, source: Any, upper: Any, lower: Any, right_share: Any, lower_share: Any
) -> Any:
    """Bilinearly interpolate a 2 x 2 block of pixels of `source` and write the rounded result to target[at : at + 3].

    Vectors have four lanes, so this also overwrites target[at + 3] and reads one byte past each right pixel.

    Args:
        target, source: uint8.
        at: Byte offset of the pixel to write.
        upper: Byte offset of the upper left pixel; the upper right pixel follows.
        lower: Byte offset of the lower left pixel; the lower right pixel follows.
        right_share: Weight of the right pixels, float32, 0 to 1.
        lower_share: Weight of the lower pixels, float32, 0 to 1.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        four = ir.VectorType(_I8, 4)

        def pixel(at: Any) -> Any:
            levels = builder.load(address(context, builder, signature, args, 2, at, four), align=1)
            return builder.uitofp(_widened(builder, levels, _I32), _FOUR)

        def between(first: Any, second: Any, share: Any) -> Any:
            return _fused(builder, builder.fsub(second, first), share, first)

        right, below = _splat(builder, args[5], 4), _splat(builder, args[6], 4)
        three = args[3].type(3)
        top = between(pixel(args[3]), pixel(builder.add(args[3], three)), right)
        bottom = between(pixel(args[4]), pixel(builder.add(args[4], three)), right)
        levels = _rounded(builder, between(top, bottom, below))
        builder.store(levels, address(context, builder, signature, args, 0, args[1], four), align=1)

    share = types.float32
    return types.void(target, _INDEX, source, _INDEX, _INDEX, share, share), generate


def _symmetric(builder: ir.IRBuilder, weight: Any, value: Any, pair: Any, reach: Any) -> Any:
    """Apply a symmetric filter to vectors of LANES floats.

    Args:
        builder: LLVM IR builder.
        weight: Function that returns the filter weight at a given distance in taps.
        value: Value at the center.
        pair: Function that returns the sum of the two values at a given distance in taps.
        reach: Maximum distance.

    Returns:
        weight(0) * value + sum over k from 1 to reach of weight(k) * pair(k).
    """
    total = cgutils.alloca_once_value(builder, builder.fmul(value, _splat(builder, weight(reach.type(0)), LANES)))
    with cgutils.for_range(builder, reach) as loop:
        tap = builder.add(loop.index, loop.index.type(1))
        builder.store(_fused(builder, pair(tap), _splat(builder, weight(tap), LANES), builder.load(total)), total)
    return builder.load(total)


@intrinsic
def blur_down(typing: Any, line: Any, at: Any, source: Any, begin: Any, stride: Any, weights: Any, reach: Any) -> Any:
    """Filter LANES values vertically with a symmetric filter.

    line[at + i] = sum over k from -reach to reach of weights[abs(k)] * source[begin + k * stride + i] for i < LANES.
    `line` and `weights` are float32; `source` is uint8.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        bytes_, floats = ir.VectorType(_I8, LANES), ir.VectorType(_FLOAT, LANES)

        def weight(tap: Any) -> Any:
            return builder.load(address(context, builder, signature, args, 5, tap, _FLOAT), align=4)

        def levels(at: Any) -> Any:
            return builder.load(address(context, builder, signature, args, 2, at, bytes_), align=1)

        def pair(tap: Any) -> Any:
            away = builder.mul(tap, args[4])
            before = _widened(builder, levels(builder.sub(args[3], away)), ir.IntType(16))
            after = _widened(builder, levels(builder.add(args[3], away)), ir.IntType(16))
            return builder.sitofp(_widened(builder, builder.add(before, after), _I32), floats)

        middle = builder.sitofp(_widened(builder, levels(args[3]), _I32), floats)
        total = _symmetric(builder, weight, middle, pair, args[6])
        builder.store(total, address(context, builder, signature, args, 0, args[1], floats), align=4)

    return types.void(line, _INDEX, source, _INDEX, _INDEX, weights, _INDEX), generate


@intrinsic
def blur_across(typing: Any, target: Any, at: Any, line: Any, begin: Any, weights: Any, reach: Any) -> Any:
    """Filter LANES values horizontally with a symmetric filter.

    target[at + i] = sum over k from -reach to reach of weights[abs(k)] * line[begin + 3 * k + i] for i < LANES.
    `target` is uint8, and sums are rounded; `line` and `weights` are float32.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        floats = ir.VectorType(_FLOAT, LANES)

        def weight(tap: Any) -> Any:
            return builder.load(address(context, builder, signature, args, 4, tap, _FLOAT), align=4)

        def values(at: Any) -> Any:
            return builder.load(address(context, builder, signature, args, 2, at, floats), align=4)

        def pair(tap: Any) -> Any:
            away = builder.mul(tap, tap.type(3))
            return builder.fadd(values(builder.sub(args[3], away)), values(builder.add(args[3], away)))

        levels = _rounded(builder, _symmetric(builder, weight, values(args[3]), pair, args[5]))
        builder.store(levels, address(context, builder, signature, args, 0, args[1], levels.type), align=1)

    return types.void(target, _INDEX, line, _INDEX, weights, _INDEX), generate
