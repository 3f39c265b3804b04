"""Phase 1 (inter-block), forward: mix the N finished blocks for all S queries of a block at once.

    r_n = (mean(v_n^2) + eps)^(-1/2)        logit_sn = scale * r_n * <q_s*w_s, v_n>
    p_s = softmax(logit_s)                  out_s = sum_n p_sn v_n        lse_s = log sum_n exp(logit_sn)

One program a token. It first takes whole rows, a few queries at a time, to the softmax weights p (fp32 [T, N, S], the
only scratch); then tiles of D, all queries at once, to the mixes. The sources come from device memory once and from
cache after that: (N+S) E bytes. Where out is scaled fp16, a row's scale is that of sum_n p_sn max|v_n|, a bound of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from triton_ref import config
from triton_ref.device.rounding import PHASE_1_OUT, bound_bits, peak_bits, scale_from
from triton_ref.device.rows import inverse_rms, load_keys, load_row, load_scale, row_of, scale_of, store_row, unit_of


@triton.jit(do_not_specialize=["T", "num_sources", "seed"])
def phase1_fwd_kernel(
    p_sources,  # N x [T, D]
    source_strides,  # N row strides
    p_scales,  # N x [T] or None
    scale_strides,  # N strides or None
    p_queries,  # [S, D]
    query_stride,
    p_key_weights,  # [S, D] or None
    key_weight_stride,
    p_out,  # [S, T, D]
    p_out_scale,  # [S, T] or None
    p_lse,  # [S, T]
    p_logits,  # [S, N, T] or None
    p_rstd,  # [N, T] or None
    p_p,  # [T, N, S]
    T,
    num_sources,
    seed,  # or None: round to nearest
    eps,
    scale,
    N: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    p_p += t * (N * S)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_rstd = tl.zeros([BLOCK_N], tl.float32)
    b_largest = tl.zeros([BLOCK_N], tl.float32)
    # [1, BLOCK_D], so that a source row and the rows of the queries have one layout.
    o_row = tl.arange(0, BLOCK_D)[None, :]
    for first in range(0, S, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < S
        b_u = load_keys(p_queries, query_stride, p_key_weights, key_weight_stride, o_s, m_s, o_row, D)
        b_logits = tl.full([BLOCK_S, BLOCK_N], float("-inf"), tl.float32)
        b_next = load_row(row_of(p_sources, source_strides, 0, t, N), o_row, D)
        for n in range(num_sources):
            row_scale = scale_of(p_scales, scale_strides, n, t, N)
            b_v = b_next * row_scale
            b_next = load_row(row_of(p_sources, source_strides, tl.minimum(n + 1, num_sources - 1), t, N), o_row, D)
            # [1]
            b_r = inverse_rms(b_v, eps, D, unit_of(row_scale), axis=1)
            b_logit = scale * (b_r * tl.sum(b_u * b_v, axis=1))
            b_rstd = tl.where(o_n == n, b_r, b_rstd)
            if p_out_scale is not None:
                b_largest = tl.where(o_n == n, peak_bits(b_v, 1).to(tl.float32, bitcast=True), b_largest)
            b_logits = tl.where((o_n == n)[None, :], b_logit[:, None], b_logits)

        b_peak = tl.max(b_logits, axis=1)
        b_p = tl.exp(b_logits - b_peak[:, None])
        b_total = tl.sum(b_p, axis=1)
        b_p /= b_total[:, None]
        m_sn = m_s[:, None] & m_n[None, :]
        tl.store(p_p + o_n[None, :] * S + o_s[:, None], b_p, mask=m_sn)
        if p_out_scale is not None:
            b_bound = tl.sum(b_p * b_largest[None, :], axis=1)
            tl.store(p_out_scale + o_s.to(tl.int64) * T + t, scale_from(bound_bits(b_bound)), mask=m_s)
        tl.store(p_lse + o_s.to(tl.int64) * T + t, b_peak + tl.log(b_total), mask=m_s)
        if p_logits is not None:
            o_sn = o_s.to(tl.int64)[:, None] * N + o_n[None, :]
            tl.store(p_logits + o_sn * T + t, b_logits, mask=m_sn)

    if p_rstd is not None:
        tl.store(p_rstd + o_n.to(tl.int64) * T + t, b_rstd, mask=m_n)
    # p and the scales go to the program's other threads through memory.
    tl.debug_barrier()

    o_s = tl.arange(0, TILE_S)
    m_s = o_s < S
    o_rows = o_s.to(tl.int64) * T + t
    p_out_rows = p_out + o_rows[:, None] * D
    out_scale = load_scale(None, 0)
    if p_out_scale is not None:
        out_scale = tl.load(p_out_scale + o_rows, mask=m_s, other=1.0)[:, None]
    for first in range(0, D, TILE_D):
        o_d = first + tl.arange(0, TILE_D)[None, :]
        # [TILE_S, TILE_D]
        b_mix = tl.zeros([TILE_S, TILE_D], tl.float32)
        for n in range(num_sources):
            b_p = tl.load(p_p + n * S + o_s, mask=m_s, other=0.0)
            b_v = load_row(row_of(p_sources, source_strides, n, t, N), o_d, D)
            b_mix += b_p[:, None] * (b_v * scale_of(p_scales, scale_strides, n, t, N))
        store_row(
            p_out_rows, b_mix, o_d, m_s[:, None] & (o_d < D), out_scale, seed, PHASE_1_OUT, o_rows[:, None], first
        )


def phase1_fwd(
    sources: list[torch.Tensor],
    queries: torch.Tensor,
    key_weights: torch.Tensor | None,
    eps: float,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    logits: torch.Tensor | None,
    rstd: torch.Tensor | None,
    *,
    source_scales: Sequence[torch.Tensor] | None = None,
    out_scale: torch.Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Fill out [S, T, D], lse [S, T], and logits [S, N, T], rstd [N, T], out_scale [S, T] where given."""
    num_queries, num_tokens, hidden_size = out.shape
    block = config.queries_config(hidden_size, num_queries, live_tiles=1)
    p = torch.empty(num_tokens, len(sources), num_queries, dtype=torch.float32, device=out.device)
    phase1_fwd_kernel[(num_tokens,)](
        p_sources=tuple(sources),
        source_strides=tuple(v.stride(0) for v in sources),
        p_scales=None if source_scales is None else tuple(source_scales),
        scale_strides=None if source_scales is None else tuple(s.stride(0) for s in source_scales),
        p_queries=queries,
        query_stride=queries.stride(0),
        p_key_weights=key_weights,
        key_weight_stride=0 if key_weights is None else key_weights.stride(0),
        p_out=out,
        p_out_scale=out_scale,
        p_lse=lse,
        p_logits=logits,
        p_rstd=rstd,
        p_p=p,
        T=num_tokens,
        num_sources=len(sources),
        seed=seed,
        eps=eps,
        scale=scale,
        N=len(sources),
        S=num_queries,
        D=hidden_size,
        BLOCK_N=config.next_power_of_2(len(sources)),
        BLOCK_S=block.block_s,
        BLOCK_D=block.block_d,
        TILE_S=block.tile_s,
        TILE_D=block.tile_d,
        num_warps=block.num_warps,
        maxnreg=block.maxnreg,
    )
