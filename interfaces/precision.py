"""Precision at risk: what 16-bit storage would lose of given activations, source by source.

Rounding errors are of a row in units of its RMS, then the RMS over the rows, so that every token counts the same
however large it is. Scaled fp16 (scaled.py) has one power-of-two scale per row: nothing overflows, and only values below
2^-28 of the row's largest become subnormal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnres.scaled import SCALED_FP16, rounded

FP16_LARGEST = torch.finfo(torch.float16).max  # 65504
FP16_SMALLEST_NORMAL = torch.finfo(torch.float16).tiny  # 2^-14: below it mantissa bits are lost
# within this factor of the largest number, a sum of sources is likely to overflow
HEADROOM = 16.0
# fp16 has lost precision to subnormal numbers where it is this much worse than with a scale
SUBNORMAL_LOSS = 1.5


@dataclass(frozen=True)
class SourceRisk:
    """What one source would lose."""

    source: int
    rms: float
    largest: float
    overflow: float  # share of the values above 65504 in magnitude, infinite in fp16 (or rounded down to 65504)
    subnormal: float  # share of the values that are below fp16's normal numbers and not zero
    flushed: float  # share of the values that are not zero and become zero in fp16
    bf16: float  # rounding errors
    fp16: float
    scaled_fp16: float
    level: str  # ok, at risk
    verdict: str


def at_risk(sources: Tensor) -> list[SourceRisk]:
    """One line for each of sources [L, T, D]."""
    return [_source_risk(index, source.double()) for index, source in enumerate(sources)]


def beyond_fp16(sources: Tensor) -> str:
    """Which sources fp16 cannot hold, in words; "" if it holds all."""
    found = [index for index, source in enumerate(sources) if source.abs().max() > FP16_LARGEST]
    return f"source {', '.join(map(str, found))}: values above {FP16_LARGEST:.0f}" if found else ""


def _source_risk(index: int, source: Tensor) -> SourceRisk:
    size, half = source.abs(), source.half().double()
    largest = float(size.max())
    over, below = size > FP16_LARGEST, (size < FP16_SMALLEST_NORMAL) & (size > 0)
    errors = {
        "bf16": _row_error(source.bfloat16().double(), source),
        "fp16": _row_error(half, source),
        "scaled_fp16": _row_error(rounded(source, SCALED_FP16), source),
    }
    level, verdict = _verdict(int(over.sum()), source.numel(), largest, **errors)
    return SourceRisk(
        source=index,
        rms=float(source.square().mean().sqrt()),
        largest=largest,
        overflow=_share(over),
        subnormal=_share(below),
        flushed=_share((half == 0) & (size > 0)),
        **errors,
        level=level,
        verdict=verdict,
    )


def _verdict(
    overflow: int, values: int, largest: float, bf16: float, fp16: float, scaled_fp16: float
) -> tuple[str, str]:
    if overflow:
        return "at risk", (
            f"Overflows fp16: {overflow} of {values} values do not fit, the largest is {largest:.3g}. Store it as bf16, or as "
            f"fp16 with a scale per row{_times(bf16, scaled_fp16)}."
        )
    if fp16 > SUBNORMAL_LOSS * scaled_fp16:
        loss = f"{fp16 / scaled_fp16:.1f} times the error" if scaled_fp16 else "an error"
        than = ", more than bf16" if fp16 > bf16 else ""
        return "at risk", f"Too small for fp16: {loss} that fp16 has with a scale per row{than}."
    if largest * HEADROOM > FP16_LARGEST:
        return "at risk", (
            f"Fits fp16, but its largest value is 1/{FP16_LARGEST / largest:.1f} of fp16's largest: sums over depth may overflow."
        )
    if bf16 == 0:
        return "ok", "Nothing is lost: bf16 and fp16 hold it exactly." if fp16 == 0 else "bf16 holds it exactly."
    return "ok", f"Fits fp16{_times(bf16, fp16)}."


def _times(bf16: float, fp16: float) -> str:
    return f" ({bf16 / fp16:.1f} times as precise as bf16)" if 0 < fp16 < bf16 else ""


def _row_error(rounded: Tensor, exact: Tensor) -> float:
    size = exact.square().sum(-1)
    errors = (rounded - exact).square().sum(-1)[size > 0] / size[size > 0]
    return float(errors.mean().sqrt()) if errors.numel() else 0.0


def _share(chosen: Tensor) -> float:
    return int(chosen.sum()) / chosen.numel()
