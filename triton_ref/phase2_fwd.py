"""Phase 2 (intra-block), forward: merge the block's partial sum into phase 1's normalized output.

    x = partial (+ delta, rounded to the new sum's storage)        p = sigmoid(logit(x) - inter_lse)
    h = inter_out + p * (x - inter_out)        out = h, or RMSNorm(h) * output_weight

One program a token, everything read once: 3 E bytes, 5 E with delta and the new partial sum.
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
    rms_norm,
    sigmoid,
    store_sum,
    unit_of,
)


@triton.jit(do_not_specialize=["seed"])
def phase2_fwd_kernel(
    p_partial,  # [T, D]
    partial_stride,
    p_partial_scale,  # [T] or None
    partial_scale_stride,
    p_delta,  # [T, D] or None
    delta_stride,
    p_query,  # [D]
    p_key_weight,  # [D] or None
    p_inter_out,  # [T, D]
    inter_out_stride,
    p_inter_scale,  # [T] or None
    inter_scale_stride,
    p_inter_lse,  # [T]
    p_output_weight,  # [D] or None
    p_out,  # [T, D]
    p_new_partial,  # [T, D]; None without delta
    p_new_scale,  # [T] or None
    p_logit,  # [T] or None
    p_rstd,  # [T] or None
    seed,  # or None: round to nearest
    eps,
    output_eps,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    x_scale = load_scale(p_partial_scale, t * partial_scale_stride)
    inter_scale = load_scale(p_inter_scale, t * inter_scale_stride)
    b_x = load_row(p_partial + t * partial_stride, o_d, D) * x_scale
    b_inter = load_row(p_inter_out + t * inter_out_stride, o_d, D) * inter_scale
    inter_lse = tl.load(p_inter_lse + t)
    if p_delta is not None:
        b_x += load_row(p_delta + t * delta_stride, o_d, D)
        b_x, x_scale = store_sum(p_new_partial + t * D, p_new_scale, t, b_x, o_d, m_d, seed, t)

    b_u = load_key(p_query, p_key_weight, o_d, D)
    rstd, logit = key_logit(b_x, b_u, eps, scale, D, unit_of(x_scale))
    b_h = b_inter + sigmoid(logit - inter_lse) * (b_x - b_inter)
    if p_output_weight is not None:
        b_h = rms_norm(b_h, p_output_weight, output_eps, o_d, D, unit_of(tl.maximum(x_scale, inter_scale)))
    tl.store(p_out + t * D + o_d, b_h, mask=m_d)
    if p_logit is not None:
        tl.store(p_logit + t, logit)
    if p_rstd is not None:
        tl.store(p_rstd + t, rstd)


def phase2_fwd(
    partial: torch.Tensor,
    delta: torch.Tensor | None,
    query: torch.Tensor,
    key_weight: torch.Tensor | None,
    inter_out: torch.Tensor,
    inter_lse: torch.Tensor,
    output_weight: torch.Tensor | None,
    eps: float,
    output_eps: float,
    scale: float,
    out: torch.Tensor,
    new_partial: torch.Tensor | None,
    logit: torch.Tensor | None,
    rstd: torch.Tensor | None,
    *,
    partial_scale: torch.Tensor | None = None,
    inter_scale: torch.Tensor | None = None,
    new_partial_scale: torch.Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Fill out [T, D], new_partial [T, D] (with delta), and whichever of logit, rstd, new_partial_scale [T] are given."""
    num_tokens, hidden_size = out.shape
    block = config.row_config(hidden_size, light=True)
    phase2_fwd_kernel[(num_tokens,)](
        p_partial=partial,
        partial_stride=partial.stride(0),
        p_partial_scale=partial_scale,
        partial_scale_stride=0 if partial_scale is None else partial_scale.stride(0),
        p_delta=delta,
        delta_stride=0 if delta is None else delta.stride(0),
        p_query=query,
        p_key_weight=key_weight,
        p_inter_out=inter_out,
        inter_out_stride=inter_out.stride(0),
        p_inter_scale=inter_scale,
        inter_scale_stride=0 if inter_scale is None else inter_scale.stride(0),
        p_inter_lse=inter_lse,
        p_output_weight=output_weight,
        p_out=out,
        p_new_partial=new_partial,
        p_new_scale=new_partial_scale,
        p_logit=logit,
        p_rstd=rstd,
        seed=seed,
        eps=eps,
        output_eps=output_eps,
        scale=scale,
        D=hidden_size,
        BLOCK_D=block.block_d,
        num_warps=block.num_warps,
        maxnreg=block.maxnreg,
    )
