"""The torch backend: every launcher of the backend contract in plain float32 torch operations, on any device.

It is the backend for machines without a GPU and the plainest statement of what a launcher does. It shares no code with the
float64 oracle that judges it. Sums are written as products and `sum`, never as matmul or einsum, so that neither autocast nor
TF32 can lower their precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mix_fwd(
    sources: list[Tensor],  # L x [T, D]
    query: Tensor,  # [D]
    key_weight: Tensor | None,  # [D]
    output_weight: Tensor | None,  # [D]
    eps: float,
    output_eps: float,
    scale: float,
    out: Tensor,  # [T, D]
    mixed: Tensor | None,  # [T, D] fp32
    logits: Tensor | None,  # [L, T]
    rstd: Tensor | None,  # [L, T]
    lse: Tensor | None,  # [T]
    weights: Tensor | None,  # [L, T]
) -> None:
    u = _effective_query(query, key_weight)
    row_rstd = torch.stack([_rstd(source.float(), eps) for source in sources])
    row_logits = torch.stack([scale * r * _dot(source.float(), u) for source, r in zip(sources, row_rstd, strict=True)])
    p = row_logits.softmax(0)
    m = _weighted_sum(p, sources)
    out.copy_(m if output_weight is None else m * _rstd(m, output_eps)[:, None] * output_weight.float())
    _fill(mixed, m)
    _fill(logits, row_logits)
    _fill(rstd, row_rstd)
    _fill(lse, row_logits.logsumexp(0))
    _fill(weights, p)


def mix_bwd(
    d_out: Tensor,  # [T, D]
    sources: list[Tensor],  # L x [T, D]
    query: Tensor,  # [D]
    key_weight: Tensor | None,  # [D]
    output_weight: Tensor | None,  # [D]
    eps: float,
    output_eps: float,
    scale: float,
    mixed: Tensor | None,  # [T, D] fp32
    logits: Tensor,  # [L, T]
    rstd: Tensor,  # [L, T]
    lse: Tensor,  # [T]
    d_sources: list[Tensor],  # L x [T, D]
    d_query: Tensor,  # [D]
    d_key_weight: Tensor | None,  # [D]
    d_output_weight: Tensor | None,  # [D]
) -> None:
    u = _effective_query(query, key_weight)
    p = (logits - lse).exp()
    dm = d_out.float()
    if output_weight is not None:
        m = _weighted_sum(p, sources) if mixed is None else mixed.float()
        dm, row_weight_grad = _rms_norm_bwd(dm, m, output_weight.float(), output_eps)
        _fill(d_output_weight, row_weight_grad.sum(0))
    a = torch.stack([_dot(source.float(), dm) for source in sources])  # [L, T]
    g = scale * rstd * p * (a - (p * a).sum(0))
    du = torch.zeros_like(u)
    for i, source in enumerate(sources):
        v = source.float()
        d_sources[i].copy_(p[i, :, None] * dm + _logit_grad(g[i], rstd[i], u, v))
        du += (g[i, :, None] * v).sum(0)
    _fill_query_grads(du, query, key_weight, d_query, d_key_weight)


def phase1_fwd(
    sources: list[Tensor],  # N x [T, D]
    queries: Tensor,  # [S, D]
    key_weights: Tensor | None,  # [S, D]
    eps: float,
    scale: float,
    out: Tensor,  # [S, T, D]
    lse: Tensor,  # [S, T]
    logits: Tensor | None,  # [S, N, T]
    rstd: Tensor | None,  # [N, T]
) -> None:
    u = _effective_query(queries, key_weights)
    row_rstd = torch.stack([_rstd(source.float(), eps) for source in sources])
    for s in range(queries.shape[0]):
        row_logits = torch.stack(
            [scale * r * _dot(source.float(), u[s]) for source, r in zip(sources, row_rstd, strict=True)]
        )
        out[s].copy_(_weighted_sum(row_logits.softmax(0), sources))
        lse[s].copy_(row_logits.logsumexp(0))
        if logits is not None:
            logits[s].copy_(row_logits)
    _fill(rstd, row_rstd)


def phase1_bwd(
    d_out: Tensor,  # [S, T, D]
    d_lse: Tensor | None,  # [S, T]
    sources: list[Tensor],  # N x [T, D]
    queries: Tensor,  # [S, D]
    key_weights: Tensor | None,  # [S, D]
    eps: float,
    scale: float,
    lse: Tensor,  # [S, T]
    logits: Tensor,  # [S, N, T]
    rstd: Tensor,  # [N, T]
    d_sources: list[Tensor],  # N x [T, D]
    accumulate: bool,
    d_queries: Tensor,  # [S, D]
    d_key_weights: Tensor | None,  # [S, D]
) -> None:
    u = _effective_query(queries, key_weights)
    dv = [d.float() if accumulate else torch.zeros_like(d, dtype=torch.float32) for d in d_sources]
    du = torch.zeros_like(u)
    for s in range(queries.shape[0]):
        p = (logits[s] - lse[s]).exp()
        dm = d_out[s].float()
        a = torch.stack([_dot(source.float(), dm) for source in sources])  # [N, T]
        centred = a - (p * a).sum(0)
        g = scale * rstd * p * (centred if d_lse is None else centred + d_lse[s])
        for i, source in enumerate(sources):
            v = source.float()
            dv[i] += p[i, :, None] * dm + _logit_grad(g[i], rstd[i], u[s], v)
            du[s] += (g[i, :, None] * v).sum(0)
    for d_source, d in zip(d_sources, dv, strict=True):
        d_source.copy_(d)
    _fill_query_grads(du, queries, key_weights, d_queries, d_key_weights)


def phase2_fwd(
    partial: Tensor,  # [T, D]
    delta: Tensor | None,  # [T, D]
    query: Tensor,  # [D]
    key_weight: Tensor | None,  # [D]
    inter_out: Tensor,  # [T, D]
    inter_lse: Tensor,  # [T]
    output_weight: Tensor | None,  # [D]
    eps: float,
    output_eps: float,
    scale: float,
    out: Tensor,  # [T, D]
    new_partial: Tensor | None,  # [T, D]
    logit: Tensor | None,  # [T]
    rstd: Tensor | None,  # [T]
) -> None:
    x = (partial if delta is None else _rounded_sum(partial, delta)).float()
    row_rstd = _rstd(x, eps)
    row_logit = scale * row_rstd * _dot(x, _effective_query(query, key_weight))
    h = inter_out.float().lerp(x, torch.sigmoid(row_logit - inter_lse)[:, None])
    out.copy_(h if output_weight is None else h * _rstd(h, output_eps)[:, None] * output_weight.float())
    _fill(new_partial, x)
    _fill(logit, row_logit)
    _fill(rstd, row_rstd)


def phase2_bwd(
    d_out: Tensor,  # [T, D]
    d_new_partial: Tensor | None,  # [T, D]
    partial: Tensor,  # [T, D]
    query: Tensor,  # [D]
    key_weight: Tensor | None,  # [D]
    inter_out: Tensor,  # [T, D]
    inter_lse: Tensor,  # [T]
    output_weight: Tensor | None,  # [D]
    eps: float,
    output_eps: float,
    scale: float,
    logit: Tensor,  # [T]
    rstd: Tensor,  # [T]
    d_partial: Tensor,  # [T, D]
    d_inter_out: Tensor,  # [T, D]
    d_inter_lse: Tensor,  # [T]
    d_query: Tensor,  # [D]
    d_key_weight: Tensor | None,  # [D]
    d_output_weight: Tensor | None,  # [D]
) -> None:
    u = _effective_query(query, key_weight)
    x, inter = partial.float(), inter_out.float()
    p = torch.sigmoid(logit - inter_lse)
    q = torch.sigmoid(inter_lse - logit)  # 1 - p, without the cancellation
    dh = d_out.float()
    if output_weight is not None:
        h = inter.lerp(x, p[:, None])
        dh, row_weight_grad = _rms_norm_bwd(dh, h, output_weight.float(), output_eps)
        _fill(d_output_weight, row_weight_grad.sum(0))
    d_logit = p * q * _dot(x - inter, dh)
    g = scale * rstd * d_logit
    dx = p[:, None] * dh + _logit_grad(g, rstd, u, x)
    d_partial.copy_(dx if d_new_partial is None else dx + d_new_partial.float())
    d_inter_out.copy_(q[:, None] * dh)
    d_inter_lse.copy_(-d_logit)
    _fill_query_grads((g[:, None] * x).sum(0), query, key_weight, d_query, d_key_weight)


def serve_step(
    prefix: Tensor,  # [T, D]
    delta: Tensor | None,  # [T, D]
    blocks: Tensor,  # [T, B, D]
    query: Tensor,  # [D]
    key_weight: Tensor | None,  # [D]
    output_weight: Tensor | None,  # [D]
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_eps: float,
    out: Tensor,  # [T, D]
) -> None:
    if delta is not None:
        prefix.copy_(_rounded_sum(prefix, delta))
    if block_write_idx >= 0:
        blocks[:, block_write_idx].copy_(prefix)
    sources = [*blocks[:, :num_blocks].unbind(1), prefix]
    nothing = None
    mix_fwd(
        sources,
        query,
        key_weight,
        output_weight,
        eps,
        output_eps,
        1.0,
        out,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
    )


def _effective_query(query: Tensor, key_weight: Tensor | None) -> Tensor:
    return query.float() if key_weight is None else query.float() * key_weight.float()


def _rstd(x: Tensor, eps: float) -> Tensor:  # [T, D] -> [T]
    return torch.rsqrt((x * x).mean(-1) + eps)


def _dot(x: Tensor, y: Tensor) -> Tensor:  # [T, D], [D] or [T, D] -> [T]
    return (x * y).sum(-1)


def _weighted_sum(p: Tensor, sources: Sequence[Tensor]) -> Tensor:  # [L, T], L x [T, D] -> [T, D]
    m = p[0, :, None] * sources[0].float()
    for weight, source in zip(p[1:], sources[1:], strict=True):
        m += weight[:, None] * source.float()
    return m


def _rounded_sum(partial: Tensor, delta: Tensor) -> Tensor:
    return (partial.float() + delta.float()).to(partial.dtype)


def _logit_grad(g: Tensor, rstd: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The part of dv that comes through the logit: g (u - (r^2 c / D) v), with c = <u, v>."""
    c = _dot(v, u)
    return g[:, None] * (u - (rstd * rstd * c / v.shape[-1])[:, None] * v)


def _rms_norm_bwd(d_out: Tensor, m: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradient of RMSNorm(m) * weight: dm [T, D], and the rows [T, D] whose sum over tokens is the weight's gradient."""
    r = _rstd(m, eps)[:, None]
    m_hat = m * r
    weighted = d_out * weight
    return r * (weighted - m_hat * (weighted * m_hat).mean(-1, keepdim=True)), d_out * m_hat


def _fill_query_grads(
    du: Tensor, query: Tensor, key_weight: Tensor | None, d_query: Tensor, d_key_weight: Tensor | None
) -> None:
    d_query.copy_(du if key_weight is None else du * key_weight.float())
    _fill(d_key_weight, du * query.float())


def _fill(target: Tensor | None, value: Tensor) -> None:
    if target is not None:
        target.copy_(value)
