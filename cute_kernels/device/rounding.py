"""Scales of scaled fp16 and stochastic rounding, by integer arithmetic on fp32 bits, so that every backend finds the same.

    stored values = x / scale        scale = 2^(e - 14) of a row whose largest finite magnitude is in [2^e, 2^(e+1))

The random bits of element d of row r are the upper half of a d + b, modulo 2^32: a and b are the first words of Philox-4x32-10,
key seed, counter (r, r >> 32, stream, 0).
"""

from typing import NamedTuple

from cutlass import BFloat16, Float32, Int32, Int64, Numeric

from cute_kernels.device.mma import Pair, pack, ptx, select, zip_pairs

# streams
PHASE_1_OUT = 0
PARTIAL_SUM = 1
D_SOURCES = 2
ROUNDS = 10
INFINITE_BITS = 0x7F800000


def magnitude_bits(x: Float32) -> Int32:
    return x.bitcast(Int32) & 0x7FFFFFFF


def finite_magnitude(x: Float32) -> Float32:
    """|x|; 0 for infinity and NaN, which play no part in a row's scale."""
    bits = magnitude_bits(x)
    return select(bits < INFINITE_BITS, bits, Int32(0)).bitcast(Float32)


def scale_from(peak: Float32) -> Float32:
    """The scale of a row from its largest finite magnitude; 1 for a row of zeros."""
    bits = peak.bitcast(Int32)
    exponent = (bits >> 23) - 14
    exponent = select(bits == 0, Int32(127), select(exponent < 1, Int32(1), exponent))
    return (exponent << 23).bitcast(Float32)


def inverse(scale: Float32) -> Float32:
    """1 / scale of a power of two, exactly."""
    return (Int32(254 << 23) - scale.bitcast(Int32)).bitcast(Float32)


def signed(word: int) -> int:
    """The Int32 of a uint32's bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def multiply(x: Int32, factor: int) -> tuple[Int32, Int32]:
    """Upper and lower half of the product of two uint32."""
    (high,) = ptx("mul.hi.u32 $0,$1,$2;", [Int32], [x, Int32(signed(factor))], effects=False)
    return high, x * Int32(signed(factor))


class RowBits(NamedTuple):
    """Random bits of a row from some column on: column d's are the upper ones of step * d + first."""

    step: Int32
    first: Int32

    def after(self, columns: Int32 | int) -> "RowBits":
        return RowBits(self.step, self.first + self.step * Int32(columns))


def row_bits(seed: Int64, row: Int32, stream: int) -> RowBits:
    """Those of a row from its first column on."""
    key = [Int32(seed & 0xFFFFFFFF), Int32(seed >> 32)]
    c0, c1, c2, c3 = Int32(row), Int32(0), Int32(stream), Int32(0)
    for i in range(ROUNDS):
        high0, low0 = multiply(c0, 0xD2511F53)
        high2, low2 = multiply(c2, 0xCD9E8D57)
        k0, k1 = key[0] + Int32(signed(i * 0x9E3779B9)), key[1] + Int32(signed(i * 0xBB67AE85))
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
    return RowBits(c0, c1)


def upper_bits(word: Int32, count: int) -> Int32:
    return ptx(f"shr.u32 $0,$1,{32 - count};", [Int32], [word], effects=False)[0]


def add_toward_zero(a: Float32, b: Float32) -> Float32:
    return ptx("add.rz.f32 $0,$1,$2;", [Float32], [a, b], effects=False)[0]


def stochastic(values: list[Float32], dtype: type[Numeric], bits: RowBits, guard: bool = True) -> list[Pair]:
    """Neighbouring columns, the first that of `bits`, as pairs of neighbours in bf16 or fp16."""
    drawn, word = [], bits.first
    for x in values:
        drawn.append(neighbour(x, word, dtype, guard))
        word = word + bits.step
    return [neighbours_pair(dtype, *drawn[i : i + 2]) for i in range(0, len(drawn), 2)]


def stochastic_pair(values: list[Float32], words: list[Int32], dtype: type[Numeric]) -> Pair:
    """Two numbers, each with a word whose upper bits are its random ones, as neighbours in bf16 or fp16."""
    return neighbours_pair(dtype, *[neighbour(x, word, dtype) for x, word in zip(values, words, strict=True)])


def neighbour(x: Float32, word: Int32, dtype: type[Numeric], guard: bool = True) -> Int32 | Float32:
    """The one away from zero as likely as the discarded bits say. Without guard, NaN only stays NaN where all bits are zero."""
    return stochastic_bf16(x, word, guard) if dtype is BFloat16 else stochastic_fp16(x, word, guard)


def neighbours_pair(dtype: type[Numeric], first: Int32 | Float32, second: Int32 | Float32) -> Pair:
    return zip_pairs(first, second, 1) if dtype is BFloat16 else pack(dtype, first, second)


def increased(x: Float32, random: Int32, guard: bool) -> Int32:
    """The bits of a number whose magnitude grows by random ones. NaN overflows: arithmetic makes it the largest integer."""
    bits = x.bitcast(Int32)
    total = bits + random
    return select(total < bits, bits, total) if guard else total


def stochastic_bf16(x: Float32, word: Int32, guard: bool) -> Int32:
    """In the upper half."""
    return increased(x, upper_bits(word, 16), guard)


def stochastic_fp16(x: Float32, word: Int32, guard: bool) -> Float32:
    sign = x.bitcast(Int32) & Int32(-(1 << 31))
    # Beside 2^-14, a subnormal number of fp16 has the same bits to discard as others, but for those below 2^-37.
    beside = select(magnitude_bits(x) < 113 << 23, sign | (113 << 23), Int32(0)).bitcast(Float32)
    rounded = (increased(add_toward_zero(x, beside), upper_bits(word, 13), guard) & -0x2000).bitcast(Float32)
    return ((rounded - beside).bitcast(Int32) | sign).bitcast(Float32)
