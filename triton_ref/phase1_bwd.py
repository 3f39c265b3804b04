"""Phase 1 (inter-block), backward.

    a_sn = <do_s, v_n>        h_sn = p_sn (a_sn - sum_k p_sk a_sk + d_lse_s)        g_sn = scale * r_n * h_sn
    d_v_n = sum_s (p_sn do_s + g_sn u_s) - (r_n^2 / D) (sum_s logit_sn h_sn) v_n        du_s = sum_tokens sum_n g_sn v_n

Two kernels. The first, one program a token, finds p and g (fp32 [T, N, S], the only scratch) and makes every d_v from
rows that are still in cache. The second is the product of g with the sources: a fixed number of persistent programs a
tile of D, each keeping its [S, tile] of du in registers over its tokens. (3N+S) E bytes, N E more when adding to what
d_sources hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from triton_ref import config
from triton_ref.device.rounding import D_SOURCES
from triton_ref.device.rows import element, load_keys, load_row, load_scale, row_of, scale_of, store_row
from triton_ref.query_grad import query_grad


@triton.jit(do_not_specialize=["T", "num_sources", "seed"])
def phase1_d_sources_kernel(
    p_d_out,  # [S, T, D]
    p_d_lse,  # [S, T] or None
    p_sources,  # N x [T, D]
    source_strides,  # N row strides
    p_scales,  # N x [T] or None
    scale_strides,  # N strides or None
    p_queries,  # [S, D]
    query_stride,
    p_key_weights,  # [S, D] or None
    key_weight_stride,
    p_lse,  # [S, T]
    p_logits,  # [S, N, T]
    p_rstd,  # [N, T]
    p_d_sources,  # N x [T, D]
    d_source_strides,  # N row strides
    p_p,  # [T, N, S]
    p_g,  # [T, N, S]
    T,
    num_sources,
    seed,  # or None: round to nearest
    scale,
    ACCUMULATE: tl.constexpr,
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
    p_g += t * (N * S)
    o_n = tl.arange(0, BLOCK_N)
    o_row = tl.arange(0, BLOCK_D)[None, :]
    m_n = o_n < N
    b_rstd = tl.load(p_rstd + o_n.to(tl.int64) * T + t, mask=m_n, other=0.0)
    b_pull = tl.zeros([BLOCK_N], tl.float32)

    for first in range(0, S, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < S
        o_st = o_s.to(tl.int64) * T + t
        b_d_out = load_row(p_d_out + o_st[:, None] * D, o_row, D, m_s[:, None])
        b_a = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
        b_next = load_row(row_of(p_sources, source_strides, 0, t, N), o_row, D)
        for n in range(num_sources):
            b_v = b_next * scale_of(p_scales, scale_strides, n, t, N)
            b_next = load_row(row_of(p_sources, source_strides, tl.minimum(n + 1, num_sources - 1), t, N), o_row, D)
            b_a = tl.where((o_n == n)[None, :], tl.sum(b_d_out * b_v, axis=1)[:, None], b_a)

        o_snt = (o_s.to(tl.int64)[:, None] * N + o_n[None, :]) * T + t
        m_sn = m_s[:, None] & m_n[None, :]
        b_logits = tl.load(p_logits + o_snt, mask=m_sn, other=0.0)
        b_lse = tl.load(p_lse + o_st, mask=m_s, other=0.0)
        b_p = tl.where(m_sn, tl.exp(b_logits - b_lse[:, None]), 0.0)
        b_rest = -tl.sum(b_p * b_a, axis=1)
        if p_d_lse is not None:
            b_rest += tl.load(p_d_lse + o_st, mask=m_s, other=0.0)
        b_h = b_p * (b_a + b_rest[:, None])
        o_ns = o_n[None, :] * S + o_s[:, None]
        tl.store(p_p + o_ns, b_p, mask=m_sn)
        tl.store(p_g + o_ns, scale * (b_rstd[None, :] * b_h), mask=m_sn)
        b_pull += tl.sum(b_logits * (b_rstd[None, :] * b_h), axis=0)

    b_pull /= D
    # p and g go to the program's other threads through memory.
    tl.debug_barrier()

    o_s = tl.arange(0, TILE_S)
    m_s = o_s < S
    o_st = o_s.to(tl.int64) * T + t
    for first in range(0, D, TILE_D):
        o_d = first + tl.arange(0, TILE_D)[None, :]
        b_d_out = load_row(p_d_out + o_st[:, None] * D, o_d, D, m_s[:, None])
        b_u = load_keys(p_queries, query_stride, p_key_weights, key_weight_stride, o_s, m_s, o_d, D)
        for n in range(num_sources):
            b_p = tl.load(p_p + n * S + o_s, mask=m_s, other=0.0)
            b_g = tl.load(p_g + n * S + o_s, mask=m_s, other=0.0)
            b_v = load_row(row_of(p_sources, source_strides, n, t, N), o_d, D)
            b_v *= scale_of(p_scales, scale_strides, n, t, N)
            b_d_v = tl.sum(b_p[:, None] * b_d_out + b_g[:, None] * b_u, axis=0, keep_dims=True)
            # Not rstd^2: fp32 has no square of a large row's.
            b_d_v -= element(b_pull, o_n, n) * (element(b_rstd, o_n, n) * b_v)
            p_d_v = row_of(p_d_sources, d_source_strides, n, t, N)
            if ACCUMULATE:
                b_d_v += load_row(p_d_v, o_d, D)
            store_row(
                p_d_v, b_d_v, o_d, o_d < D, load_scale(None, 0), seed, D_SOURCES, tl.cast(n, tl.int64) * T + t, first
            )


@triton.jit(do_not_specialize=["T", "num_sources"])
def phase1_du_kernel(
    p_sources,  # N x [T, D]
    source_strides,  # N row strides
    p_scales,  # N x [T] or None
    scale_strides,  # N strides or None
    p_g,  # [T, N, S]
    p_du,  # [programs, S, D]
    T,
    num_sources,
    N: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, TILE_S)
    o_d = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)[None, :]
    m_s = o_s < S
    b_du = tl.zeros([TILE_S, TILE_D], tl.float32)
    for t in range(program, T, tl.num_programs(0)):
        for n in range(num_sources):
            b_g = tl.load(p_g + (t * N + n) * S + o_s, mask=m_s, other=0.0)
            b_v = load_row(row_of(p_sources, source_strides, n, t, N), o_d, D)
            b_du += b_g[:, None] * (b_v * scale_of(p_scales, scale_strides, n, t, N))
    o_out = (program * S + o_s)[:, None] * D + o_d
    tl.store(p_du + o_out, b_du, mask=m_s[:, None] & (o_d < D))


def phase1_bwd(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    sources: list[torch.Tensor],
    queries: torch.Tensor,
    key_weights: torch.Tensor | None,
    eps: float,
    scale: float,
    lse: torch.Tensor,
    logits: torch.Tensor,
    rstd: torch.Tensor,
    d_sources: list[torch.Tensor],
    accumulate: bool,
    d_queries: torch.Tensor,
    d_key_weights: torch.Tensor | None,
    *,
    source_scales: Sequence[torch.Tensor] | None = None,
    seed: int | None = None,
) -> None:
    """Fill (or, with accumulate, add to) d_sources N x [T, D]; fill d_queries and, if given, d_key_weights [S, D].

    eps went into rstd in the forward.
    """
    num_queries, num_tokens, hidden_size = d_out.shape
    num_sources = len(sources)
    block = config.queries_config(hidden_size, num_queries, live_tiles=2)
    source_strides = tuple(v.stride(0) for v in sources)
    p = torch.empty(num_tokens, num_sources, num_queries, dtype=torch.float32, device=d_out.device)
    g = torch.empty_like(p)
    phase1_d_sources_kernel[(num_tokens,)](
        p_d_out=d_out,
        p_d_lse=d_lse,
        p_sources=tuple(sources),
        source_strides=source_strides,
        p_scales=None if source_scales is None else tuple(source_scales),
        scale_strides=None if source_scales is None else tuple(s.stride(0) for s in source_scales),
        p_queries=queries,
        query_stride=queries.stride(0),
        p_key_weights=key_weights,
        key_weight_stride=0 if key_weights is None else key_weights.stride(0),
        p_lse=lse,
        p_logits=logits,
        p_rstd=rstd,
        p_d_sources=tuple(d_sources),
        d_source_strides=tuple(d_v.stride(0) for d_v in d_sources),
        p_p=p,
        p_g=g,
        T=num_tokens,
        num_sources=num_sources,
        seed=seed,
        scale=scale,
        ACCUMULATE=accumulate,
        N=num_sources,
        S=num_queries,
        D=hidden_size,
        BLOCK_N=config.next_power_of_2(num_sources),
        BLOCK_S=block.block_s,
        BLOCK_D=block.block_d,
        TILE_S=block.tile_s,
        TILE_D=block.tile_d,
        num_warps=block.num_warps,
        maxnreg=block.maxnreg,
    )
    tile_d, num_warps = config.du_config(hidden_size, num_queries)
    tiles = triton.cdiv(hidden_size, tile_d)
    programs = config.tile_programs(num_tokens, tiles)
    du = torch.empty(programs, num_queries, hidden_size, dtype=torch.float32, device=d_out.device)
    phase1_du_kernel[(programs, tiles)](
        p_sources=tuple(sources),
        source_strides=source_strides,
        p_scales=None if source_scales is None else tuple(source_scales),
        scale_strides=None if source_scales is None else tuple(s.stride(0) for s in source_scales),
        p_g=g,
        p_du=du,
        T=num_tokens,
        num_sources=num_sources,
        N=num_sources,
        S=num_queries,
        D=hidden_size,
        TILE_S=block.tile_s,
        TILE_D=tile_d,
        num_warps=num_warps,
    )
    query_grad(du, queries, key_weights, d_queries, d_key_weights)
