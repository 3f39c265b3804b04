"""The torch backend: every launcher of the backend contract in plain float32 torch operations, on any device.

It is the backend for machines without a GPU and the plainest statement of what a launcher does. It shares no code with the
float64 oracle that judges it. Sums are written as products and `sum`, never as matmul or einsum, so that neither autocast nor
TF32 can lower their precision.

Scales [T] given beside rows say that these are scaled fp16, `seed` that the stored sum is rounded stochastically.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres import rounding, scaled


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
    *,
    source_scales: Sequence[Tensor] | None = None,  # L x [T]
) -> None:
    u = _effective_query(query, key_weight)
    units, unit = _units(source_scales, len(sources))
    sources = _represented(sources, source_scales)
    row_rstd = torch.stack([_rstd(source.float(), eps, unit) for source, unit in zip(sources, units, strict=True)])
    row_logits = torch.stack([scale * r * _dot(source.float(), u) for source, r in zip(sources, row_rstd, strict=True)])
    p = row_logits.softmax(0)
    m = _weighted_sum(p, sources)
    out.copy_(m if output_weight is None else m * _rstd(m, output_eps, unit)[:, None] * output_weight.float())
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
    *,
    source_scales: Sequence[Tensor] | None = None,  # L x [T]
) -> None:
    u = _effective_query(query, key_weight)
    _, unit = _units(source_scales, len(sources))
    sources = _represented(sources, source_scales)
    p = (logits - lse).exp()
    dm = d_out.float()
    if output_weight is not None:
        m = _weighted_sum(p, sources) if mixed is None else mixed.float()
        dm, row_weight_grad = _rms_norm_bwd(dm, m, output_weight.float(), output_eps, unit)
        _fill(d_output_weight, row_weight_grad.sum(0))
    a = torch.stack([_dot(source.float(), dm) for source in sources])  # [L, T]
    g = scale * (rstd * (p * (a - (p * a).sum(0))))
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
    *,
    source_scales: Sequence[Tensor] | None = None,  # N x [T]
    out_scale: Tensor | None = None,  # [S, T]
    seed: int | None = None,
) -> None:
    u = _effective_query(queries, key_weights)
    units, _ = _units(source_scales, len(sources))
    sources = _represented(sources, source_scales)
    row_rstd = torch.stack([_rstd(source.float(), eps, unit) for source, unit in zip(sources, units, strict=True)])
    largest = None if out_scale is None else torch.stack([scaled.peak(source.float()) for source in sources])
    for s in range(queries.shape[0]):
        row_logits = torch.stack(
            [scale * r * _dot(source.float(), u[s]) for source, r in zip(sources, row_rstd, strict=True)]
        )
        p, row_scale = row_logits.softmax(0), None if out_scale is None else out_scale[s]
        m, bound = _weighted_sum(p, sources), None if largest is None else (p * largest).sum(0)
        rounding.store(out[s], m, row_scale, seed, rounding.PHASE_1_OUT, s * len(m), bound)
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
    *,
    source_scales: Sequence[Tensor] | None = None,  # N x [T]
    seed: int | None = None,
) -> None:
    u = _effective_query(queries, key_weights)
    sources = _represented(sources, source_scales)
    dv = [d.float() if accumulate else torch.zeros_like(d, dtype=torch.float32) for d in d_sources]
    du = torch.zeros_like(u)
    for s in range(queries.shape[0]):
        p = (logits[s] - lse[s]).exp()
        dm = d_out[s].float()
        a = torch.stack([_dot(source.float(), dm) for source in sources])  # [N, T]
        centred = a - (p * a).sum(0)
        g = scale * (rstd * (p * (centred if d_lse is None else centred + d_lse[s])))
        for i, source in enumerate(sources):
            v = source.float()
            dv[i] += p[i, :, None] * dm + _logit_grad(g[i], rstd[i], u[s], v)
            du[s] += (g[i, :, None] * v).sum(0)
    for i, (d_source, d) in enumerate(zip(d_sources, dv, strict=True)):
        rounding.store(d_source, d, None, seed, rounding.D_SOURCES, i * len(d))
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
    new_partial: Tensor | None,  # [T, D]; given with delta
    logit: Tensor | None,  # [T]
    rstd: Tensor | None,  # [T]
    *,
    partial_scale: Tensor | None = None,  # [T]
    inter_scale: Tensor | None = None,  # [T]
    new_partial_scale: Tensor | None = None,  # [T]
    seed: int | None = None,
) -> None:
    x, inter = _row(partial, partial_scale), _row(inter_out, inter_scale)
    if delta is not None:
        assert new_partial is not None
        rounding.store(new_partial, x + delta.float(), new_partial_scale, seed, rounding.PARTIAL_SUM)
        x, partial_scale = _row(new_partial, new_partial_scale), new_partial_scale
    x_unit, unit = _merged_units(partial_scale, inter_scale)
    row_rstd = _rstd(x, eps, x_unit)
    row_logit = scale * row_rstd * _dot(x, _effective_query(query, key_weight))
    h = inter.lerp(x, torch.sigmoid(row_logit - inter_lse)[:, None])
    out.copy_(h if output_weight is None else h * _rstd(h, output_eps, unit)[:, None] * output_weight.float())
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
    *,
    partial_scale: Tensor | None = None,  # [T]
    inter_scale: Tensor | None = None,  # [T]
) -> None:
    u = _effective_query(query, key_weight)
    x, inter = _row(partial, partial_scale), _row(inter_out, inter_scale)
    _, unit = _merged_units(partial_scale, inter_scale)
    p = torch.sigmoid(logit - inter_lse)
    q = torch.sigmoid(inter_lse - logit)  # 1 - p, without the cancellation
    dh = d_out.float()
    if output_weight is not None:
        h = inter.lerp(x, p[:, None])
        dh, row_weight_grad = _rms_norm_bwd(dh, h, output_weight.float(), output_eps, unit)
        _fill(d_output_weight, row_weight_grad.sum(0))
    d_logit = p * q * _dot(x - inter, dh)
    g = scale * (rstd * d_logit)
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
    *,
    prefix_scale: Tensor | None = None,  # [T]
    blocks_scale: Tensor | None = None,  # [T, B]
    seed: int | None = None,
) -> None:
    if delta is not None:
        rounding.store(prefix, _row(prefix, prefix_scale) + delta.float(), prefix_scale, seed, rounding.PARTIAL_SUM)
    sources, scales = [*blocks[:, :num_blocks].unbind(1), prefix], None
    if prefix_scale is not None and blocks_scale is not None:
        scales = [*blocks_scale[:, :num_blocks].unbind(1), prefix_scale]
    if block_write_idx >= 0:
        blocks[:, block_write_idx].copy_(prefix)
        if prefix_scale is not None and blocks_scale is not None:
            blocks_scale[:, block_write_idx].copy_(prefix_scale)
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
        source_scales=scales,
    )


def _effective_query(query: Tensor, key_weight: Tensor | None) -> Tensor:
    return query.float() if key_weight is None else query.float() * key_weight.float()


def _rstd(x: Tensor, eps: float, unit: Tensor | None = None) -> Tensor:  # [T, D] -> [T]
    """1/rms; `unit` [T], powers of two, makes numbers whose squares leave float32's range small enough."""
    if unit is None:
        return torch.rsqrt((x * x).mean(-1) + eps)
    x = x / unit[:, None]
    return torch.rsqrt((x * x).mean(-1) + eps / unit / unit) / unit


def _units(scales: Sequence[Tensor] | None, count: int) -> tuple[list[Tensor | None], Tensor | None]:
    """Units of the sources' rows, and of their mix: scales of one and more."""
    if scales is None:
        return [None] * count, None
    return [scale.clamp_min(1) for scale in scales], torch.stack(list(scales)).amax(0).clamp_min(1)


def _merged_units(x_scale: Tensor | None, inter_scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Units of x, and of its merge with phase 1's output."""
    scales = [scale for scale in (x_scale, inter_scale) if scale is not None]
    return None if x_scale is None else x_scale.clamp_min(1), _units(scales or None, 0)[1]


def _row(values: Tensor, scale: Tensor | None) -> Tensor:  # [T, D], [T] -> [T, D] fp32
    return values.float() if scale is None else scaled.unpack(values, scale)


def _represented(sources: Sequence[Tensor], scales: Sequence[Tensor] | None) -> list[Tensor]:
    return list(sources) if scales is None else [scaled.unpack(*pair) for pair in zip(sources, scales, strict=True)]


def _dot(x: Tensor, y: Tensor) -> Tensor:  # [T, D], [D] or [T, D] -> [T]
    return (x * y).sum(-1)


def _weighted_sum(p: Tensor, sources: Sequence[Tensor]) -> Tensor:  # [L, T], L x [T, D] -> [T, D]
    m = p[0, :, None] * sources[0].float()
    for weight, source in zip(p[1:], sources[1:], strict=True):
        m += weight[:, None] * source.float()
    return m


def _logit_grad(g: Tensor, rstd: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The part of dv that comes through the logit: g (u - (r^2 c / D) v), with c = <u, v>."""
    c = _dot(v, u)
    return g[:, None] * (u - (rstd * (rstd * c) / v.shape[-1])[:, None] * v)


def _rms_norm_bwd(d_out: Tensor, m: Tensor, weight: Tensor, eps: float, unit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of RMSNorm(m) * weight: dm [T, D], and the rows [T, D] whose sum over tokens is the weight's gradient."""
    r = _rstd(m, eps, unit)[:, None]
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
