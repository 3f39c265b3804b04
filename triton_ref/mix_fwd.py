"""Direct mix, forward: out = sum_i p_i v_i over L sources, then optionally RMSNorm(.) * output_weight.

    r_i = (mean(v_i^2) + eps)^(-1/2)        logit_i = scale * r_i * <q*w, v_i>
    p = softmax(logit)                      lse = log sum_i exp(logit_i)

One program a token; an online softmax over the sources reads each of them once: (L+1) E bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from triton_ref import config
from triton_ref.device.rows import (
    key_logit,
    load_key,
    load_row,
    merge,
    rms_norm,
    row_of,
    scale_of,
    unit_of,
)


@triton.jit(do_not_specialize=["T", "num_sources"])
def mix_fwd_kernel(
    p_sources,  # L x [T, D]
    source_strides,  # L row strides
    p_scales,  # L x [T] or None
    scale_strides,  # L strides or None
    p_query,  # [D]
    p_key_weight,  # [D] or None
    p_output_weight,  # [D] or None
    p_out,  # [T, D]
    p_mixed,  # [T, D] fp32 or None
    p_logits,  # [L, T] or None
    p_rstd,  # [L, T] or None
    p_lse,  # [T] or None
    p_weights,  # [L, T] or None
    T,
    num_sources,
    eps,
    output_eps,
    scale,
    L: tl.constexpr,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_l = tl.arange(0, BLOCK_L)
    m_d = o_d < D
    b_u = load_key(p_query, p_key_weight, o_d, D)

    b_logits = tl.zeros([BLOCK_L], tl.float32)
    b_rstd = tl.zeros([BLOCK_L], tl.float32)
    b_mix = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    peak = float("-inf")
    unit = unit_of(scale_of(p_scales, scale_strides, 0, t, L))
    b_next = load_row(row_of(p_sources, source_strides, 0, t, L), o_d, D)
    for i in range(num_sources):
        row_scale = scale_of(p_scales, scale_strides, i, t, L)
        unit = tl.maximum(unit, row_scale)
        b_v = b_next * row_scale
        # The next source is on its way while this one is reduced: loads do not move across a reduction's barrier.
        b_next = load_row(row_of(p_sources, source_strides, tl.minimum(i + 1, num_sources - 1), t, L), o_d, D)
        rstd, logit = key_logit(b_v, b_u, eps, scale, D, unit_of(row_scale))
        b_rstd = tl.where(o_l == i, rstd, b_rstd)
        b_logits = tl.where(o_l == i, logit, b_logits)
        b_mix, total, peak = merge(b_mix, total, peak, b_v, logit)

    b_mix = b_mix / total
    lse = peak + tl.log(total)
    if p_mixed is not None:
        tl.store(p_mixed + t * D + o_d, b_mix, mask=m_d)
    if p_output_weight is not None:
        b_mix = rms_norm(b_mix, p_output_weight, output_eps, o_d, D, unit)
    tl.store(p_out + t * D + o_d, b_mix, mask=m_d)

    o_lt = o_l.to(tl.int64) * T + t
    m_l = o_l < L
    if p_logits is not None:
        tl.store(p_logits + o_lt, b_logits, mask=m_l)
    if p_rstd is not None:
        tl.store(p_rstd + o_lt, b_rstd, mask=m_l)
    if p_lse is not None:
        tl.store(p_lse + t, lse)
    if p_weights is not None:
        tl.store(p_weights + o_lt, tl.exp(b_logits - lse), mask=m_l)


def mix_fwd(
    sources: list[torch.Tensor],
    query: torch.Tensor,
    key_weight: torch.Tensor | None,
    output_weight: torch.Tensor | None,
    eps: float,
    output_eps: float,
    scale: float,
    out: torch.Tensor,
    mixed: torch.Tensor | None,
    logits: torch.Tensor | None,
    rstd: torch.Tensor | None,
    lse: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    source_scales: Sequence[torch.Tensor] | None = None,
) -> None:
    """Fill out [T, D] and whichever of mixed [T, D], logits, rstd, weights [L, T], lse [T] are given."""
    num_tokens, hidden_size = out.shape
    block = config.row_config(hidden_size, light=True)
    mix_fwd_kernel[(num_tokens,)](
        p_sources=tuple(sources),
        source_strides=tuple(v.stride(0) for v in sources),
        p_scales=None if source_scales is None else tuple(source_scales),
        scale_strides=None if source_scales is None else tuple(s.stride(0) for s in source_scales),
        p_query=query,
        p_key_weight=key_weight,
        p_output_weight=output_weight,
        p_out=out,
        p_mixed=mixed,
        p_logits=logits,
        p_rstd=rstd,
        p_lse=lse,
        p_weights=weights,
        T=num_tokens,
        num_sources=len(sources),
        eps=eps,
        output_eps=output_eps,
        scale=scale,
        L=len(sources),
        D=hidden_size,
        BLOCK_L=config.next_power_of_2(len(sources)),
        BLOCK_D=block.block_d,
        num_warps=block.num_warps,
        maxnreg=block.maxnreg,
    )
