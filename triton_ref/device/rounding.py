"""Scales of scaled fp16 and stochastic rounding, by integer arithmetic on fp32 bits, so that every backend finds the same.

    stored values = x / scale        scale = 2^(e - 14) of a row whose largest finite magnitude is in [2^e, 2^(e+1))

The random bits of element d of row r are the upper half of a d + b, modulo 2^32: a and b are the first words of Philox-4x32-10,
key seed, counter (r, r >> 32, stream, 0).
"""

import triton
import triton.language as tl

# streams
PHASE_1_OUT = tl.constexpr(0)
PARTIAL_SUM = tl.constexpr(1)
D_SOURCES = tl.constexpr(2)


@triton.jit
def peak_bits(b_x, axis: tl.constexpr):
    """The bits of a row's largest finite magnitude: integers in the order of the numbers."""
    b_bits = b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.where(b_bits < 0x7F800000, b_bits, 0), axis=axis)


@triton.jit
def bound_bits(b_bound):
    """As peak_bits, of bounds of rows' magnitudes: those beyond the largest finite number are that; NaN bounds nothing."""
    b_bits = b_bound.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(b_bits > 0x7F800000, 0, tl.minimum(b_bits, 0x7F7FFFFF))


@triton.jit
def scale_from(peak):
    """The scale of a row from peak_bits; 1 for a row of zeros."""
    exponent = tl.where(peak == 0, 127, tl.maximum((peak >> 23) - 14, 1))
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_scale(b_x):
    return scale_from(peak_bits(b_x, 0))


@triton.jit
def inverse(scale):
    """1 / scale, exactly."""
    return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def random_bits(seed, STREAM: tl.constexpr, row, first, SHAPE: tl.constexpr):
    """16 bits for each element of columns first, first + 1, ...: [BLOCK_D] of row `row`, or [BLOCK_S, BLOCK_D] of rows `row`
    [BLOCK_S, 1]."""
    row = row + tl.zeros([1, 1], tl.int64)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    step, start, _, _ = tl.philox(seed, low, high, tl.full(row.shape, STREAM, tl.uint32), tl.zeros_like(low))
    o_d = (first + tl.arange(0, SHAPE[len(SHAPE) - 1])).to(tl.uint32)[None, :]
    return tl.reshape(((step * o_d + start) >> 16).to(tl.int32), SHAPE)


@triton.jit
def stochastic(b_x, dtype: tl.constexpr, seed, STREAM: tl.constexpr, row, first):
    """fp32 -> a neighbour in bf16 or fp16, as fp32: the one away from zero as likely as the discarded bits say."""
    b_random = random_bits(seed, STREAM, row, first, b_x.shape)
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_magnitude = b_bits & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        b_rounded = (b_magnitude + b_random) & -0x10000
    else:
        b_random = b_random >> 3
        b_small = b_magnitude < (113 << 23)
        b_steps = tl.where(b_small, tl.abs(b_x) * 137438953472.0, 0.0).to(tl.int32)  # 2^37
        b_subnormal = ((b_steps + b_random) >> 13).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        b_rounded = tl.where(b_small, b_subnormal.to(tl.int32, bitcast=True), (b_magnitude + b_random) & -0x2000)
    b_rounded = (b_rounded | (b_bits & -0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(b_magnitude < 0x7F800000, b_rounded, b_x)
