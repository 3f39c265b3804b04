"""Serving site, in place and without gradient: the residual add, the optional block write, the mix and the output norm.

    x = prefix + delta, rounded to the storage dtype and written back; blocks[:, block_write_idx] = x if that is >= 0
    out = mix of blocks[:, :num_blocks] and x (scale 1), then optionally RMSNorm(.) * output_weight

One program a token; every row is read once: (num_blocks + 4) E bytes with delta, one E more for a block write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_ref import config
from triton_ref.device.rows import (
    key_logit,
    load_key,
    load_row,
    load_scale,
    merge,
    rms_norm,
    store_row,
    store_sum,
    unit_of,
)


@triton.jit(do_not_specialize=["num_blocks", "block_write_idx", "seed"])
def serve_step_kernel(
    p_prefix,  # [T, D]
    prefix_stride,
    p_prefix_scale,  # [T] or None
    prefix_scale_stride,
    p_delta,  # [T, D] or None
    delta_stride,
    p_blocks,  # [T, B, D]
    blocks_stride_t,
    blocks_stride_b,
    p_blocks_scale,  # [T, B] or None
    blocks_scale_stride_t,
    blocks_scale_stride_b,
    p_query,  # [D]
    p_key_weight,  # [D] or None
    p_output_weight,  # [D] or None
    p_out,  # [T, D]
    num_blocks,
    block_write_idx,
    seed,  # or None: round to nearest
    eps,
    output_eps,
    WRITE_BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_prefix_row = p_prefix + t * prefix_stride
    p_blocks_row = p_blocks + t * blocks_stride_t
    b_u = load_key(p_query, p_key_weight, o_d, D)

    p_next = p_blocks_row
    b_next = tl.zeros([BLOCK_D], tl.float32)
    if num_blocks > 0:
        b_next = load_row(p_next, o_d, D)
    o_prefix_scale = t * prefix_scale_stride
    x_scale = load_scale(p_prefix_scale, o_prefix_scale)
    b_x = load_row(p_prefix_row, o_d, D) * x_scale
    if p_delta is not None:
        b_x += load_row(p_delta + t * delta_stride, o_d, D)
        b_x, x_scale = store_sum(p_prefix_row, p_prefix_scale, o_prefix_scale, b_x, o_d, m_d, seed, t)
    if WRITE_BLOCK:
        o_write = tl.cast(block_write_idx, tl.int64)
        if p_blocks_scale is not None:
            tl.store(p_blocks_scale + t * blocks_scale_stride_t + o_write * blocks_scale_stride_b, x_scale)
        store_row(p_blocks_row + o_write * blocks_stride_b, b_x, o_d, m_d, x_scale)

    unit = unit_of(x_scale)
    _, peak = key_logit(b_x, b_u, eps, 1.0, D, unit)
    b_mix = b_x
    total = 1.0
    for i in range(num_blocks):
        o_scale = t * blocks_scale_stride_t + tl.cast(i, tl.int64) * blocks_scale_stride_b
        row_scale = load_scale(p_blocks_scale, o_scale)
        unit = tl.maximum(unit, row_scale)
        b_v = b_next * row_scale
        p_next = tl.where(i + 1 < num_blocks, p_next + blocks_stride_b, p_next)
        b_next = load_row(p_next, o_d, D)
        _, logit = key_logit(b_v, b_u, eps, 1.0, D, unit_of(row_scale))
        b_mix, total, peak = merge(b_mix, total, peak, b_v, logit)

    b_mix = b_mix / total
    if p_output_weight is not None:
        b_mix = rms_norm(b_mix, p_output_weight, output_eps, o_d, D, unit)
    tl.store(p_out + t * D + o_d, b_mix, mask=m_d)


def serve_step(
    prefix: torch.Tensor,
    delta: torch.Tensor | None,
    blocks: torch.Tensor,
    query: torch.Tensor,
    key_weight: torch.Tensor | None,
    output_weight: torch.Tensor | None,
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_eps: float,
    out: torch.Tensor,
    *,
    prefix_scale: torch.Tensor | None = None,
    blocks_scale: torch.Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Fill out [T, D]; update prefix [T, D] (if delta is given) and blocks [T, B, D] (if block_write_idx >= 0)."""
    num_tokens, hidden_size = out.shape
    block = config.row_config(hidden_size, light=True)
    serve_step_kernel[(num_tokens,)](
        p_prefix=prefix,
        prefix_stride=prefix.stride(0),
        p_prefix_scale=prefix_scale,
        prefix_scale_stride=0 if prefix_scale is None else prefix_scale.stride(0),
        p_delta=delta,
        delta_stride=0 if delta is None else delta.stride(0),
        p_blocks=blocks,
        blocks_stride_t=blocks.stride(0),
        blocks_stride_b=blocks.stride(1),
        p_blocks_scale=blocks_scale,
        blocks_scale_stride_t=0 if blocks_scale is None else blocks_scale.stride(0),
        blocks_scale_stride_b=0 if blocks_scale is None else blocks_scale.stride(1),
        p_query=query,
        p_key_weight=key_weight,
        p_output_weight=output_weight,
        p_out=out,
        num_blocks=num_blocks,
        block_write_idx=block_write_idx,
        seed=seed,
        eps=eps,
        output_eps=output_eps,
        WRITE_BLOCK=block_write_idx >= 0,
        D=hidden_size,
        BLOCK_D=block.block_d,
        num_warps=block.num_warps,
        maxnreg=block.maxnreg,
    )
