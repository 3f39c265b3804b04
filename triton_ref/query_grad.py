"""Parameter gradients from the fp32 partial sums that persistent programs leave behind, added up in a fixed order.

    du = sum_k partials[k]        d_query = du * w        d_key_weight = du * q        (u = q * w)

One program a query and a tile of D; no atomics, so the same partials give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_P = 32
BLOCK_D = 64


@triton.jit
def query_grad_kernel(
    p_partials,  # [P, S, D]
    p_queries,  # [S, D] or None
    query_stride,
    p_key_weights,  # [S, D] or None
    key_weight_stride,
    p_d_queries,  # [S, D]
    p_d_key_weights,  # [S, D] or None
    P,
    S,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    s = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in range(0, P, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        o_rows = o_p.to(tl.int64) * S + s
        b_sums += tl.load(
            p_partials + o_rows[:, None] * D + o_d[None, :], mask=(o_p < P)[:, None] & m_d[None, :], other=0.0
        )
    b_du = tl.sum(b_sums, axis=0)

    b_d_query = b_du
    if p_key_weights is not None:
        b_d_query *= tl.load(p_key_weights + s * key_weight_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_d_queries + s * D + o_d, b_d_query, mask=m_d)
    if p_d_key_weights is not None:
        b_q = tl.load(p_queries + s * query_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_d_key_weights + s * D + o_d, b_du * b_q, mask=m_d)


def query_grad(
    partials: torch.Tensor,
    queries: torch.Tensor | None,
    key_weights: torch.Tensor | None,
    d_queries: torch.Tensor,
    d_key_weights: torch.Tensor | None,
) -> None:
    """partials [P, S, D] fp32 -> d_queries [S, D], d_key_weights [S, D], each rounded once to its own dtype.

    Without a key weight du itself goes to d_queries, so that an output weight's gradient is the same reduction:
    query_grad(partials, None, None, d_w, None).
    """
    num_partials, num_queries, hidden_size = partials.shape
    query_grad_kernel[(triton.cdiv(hidden_size, BLOCK_D), num_queries)](
        p_partials=partials,
        p_queries=queries,
        query_stride=0 if queries is None else queries.stride(0),
        p_key_weights=key_weights,
        key_weight_stride=0 if key_weights is None else key_weights.stride(0),
        p_d_queries=d_queries,
        p_d_key_weights=d_key_weights,
        P=num_partials,
        S=num_queries,
        D=hidden_size,
        BLOCK_P=BLOCK_P,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )


def vector_grad(
    partials: torch.Tensor,
    query: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    d_query: torch.Tensor,
    d_key_weight: torch.Tensor | None,
) -> None:
    """query_grad for one query: partials [P, D] fp32, the others [D]."""
    query_grad(
        partials.unsqueeze(1),
        None if query is None else query.unsqueeze(0),
        None if key_weight is None else key_weight.unsqueeze(0),
        d_query.unsqueeze(0),
        None if d_key_weight is None else d_key_weight.unsqueeze(0),
    )
