"""Phase 2 (intra-block), backward. x is the partial sum after delta, p = sigmoid(logit - inter_lse), h the merge.

    dh = d_out, or through out = RMSNorm(h) * w_o        z = p (1-p) <dh, x - inter_out>        g = r * z
    d_inter_out = (1-p) dh        d_inter_lse = -z        d_x = p dh + g (scale * u - (r logit / D) x)  (+ d_new_partial)
    du = scale * sum_tokens g x        d_w_o = sum_tokens d_out * h_hat

A fixed number of persistent programs take tokens in turn and keep du and d_w_o in registers: 5 E bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_ref import config
from triton_ref.device.rows import (
    load_key,
    load_row,
    load_scale,
    rms_norm_backward,
    sigmoid,
    unit_of,
)
from triton_ref.query_grad import vector_grad


@triton.jit(do_not_specialize=["T"])
def phase2_bwd_kernel(
    p_d_out,  # [T, D]
    p_d_new_partial,  # [T, D] or None
    d_new_partial_stride,
    p_partial,  # [T, D]
    partial_stride,
    p_partial_scale,  # [T] or None
    partial_scale_stride,
    p_query,  # [D]
    p_key_weight,  # [D] or None
    p_inter_out,  # [T, D]
    inter_out_stride,
    p_inter_scale,  # [T] or None
    inter_scale_stride,
    p_inter_lse,  # [T]
    p_output_weight,  # [D] or None
    p_logit,  # [T]
    p_rstd,  # [T]
    p_d_partial,  # [T, D]
    p_d_inter_out,  # [T, D]
    p_d_inter_lse,  # [T]
    p_du,  # [programs, D]
    p_d_output_weight,  # [programs, D] or None
    T,
    output_eps,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_u = scale * load_key(p_query, p_key_weight, o_d, D)
    b_du = tl.zeros([BLOCK_D], tl.float32)
    b_d_output_weight = tl.zeros([BLOCK_D], tl.float32)

    for t in range(program, T, tl.num_programs(0)):
        x_scale = load_scale(p_partial_scale, t * partial_scale_stride)
        inter_scale = load_scale(p_inter_scale, t * inter_scale_stride)
        b_x = load_row(p_partial + t * partial_stride, o_d, D) * x_scale
        b_inter = load_row(p_inter_out + t * inter_out_stride, o_d, D) * inter_scale
        b_dh = load_row(p_d_out + t * D, o_d, D)
        logit = tl.load(p_logit + t)
        rstd = tl.load(p_rstd + t)
        inter_lse = tl.load(p_inter_lse + t)
        p = sigmoid(logit - inter_lse)
        # 1 - p would be 0 for a strong x.
        rest = sigmoid(inter_lse - logit)

        if p_output_weight is not None:
            b_h = b_inter + p * (b_x - b_inter)
            unit = unit_of(tl.maximum(x_scale, inter_scale))
            b_dh, b_share = rms_norm_backward(b_dh, b_h, p_output_weight, output_eps, o_d, D, unit)
            b_d_output_weight += b_share

        z = p * rest * tl.sum(b_dh * (b_x - b_inter), axis=0)
        g = rstd * z
        # Not rstd^2: fp32 has no square of a large row's.
        b_dx = p * b_dh + g * (b_u - (rstd * logit / D) * b_x)
        if p_d_new_partial is not None:
            b_dx += load_row(p_d_new_partial + t * d_new_partial_stride, o_d, D)
        b_du += g * b_x
        tl.store(p_d_partial + t * D + o_d, b_dx, mask=m_d)
        tl.store(p_d_inter_out + t * D + o_d, rest * b_dh, mask=m_d)
        tl.store(p_d_inter_lse + t, -z)

    tl.store(p_du + program * D + o_d, scale * b_du, mask=m_d)
    if p_d_output_weight is not None:
        tl.store(p_d_output_weight + program * D + o_d, b_d_output_weight, mask=m_d)


def phase2_bwd(
    d_out: torch.Tensor,
    d_new_partial: torch.Tensor | None,
    partial: torch.Tensor,
    query: torch.Tensor,
    key_weight: torch.Tensor | None,
    inter_out: torch.Tensor,
    inter_lse: torch.Tensor,
    output_weight: torch.Tensor | None,
    eps: float,
    output_eps: float,
    scale: float,
    logit: torch.Tensor,
    rstd: torch.Tensor,
    d_partial: torch.Tensor,
    d_inter_out: torch.Tensor,
    d_inter_lse: torch.Tensor,
    d_query: torch.Tensor,
    d_key_weight: torch.Tensor | None,
    d_output_weight: torch.Tensor | None,
    *,
    partial_scale: torch.Tensor | None = None,
    inter_scale: torch.Tensor | None = None,
) -> None:
    """Fill d_partial, d_inter_out [T, D], d_inter_lse [T], d_query [D], and d_key_weight, d_output_weight [D] if given.

    eps went into rstd in the forward. d_new_partial may be d_partial itself: a row is read before it is written.
    """
    num_tokens, hidden_size = d_out.shape
    block = config.row_config(hidden_size, light=output_weight is None)
    programs = config.num_programs(num_tokens, hidden_size)
    du = torch.empty(programs, hidden_size, dtype=torch.float32, device=d_out.device)
    d_output_weights = None if d_output_weight is None else torch.empty_like(du)
    phase2_bwd_kernel[(programs,)](
        p_d_out=d_out,
        p_d_new_partial=d_new_partial,
        d_new_partial_stride=0 if d_new_partial is None else d_new_partial.stride(0),
        p_partial=partial,
        partial_stride=partial.stride(0),
        p_partial_scale=partial_scale,
        partial_scale_stride=0 if partial_scale is None else partial_scale.stride(0),
        p_query=query,
        p_key_weight=key_weight,
        p_inter_out=inter_out,
        inter_out_stride=inter_out.stride(0),
        p_inter_scale=inter_scale,
        inter_scale_stride=0 if inter_scale is None else inter_scale.stride(0),
        p_inter_lse=inter_lse,
        p_output_weight=output_weight,
        p_logit=logit,
        p_rstd=rstd,
        p_d_partial=d_partial,
        p_d_inter_out=d_inter_out,
        p_d_inter_lse=d_inter_lse,
        p_du=du,
        p_d_output_weight=d_output_weights,
        T=num_tokens,
        output_eps=output_eps,
        scale=scale,
        D=hidden_size,
        BLOCK_D=block.block_d,
        num_warps=block.num_warps,
        maxnreg=block.maxnreg,
    )
    vector_grad(du, query, key_weight, d_query, d_key_weight)
    if d_output_weight is not None and d_output_weights is not None:
        vector_grad(d_output_weights, None, None, d_output_weight, None)
