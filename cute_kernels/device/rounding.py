"""Scales of scaled fp16 and stochastic rounding, by integer arithmetic on fp32 bits, so that every backend finds the same.

    stored values = x / scale        scale = 2^(e - 14) of a row whose largest finite magnitude is in [2^e, 2^(e+1))

The random bits of element d of row r: Philox-4x32-10, key seed, counter (d >> 3, r, r >> 32, stream). A call makes the sixteen
bits of the eight elements of a vector.
"""

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Numeric

from cute_kernels.device.mma import ptx
from cute_kernels.device.rows import select

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


def philox(seed: Int64, eight: Int32, row: Int32, stream: int) -> list[Int32]:
    """Four words for columns 8 * eight to 8 * eight + 7 of a row."""
    key = [Int32(seed & 0xFFFFFFFF), Int32(seed >> 32)]
    c0, c1, c2, c3 = Int32(eight), Int32(row), Int32(0), Int32(stream)
    for i in range(ROUNDS):
        high0, low0 = multiply(c0, 0xD2511F53)
        high2, low2 = multiply(c2, 0xCD9E8D57)
        k0, k1 = key[0] + Int32(signed(i * 0x9E3779B9)), key[1] + Int32(signed(i * 0xBB67AE85))
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]


def transpose_words(words: list[Int32], q: Int32) -> list[Int32]:
    """Word i of lane q of a quad becomes word q of its lane i."""
    for offset in (1, 2):
        upper = (q & offset) != 0
        for i in (0, 3 - offset):
            low, high = words[i], words[i + offset]
            other = cute.arch.shuffle_sync_bfly(select(upper, low, high), offset=offset)
            words[i], words[i + offset] = select(upper, other, low), select(upper, high, other)
    return words


def stochastic(values: list[Float32], dtype: type[Numeric], words: list[Int32]) -> list[Float32]:
    """A vector rounded to neighbours in bf16 or fp16, the one away from zero as likely as the discarded bits say."""
    halves = [half for word in words for half in (word & 0xFFFF, (word >> 16) & 0xFFFF)]
    return [stochastic_element(x, dtype, random) for x, random in zip(values, halves, strict=True)]


def stochastic_element(x: Float32, dtype: type[Numeric], random: Int32) -> Float32:
    bits, magnitude = x.bitcast(Int32), magnitude_bits(x)
    if dtype is BFloat16:
        rounded = (bits + random) & -0x10000  # a carry reaches the sign of NaN alone
    else:
        random = random >> 3
        small = magnitude < 113 << 23
        steps = Int32(select(small, magnitude.bitcast(Float32) * Float32(2.0**37), Float32(0.0)))
        subnormal = Float32((steps + random) >> 13) * Float32(2.0**-24)
        rounded = select(small, subnormal.bitcast(Int32), (magnitude + random) & -0x2000)
        rounded = rounded | (bits & Int32(-(1 << 31)))
    return select(magnitude < INFINITE_BITS, rounded, bits).bitcast(Float32)
