"""Intrinsics for float32 that Numba does not generate by itself: vector lanes and fused multiply-adds.

The intrinsics are written in LLVM IR, so they compile for any CPU. They do not check bounds, and arrays are flat.
Products and sums are fused (rounded once) only by explicit calls, never by the compiler, so results are identical on
every CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from llvmlite.ir import IRBuilder, Value
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from pipelines.cpu.byte_intrinsics import I8, I32, Array, array_intrinsic, shuffle

LANES = 32  # values that `blur_down` and `blur_across` compute at once

_FLOAT = ir.FloatType()
_FOUR, _MANY = ir.VectorType(_FLOAT, 4), ir.VectorType(_FLOAT, LANES)
_HALVES = ir.Constant(_FOUR, [0.5] * 4)


@intrinsic
def fused(
    typing: object, first: types.Type, second: types.Type, added: types.Type
) -> tuple[Signature, Callable[..., Value]]:
    """Return first * second + added in float32, rounded once. This is one instruction on CPUs with FMA."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, signature, values: builder.fma(*values)


@array_intrinsic
def mix_pixels(
    builder: IRBuilder, target: Array, at: Value, line: Array, begin: Value, weights: Array, first: Value, taps: Value
) -> None:
    """Filter one pixel, and round and clamp the result to 0..255.

    target[at : at + 3] = sum over k < taps of weights[first + k] * line[begin + 3 * k :][:3].
    `target` is uint8; `line` and `weights` are float32. The intrinsic uses vectors of four lanes, so it reads one float
    past the last filtered pixel and also overwrites target[at + 3].
    """

    def limited(value: Value, limit: float, comparison: str) -> Value:
        bound = ir.Constant(_FOUR, [limit] * 4)
        return builder.select(builder.fcmp_ordered(comparison, value, bound), value, bound)

    total = cgutils.alloca_once_value(builder, _HALVES)
    with cgutils.for_range(builder, taps) as loop:
        weight = weights.load(builder.add(first, loop.index), _FLOAT)
        pixel = line.load(builder.add(begin, builder.mul(loop.index, loop.index.type(3))), _FOUR)
        builder.store(builder.fadd(builder.load(total), builder.fmul(pixel, _splat(builder, weight, 4))), total)
    levels = builder.fptosi(limited(limited(builder.load(total), 0.0, ">"), 255.0, "<"), ir.VectorType(I32, 4))
    target.store(builder.trunc(levels, ir.VectorType(I8, 4)), at)


def _rounded(builder: IRBuilder, values: Value) -> Value:
    """Round floats between 0 and 255 to uint8, with ties to even.

    The sum of such a float and 2 ** 23 has no fractional bits, so the addition rounds. The low byte is the result.
    """
    count = values.type.count
    moved = builder.fadd(values, ir.Constant(values.type, [2.0**23] * count))
    return builder.trunc(builder.bitcast(moved, ir.VectorType(I32, count)), ir.VectorType(I8, count))


def _widened(builder: IRBuilder, levels: Value, kind: ir.Type) -> Value:
    return builder.zext(levels, ir.VectorType(kind, levels.type.count))


def _fused(builder: IRBuilder, first: Value, second: Value, added: Value) -> Value:
    """Return first * second + added for vectors of floats, rounded once."""
    kind = first.type
    function = ir.FunctionType(kind, [kind] * 3)
    name = f"llvm.fma.v{kind.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [first, second, added])


def _splat(builder: IRBuilder, value: Value, count: int) -> Value:
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, I32(0)), None, [0] * count)


@array_intrinsic
def mix_four_pixels(
    builder: IRBuilder, target: Array, at: Value, source: Array, upper: Value, lower: Value, across: Value, down: Value
) -> None:
    """Bilinearly interpolate a 2 x 2 block of pixels of `source` and write the rounded result to target[at : at + 3].

    Vectors have four lanes, so this also overwrites target[at + 3] and reads one byte past each right pixel.

    Args:
        builder: LLVM IR builder.
        target, source: uint8.
        at: Byte offset of the pixel to write.
        upper: Byte offset of the upper left pixel; the upper right pixel follows.
        lower: Byte offset of the lower left pixel; the lower right pixel follows.
        across: Weight of the right pixels, float32, 0 to 1.
        down: Weight of the lower pixels, float32, 0 to 1.
    """

    def pixel(at: Value) -> Value:
        return builder.uitofp(_widened(builder, source.load(at, ir.VectorType(I8, 4)), I32), _FOUR)

    def between(first: Value, second: Value, share: Value) -> Value:
        return _fused(builder, builder.fsub(second, first), share, first)

    right, below = _splat(builder, across, 4), _splat(builder, down, 4)
    top, bottom = (between(pixel(left), pixel(builder.add(left, left.type(3))), right) for left in (upper, lower))
    target.store(_rounded(builder, between(top, bottom, below)), at)


def _symmetric(builder: IRBuilder, weights: Array, value: Value, pair: Callable[[Value], Value], reach: Value) -> Value:
    """Apply a symmetric filter to vectors of LANES floats.

    Args:
        builder: LLVM IR builder.
        weights: float32, filter weight at each distance in taps.
        value: Value at the center.
        pair: Function that returns the sum of the two values at a given distance in taps.
        reach: Maximum distance.

    Returns:
        weights[0] * value + sum over k from 1 to reach of weights[k] * pair(k).
    """

    def weight(tap: Value) -> Value:
        return _splat(builder, weights.load(tap, _FLOAT), LANES)

    total = cgutils.alloca_once_value(builder, builder.fmul(value, weight(reach.type(0))))
    with cgutils.for_range(builder, reach) as loop:
        tap = builder.add(loop.index, loop.index.type(1))
        builder.store(_fused(builder, pair(tap), weight(tap), builder.load(total)), total)
    return builder.load(total)


@array_intrinsic
def blur_down(
    builder: IRBuilder, line: Array, at: Value, source: Array, begin: Value, stride: Value, weights: Array, reach: Value
) -> None:
    """Filter LANES values vertically with a symmetric filter.

    line[at + i] = sum over k from -reach to reach of weights[abs(k)] * source[begin + k * stride + i] for i < LANES.
    `line` and `weights` are float32; `source` is uint8.
    """

    def levels(at: Value) -> Value:
        return _widened(builder, source.load(at, ir.VectorType(I8, LANES)), ir.IntType(16))

    def to_floats(levels: Value) -> Value:
        return builder.sitofp(_widened(builder, levels, I32), _MANY)

    def pair(tap: Value) -> Value:
        away = builder.mul(tap, stride)
        return to_floats(builder.add(levels(builder.sub(begin, away)), levels(builder.add(begin, away))))

    line.store(_symmetric(builder, weights, to_floats(levels(begin)), pair, reach), at)


@array_intrinsic
def blur_across(
    builder: IRBuilder, target: Array, at: Value, line: Array, begin: Value, weights: Array, reach: Value
) -> None:
    """Filter LANES values horizontally with a symmetric filter.

    target[at + i] = sum over k from -reach to reach of weights[abs(k)] * line[begin + 3 * k + i] for i < LANES.
    `target` is uint8, and sums are rounded; `line` and `weights` are float32.
    """

    def pair(tap: Value) -> Value:
        away = builder.mul(tap, tap.type(3))
        before, after = builder.sub(begin, away), builder.add(begin, away)
        return builder.fadd(line.load(before, _MANY), line.load(after, _MANY))

    target.store(_rounded(builder, _symmetric(builder, weights, line.load(begin, _MANY), pair, reach)), at)
