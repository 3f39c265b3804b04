"""Direct mix, backward.

    dm = d_out, or through out = RMSNorm(m) * w_o        p_i = exp(logit_i - lse)
    a_i = <dm, v_i>        h_i = p_i (a_i - sum_k p_k a_k)        g_i = r_i * h_i
    d_v_i = p_i dm + g_i (scale * u - (r_i logit_i / D) v_i)
    du = scale * sum_tokens sum_i g_i v_i        d_w_o = sum_tokens d_out * m_hat

A fixed number of persistent programs take tokens in turn and keep du and d_w_o in registers. The sources are read once
from device memory, (2L+1) E bytes with the d_v; the second pass over a token's rows finds them in cache (as does the
third, when the norm's input m was not kept).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from triton_ref import config
from triton_ref.device.rows import (
    element,
    load_key,
    load_row,
    rms_norm_backward,
    row_of,
    scale_of,
    unit_of,
)
from triton_ref.query_grad import vector_grad


@triton.jit(do_not_specialize=["T", "num_sources"])
def mix_bwd_kernel(
    p_d_out,  # [T, D]
    p_sources,  # L x [T, D]
    source_strides,  # L row strides
    p_scales,  # L x [T] or None
    scale_strides,  # L strides or None
    p_query,  # [D]
    p_key_weight,  # [D] or None
    p_output_weight,  # [D] or None
    p_mixed,  # [T, D] fp32 or None
    p_logits,  # [L, T]
    p_rstd,  # [L, T]
    p_lse,  # [T]
    p_d_sources,  # L x [T, D]
    d_source_strides,  # L row strides
    p_du,  # [programs, D]
    p_d_output_weight,  # [programs, D] or None
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
    program = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_l = tl.arange(0, BLOCK_L)
    m_d = o_d < D
    m_l = o_l < L
    b_u = scale * load_key(p_query, p_key_weight, o_d, D)
    b_du = tl.zeros([BLOCK_D], tl.float32)
    b_d_output_weight = tl.zeros([BLOCK_D], tl.float32)

    for t in range(program, T, tl.num_programs(0)):
        o_lt = o_l.to(tl.int64) * T + t
        b_logits = tl.load(p_logits + o_lt, mask=m_l, other=float("-inf"))
        b_rstd = tl.load(p_rstd + o_lt, mask=m_l, other=0.0)
        b_p = tl.exp(b_logits - tl.load(p_lse + t))
        b_logits = tl.where(m_l, b_logits, 0.0)

        b_d_mix = load_row(p_d_out + t * D, o_d, D)
        if p_output_weight is not None:
            if p_mixed is not None:
                b_mix = load_row(p_mixed + t * D, o_d, D)
            else:
                b_mix = tl.zeros([BLOCK_D], tl.float32)
                for i in range(num_sources):
                    b_v = load_row(row_of(p_sources, source_strides, i, t, L), o_d, D)
                    b_mix += element(b_p, o_l, i) * b_v * scale_of(p_scales, scale_strides, i, t, L)
            unit = unit_of(scale_of(p_scales, scale_strides, 0, t, L))
            for i in range(num_sources):
                unit = tl.maximum(unit, scale_of(p_scales, scale_strides, i, t, L))
            b_d_mix, b_share = rms_norm_backward(b_d_mix, b_mix, p_output_weight, output_eps, o_d, D, unit)
            b_d_output_weight += b_share

        b_a = tl.zeros([BLOCK_L], tl.float32)
        b_next = load_row(row_of(p_sources, source_strides, 0, t, L), o_d, D)
        for i in range(num_sources):
            b_v = b_next * scale_of(p_scales, scale_strides, i, t, L)
            b_next = load_row(row_of(p_sources, source_strides, tl.minimum(i + 1, num_sources - 1), t, L), o_d, D)
            b_a = tl.where(o_l == i, tl.sum(b_d_mix * b_v, axis=0), b_a)

        b_h = b_p * (b_a - tl.sum(b_p * b_a, axis=0))
        b_g = b_rstd * b_h
        # Not rstd^2: fp32 has no square of a large row's.
        b_pull = b_rstd * b_logits / D

        for i in range(num_sources):
            b_v = load_row(row_of(p_sources, source_strides, i, t, L), o_d, D)
            b_v *= scale_of(p_scales, scale_strides, i, t, L)
            g = element(b_g, o_l, i)
            b_d_v = element(b_p, o_l, i) * b_d_mix + g * (b_u - element(b_pull, o_l, i) * b_v)
            tl.store(row_of(p_d_sources, d_source_strides, i, t, L) + o_d, b_d_v, mask=m_d)
            b_du += g * b_v

    tl.store(p_du + program * D + o_d, scale * b_du, mask=m_d)
    if p_d_output_weight is not None:
        tl.store(p_d_output_weight + program * D + o_d, b_d_output_weight, mask=m_d)


def mix_bwd(
    d_out: torch.Tensor,
    sources: list[torch.Tensor],
    query: torch.Tensor,
    key_weight: torch.Tensor | None,
    output_weight: torch.Tensor | None,
    eps: float,
    output_eps: float,
    scale: float,
    mixed: torch.Tensor | None,
    logits: torch.Tensor,
    rstd: torch.Tensor,
    lse: torch.Tensor,
    d_sources: list[torch.Tensor],
    d_query: torch.Tensor,
    d_key_weight: torch.Tensor | None,
    d_output_weight: torch.Tensor | None,
    *,
    source_scales: Sequence[torch.Tensor] | None = None,
) -> None:
    """Fill d_sources L x [T, D], d_query [D] and whichever of d_key_weight, d_output_weight [D] are given."""
    num_tokens, hidden_size = d_out.shape
    block = config.row_config(hidden_size, light=output_weight is None)
    programs = config.num_programs(num_tokens, hidden_size)
    du = torch.empty(programs, hidden_size, dtype=torch.float32, device=d_out.device)
    d_output_weights = None if d_output_weight is None else torch.empty_like(du)
    mix_bwd_kernel[(programs,)](
        p_d_out=d_out,
        p_sources=tuple(sources),
        source_strides=tuple(v.stride(0) for v in sources),
        p_scales=None if source_scales is None else tuple(source_scales),
        scale_strides=None if source_scales is None else tuple(s.stride(0) for s in source_scales),
        p_query=query,
        p_key_weight=key_weight,
        p_output_weight=output_weight,
        p_mixed=mixed,
        p_logits=logits,
        p_rstd=rstd,
        p_lse=lse,
        p_d_sources=tuple(d_sources),
        d_source_strides=tuple(d_v.stride(0) for d_v in d_sources),
        p_du=du,
        p_d_output_weight=d_output_weights,
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
    vector_grad(du, query, key_weight, d_query, d_key_weight)
    if d_output_weight is not None and d_output_weights is not None:
        vector_grad(d_output_weights, None, None, d_output_weight, None)
