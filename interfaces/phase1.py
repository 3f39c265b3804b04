"""Phase 1 of Block AttnRes (inter-block): all S sites of a block mix the N finished block representations at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnres import backend as backends
from attnres import checked_mode, contracts
from attnres.registration import Operator, Outputs, needs_grad


def phase_1(
    block_representations: Sequence[Tensor] | Tensor,
    pseudo_queries: Tensor,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixes the finished blocks for all queries of a block (arXiv:2603.15031, the inter-block phase of Block AttnRes).

        logit_si = scale * <q_s * rms_weight_s, v_i> / sqrt(mean(v_i^2) + eps)
        out_s = sum_i softmax_i(logit_s)_i v_i          lse_s = log sum_i exp(logit_si)

    Args:
        block_representations: 1 to 64 blocks [..., D] of one dtype (bfloat16, float16 or float32), or one stacked tensor
            [N, ..., D].
        pseudo_queries: [S, D].
        eps: epsilon of the keys' RMSNorm.
        rms_weight: weight of the keys' RMSNorm: [D] for all sites, or [S, D], one per site; None is a weight of ones.
        scale: factor of the logits.
        backend: "auto", "cute", "triton" or "torch"; None leaves it to use_backend and ATTNRES_BACKEND.

    Returns:
        out [S, ..., D] in the blocks' dtype, normalised, and lse [S, ...] in float32, both with gradient: what phase_2 merges.

    Saved for the backward: the inputs, lse, the logits [S, N, T] and 1/rms [N, T] in float32. Arithmetic is float32; the
    same inputs give the same bits. Least traffic: (N + S) T D elements forward, (2 N + S) T D backward.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
        BackendError: the named backend cannot take the call.
    """
    sources = contracts.check_phase_1(block_representations, pseudo_queries, eps, rms_weight, scale)
    differentiable = needs_grad(pseudo_queries, rms_weight, *sources)
    stacked = isinstance(block_representations, Tensor)
    request = backends.requested(backend)
    outputs = _phase_1(
        differentiable, sources, pseudo_queries, rms_weight, eps, scale, stacked, differentiable, *request
    )
    return outputs[0], outputs[1]


def _allocate(
    sources: list[Tensor],
    queries: Tensor,
    key_weights: Tensor | None,
    eps: float,
    scale: float,
    stacked: bool,
    save_statistics: bool,
    backend: str,
    origin: str,
) -> Outputs:
    """out [S, ..., D], lse [S, ...], logits [S, N, T], rstd [N, T]; the last two None where not wanted."""
    first = sources[0]
    *leading, size = first.shape[1:] if stacked else first.shape
    depth, sites = first.shape[0] if stacked else len(sources), queries.shape[0]
    logits = rstd = None
    if save_statistics:
        tokens = math.prod(leading)
        logits = first.new_empty((sites, depth, tokens), dtype=torch.float32)
        rstd = first.new_empty((depth, tokens), dtype=torch.float32)
    out = first.new_empty((sites, *leading, size))
    return out, first.new_empty((sites, *leading), dtype=torch.float32), logits, rstd


def _forward(
    sources: list[Tensor],
    queries: Tensor,
    key_weights: Tensor | None,
    eps: float,
    scale: float,
    stacked: bool,
    save_statistics: bool,
    backend: str,
    origin: str,
) -> Outputs:
    outputs = _allocate(sources, queries, key_weights, eps, scale, stacked, save_statistics, backend, origin)
    fill_outputs(outputs, sources, queries, key_weights, eps, scale, stacked, backend, origin)
    return outputs


def fill_outputs(
    outputs: Outputs,
    sources: list[Tensor],
    queries: Tensor,
    key_weights: Tensor | None,
    eps: float,
    scale: float,
    stacked: bool,
    backend: str,
    origin: str,
) -> None:
    """Fills out, lse and, where they are wanted, logits and rstd."""
    rows = contracts.unstack(sources, stacked)
    sites, tokens = queries.shape[0], rows[0].shape[0]
    name = backends.choose(contracts.spec("phase1_fwd", rows, len(rows), sites), (backend, origin))
    if tokens == 0:
        return
    out, lse = outputs[0].view(sites, tokens, -1), outputs[1].view(sites, tokens)
    _, _, logits, rstd = outputs
    weights = _per_site(key_weights, queries)
    backends.launch("phase1_fwd", name, queries.device, rows, queries, weights, eps, scale, out, lse, logits, rstd)
    if checked_mode.is_on():
        arguments = _oracle_arguments(rows, queries, key_weights, eps, scale)
        checked_mode.verify("phase1", name, arguments, {"out": out, "lse": lse})


def _per_site(key_weights: Tensor | None, queries: Tensor) -> Tensor | None:
    """A view [S, D]."""
    return key_weights if key_weights is None else key_weights.expand(queries.shape)


def _oracle_arguments(
    rows: list[Tensor], queries: Tensor, key_weights: Tensor | None, eps: float, scale: float
) -> dict[str, Any]:
    return {
        "block_representations": rows,
        "pseudo_queries": queries,
        "eps": eps,
        "rms_weight": key_weights,
        "scale": scale,
    }


def _allocate_gradients(
    d_out: Tensor,
    d_lse: Tensor | None,
    sources: list[Tensor],
    queries: Tensor,
    key_weights: Tensor | None,
    lse: Tensor,
    logits: Tensor,
    rstd: Tensor,
    eps: float,
    scale: float,
    stacked: bool,
    backend: str,
) -> list[Tensor]:
    """d_sources, then d_queries and d_key_weights (empty where there is no weight)."""
    d_weights = queries.new_empty(0) if key_weights is None else key_weights.new_empty(key_weights.shape)
    return [*(source.new_empty(source.shape) for source in sources), queries.new_empty(queries.shape), d_weights]


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    sources: list[Tensor],
    queries: Tensor,
    key_weights: Tensor | None,
    lse: Tensor,
    logits: Tensor,
    rstd: Tensor,
    eps: float,
    scale: float,
    stacked: bool,
    backend: str,
) -> list[Tensor]:
    gradients = _allocate_gradients(
        d_out, d_lse, sources, queries, key_weights, lse, logits, rstd, eps, scale, stacked, backend
    )
    fill_gradients(
        gradients, False, d_out, d_lse, sources, queries, key_weights, lse, logits, rstd, eps, scale, stacked, backend
    )
    return gradients


def fill_gradients(
    gradients: list[Tensor],
    accumulate: bool,
    d_out: Tensor,
    d_lse: Tensor | None,
    sources: list[Tensor],
    queries: Tensor,
    key_weights: Tensor | None,
    lse: Tensor,
    logits: Tensor,
    rstd: Tensor,
    eps: float,
    scale: float,
    stacked: bool,
    backend: str,
) -> None:
    """Fills d_sources (with `accumulate` adds to them), d_queries and d_key_weights, which may have any of the dtypes."""
    *d_sources, d_queries, d_key_weights = gradients
    if accumulate and checked_mode.is_on():  # the oracle judges what this call alone contributes
        shares = [torch.empty_like(d_source) for d_source in d_sources]
        given = d_out, d_lse, sources, queries, key_weights, lse, logits, rstd, eps, scale, stacked, backend
        fill_gradients([*shares, d_queries, d_key_weights], False, *given)
        for d_source, share in zip(d_sources, shares, strict=True):
            d_source.add_(share)
        return
    rows, d_rows = contracts.unstack(sources, stacked), contracts.unstack(d_sources, stacked)
    sites, tokens = queries.shape[0], rows[0].shape[0]
    if tokens == 0:
        for gradient in (d_queries, d_key_weights) if accumulate else gradients:
            gradient.zero_()
        return
    d_out = d_out.contiguous().view(sites, tokens, -1)
    d_lse = None if d_lse is None else d_lse.contiguous().view(sites, tokens)
    d_weights = None
    if key_weights is not None:  # a shared weight's gradient is the sum over sites of fp32 rows
        d_weights = d_key_weights if key_weights.dim() == 2 else queries.new_empty(queries.shape, dtype=torch.float32)
    name = backends.choose_backward(
        contracts.spec("phase1_bwd", [*d_out.unbind(0), *rows, *d_rows], len(rows), sites), backend
    )
    backends.launch(
        "phase1_bwd",
        name,
        d_out.device,
        d_out,
        d_lse,
        rows,
        queries,
        _per_site(key_weights, queries),
        eps,
        scale,
        lse.view(sites, tokens),
        logits,
        rstd,
        d_rows,
        accumulate,
        d_queries,
        d_weights,
    )
    if d_weights is not None and d_weights is not d_key_weights:
        d_key_weights.copy_(d_weights.sum(0))
    if checked_mode.is_on():
        arguments = _oracle_arguments(rows, queries, key_weights, eps, scale)
        results: dict[str, Tensor | Sequence[Tensor] | None] = {
            "d_block_representations": d_rows,
            "d_pseudo_queries": d_queries,
            "d_rms_weight": d_key_weights if key_weights is not None else None,
        }
        checked_mode.verify("phase1", name, arguments, results, {"out": d_out, "lse": d_lse})


def _save(ctx: Any, arguments: tuple[Any, ...], outputs: Outputs) -> None:
    sources, queries, key_weights, eps, scale, stacked, _, backend, _ = arguments
    _, lse, logits, rstd = outputs
    ctx.mark_non_differentiable(logits, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*sources, queries, key_weights, lse, logits, rstd)
    ctx.options = (eps, scale, stacked, backend)


def _gradient(
    ctx: Any, backward: Callable[..., list[Tensor]], d_out: Tensor | None, d_lse: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    *sources, queries, key_weights, lse, logits, rstd = ctx.saved_tensors
    if d_out is None:
        first = sources[0][0] if ctx.options[2] else sources[0]
        d_out = first.new_zeros((queries.shape[0], *first.shape))
    found = backward(d_out, d_lse, sources, queries, key_weights, lse, logits, rstd, *ctx.options)
    *d_sources, d_queries, d_key_weights = found
    return d_sources, d_queries, None if key_weights is None else d_key_weights, *(None,) * 6


_phase_1 = Operator(
    "phase_1",
    "(Tensor[] sources, Tensor queries, Tensor? key_weights, float eps, float scale, bool stacked, bool save_statistics, "
    "str backend, str origin) -> (Tensor, Tensor, Tensor, Tensor)",
    "(Tensor d_out, Tensor? d_lse, Tensor[] sources, Tensor queries, Tensor? key_weights, Tensor lse, Tensor logits, Tensor rstd, "
    "float eps, float scale, bool stacked, str backend) -> Tensor[]",
    forward=_forward,
    backward=_backward,
    allocate_forward=_allocate,
    allocate_backward=_allocate_gradients,
    save=_save,
    gradient=_gradient,
)
