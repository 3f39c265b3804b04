"""Scales of scaled fp16, by integer arithmetic on fp32 bits, as triton_ref/device/rounding.py has them."""

from cutlass import Float32, Int32


def inverse(scale: Float32) -> Float32:
    """1 / scale of a power of two, exactly."""
    return (Int32(254 << 23) - scale.bitcast(Int32)).bitcast(Float32)
