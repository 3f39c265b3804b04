"""Stochastic rounding of stored sums: up or down at random, each as likely as the number is near, so that the mean is exact.

`stochastic_seed=` of phase_1 (its output, and the blocks' gradient), phase_2 (the new partial sum) and attn_res_step (the
prefix). This module is its definition; every backend gives the same bits for the same float32 values.

**Random bits.** Element d of row r has the 16 bits

    h = ((a d + b) mod 2^32) >> 16

where a and b are the first two words of Philox-4x32-10 with key (seed mod 2^32, seed >> 32) and counter (r mod 2^32, r >> 32,
stream, 0). r counts rows of the whole tensor: t for tokens [T, D], s T + t for phase 1's [S, T, D], n T + t for the gradients
of N blocks. `stream` tells tensors apart. So bits depend on nothing but seed, tensor and element, and a new seed is needed for
every call that is to round independently.

Rows are as independent as Philox makes them. Within a row this is multiply-shift hashing (Dietzfelbinger, 1996): over random
a and b every element's bits are uniform, and those of any two elements independent, in rows of up to 2^17 elements. Rounding
errors of a row thus have mean zero and no correlation, which is all that the mean and the variance of a sum of them ask for;
three or more elements are not independent. It costs a kernel one multiplication or addition an element, where Philox for every
eight elements took as many instructions as all the rest of phase 1 (bench/NOTES.md).

**Rounding**, of the magnitude; the sign stays. Finite x, float32 bits b:

- bfloat16: (b + h) with its lower 16 bits cleared. Subnormal numbers are rounded like all others.
- float16, |x| >= 2^-14: (b + (h >> 3)) with its lower 13 bits cleared.
- float16, |x| < 2^-14: (floor(|x| 2^37) + (h >> 3)) >> 13 multiples of 2^-24, the spacing of float16's subnormal numbers. What
  of x is finer than 2^-37 does not count.
- scaled fp16: x / scale as float16.

A number that the target has stays as it is. The result is one of the two neighbours of x, the one away from zero with the
probability that the discarded bits make; beyond the largest finite number that neighbour is infinity (and from the next
power of two on the only one). Infinity and NaN stay so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnres import scaled

# streams
PHASE_1_OUT = 0
PARTIAL_SUM = 1  # of phase 2 and of the serving step: training and serving round alike
D_SOURCES = 2

MAX_SEED = 2**63 - 1


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., 2011): four words for four words, all of them uint32 held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        # The product of two uint32 wraps as an int64; its bits are those of the uint64.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & 0xFFFFFFFF) ^ c1 ^ k0, p1 & 0xFFFFFFFF
        c2, c3 = (p0 >> 32 & 0xFFFFFFFF) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_bits(seed: int, stream: int, first_row: int, num_rows: int, size: int, device: torch.device) -> Tensor:
    """The 16 bits of each element of rows first_row, first_row + 1, ...: int32 [num_rows, size]."""
    row = torch.arange(first_row, first_row + num_rows, device=device)[:, None]
    counter = row & 0xFFFFFFFF, row >> 32, torch.full_like(row, stream), torch.zeros_like(row)
    step, start, _, _ = philox(seed, counter)  # [num_rows, 1]
    words = step * torch.arange(size, device=device) + start
    return (words >> 16 & 0xFFFF).to(torch.int32)


def stochastic(rows: Tensor, dtype: torch.dtype, seed: int, stream: int, first_row: int = 0) -> Tensor:
    """float32 [T, D] rounded to bfloat16 or float16."""
    bits = random_bits(seed, stream, first_row, rows.shape[0], rows.shape[1], rows.device)
    magnitude = rows.contiguous().view(torch.int32) & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = ((magnitude + bits) & ~0xFFFF).view(torch.float32)
    else:
        bits >>= 3
        rounded = ((magnitude + bits) & ~0x1FFF).view(torch.float32)
        size = rows.abs()
        small = size < 2.0**-14
        steps = (torch.where(small, size, 0) * 2.0**37).to(torch.int32)
        rounded = torch.where(small, ((steps + bits) >> 13) * 2.0**-24, rounded)
    return torch.where(rows.isfinite(), rounded.copysign(rows), rows).to(dtype)


def store(
    target: Tensor,
    rows: Tensor,
    scale: Tensor | None = None,
    seed: int | None = None,
    stream: int = 0,
    first_row: int = 0,
    bound: Tensor | None = None,
) -> None:
    """float32 rows [T, D] into target [T, D]: as scaled fp16 where `scale` [T] is given, stochastically where `seed` is.

    The scale is filled here: that of the row's largest magnitude, or of a `bound` [T] of it.
    """
    if scale is not None:
        scale.copy_(scaled.row_scale(rows) if bound is None else scaled.scale_of(bound))
        rows = rows * scaled.inverse(scale).unsqueeze(-1)
    target.copy_(rows if seed is None else stochastic(rows, target.dtype, seed, stream, first_row))
