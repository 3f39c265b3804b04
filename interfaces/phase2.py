"""Phase 2 of Block AttnRes (intra-block): merges a block's partial sum into phase 1's result, site by site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnres import backend as backends
from attnres import checked_mode, contracts
from attnres.registration import Operator, Outputs, needs_grad


def phase_2(
    partial_sum: Tensor,
    pseudo_query: Tensor,
    inter_out: Tensor,
    inter_lse: Tensor,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    delta: Tensor | None = None,
    output_rms_weight: Tensor | None = None,
    output_rms_eps: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merges the partial sum by an online softmax (arXiv:2603.15031, the intra-block phase of Block AttnRes).

        x = partial_sum, or partial_sum + delta rounded to their dtype
        logit = scale * <pseudo_query * rms_weight, x> / sqrt(mean(x^2) + eps)
        h = inter_out + sigmoid(logit - inter_lse) * (x - inter_out)
        out = h, or RMSNorm(h, output_rms_eps) * output_rms_weight where that is given

    Args:
        partial_sum: sum of the block's sublayer outputs so far [..., D], bfloat16, float16 or float32.
        pseudo_query: the site's query [D] or [D, 1].
        inter_out, inter_lse: phase_1's results for this site, [..., D] in partial_sum's dtype and float32 [...].
        eps: epsilon of the key's RMSNorm.
        rms_weight: weight of the key's RMSNorm [D]; None is a weight of ones.
        scale: factor of the logit.
        delta: the last sublayer's output [..., D], added to the partial sum in the same pass.
        output_rms_weight: weight [D] of an RMSNorm of h, fused: the PreNorm of the sublayer that follows.
        output_rms_eps: its epsilon; None takes eps.
        backend: "auto", "cute", "triton" or "torch"; None leaves it to use_backend and ATTNRES_BACKEND.

    Returns:
        out [..., D]; with delta (out, new partial sum [..., D]), both with gradient.

    Saved for the backward: x, inter_out, inter_lse, and per token logit and 1/rms in float32. The same inputs give the same
    bits. Least traffic: 3 T D elements forward and 5 T D backward; 5 T D forward with delta.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
        BackendError: the named backend cannot take the call.
    """
    contracts.check_phase_2(
        partial_sum,
        pseudo_query,
        inter_out,
        inter_lse,
        eps,
        rms_weight,
        scale,
        delta=delta,
        output_rms_weight=output_rms_weight,
        output_rms_eps=output_rms_eps,
    )
    differentiable = needs_grad(partial_sum, delta, pseudo_query, rms_weight, inter_out, inter_lse, output_rms_weight)
    outputs = _phase_2(
        differentiable,
        partial_sum,
        delta,
        pseudo_query,
        rms_weight,
        inter_out,
        inter_lse,
        output_rms_weight,
        eps,
        eps if output_rms_eps is None else output_rms_eps,
        scale,
        differentiable,
        *backends.requested(backend),
    )
    return outputs[0] if delta is None else (outputs[0], outputs[1])


def _allocate(
    partial: Tensor,
    delta: Tensor | None,
    query: Tensor,
    key_weight: Tensor | None,
    inter_out: Tensor,
    inter_lse: Tensor,
    output_weight: Tensor | None,
    eps: float,
    output_eps: float,
    scale: float,
    save_statistics: bool,
    backend: str,
    origin: str,
) -> Outputs:
    """out [..., D], new_partial [..., D] (None without delta), logit [...], rstd [...] (None where not wanted)."""
    return (
        partial.new_empty(partial.shape),
        None if delta is None else partial.new_empty(partial.shape),
        inter_lse.new_empty(inter_lse.shape) if save_statistics else None,
        inter_lse.new_empty(inter_lse.shape) if save_statistics else None,
    )


def forward(
    partial: Tensor,
    delta: Tensor | None,
    query: Tensor,
    key_weight: Tensor | None,
    inter_out: Tensor,
    inter_lse: Tensor,
    output_weight: Tensor | None,
    eps: float,
    output_eps: float,
    scale: float,
    save_statistics: bool,
    backend: str,
    origin: str,
) -> Outputs:
    outputs = _allocate(
        partial,
        delta,
        query,
        key_weight,
        inter_out,
        inter_lse,
        output_weight,
        eps,
        output_eps,
        scale,
        save_statistics,
        "",
        "",
    )
    storage = [contracts.rows(tensor) for tensor in (partial, inter_out, delta) if tensor is not None]
    name = backends.choose(contracts.spec("phase2_fwd", storage), (backend, origin))
    tokens = storage[0].shape[0]
    if tokens == 0:
        return outputs
    out, new_partial = (None if value is None else contracts.rows(value) for value in outputs[:2])
    logit, rstd = (None if value is None else contracts.vector(value) for value in outputs[2:])
    query, lse = contracts.vector(query), contracts.vector(inter_lse.contiguous())
    addend = storage[2] if delta is not None else None
    backends.launch(
        "phase2_fwd",
        name,
        partial.device,
        storage[0],
        addend,
        query,
        key_weight,
        storage[1],
        lse,
        output_weight,
        eps,
        output_eps,
        scale,
        out,
        new_partial,
        logit,
        rstd,
    )
    if checked_mode.is_on():
        arguments = _oracle_arguments(
            storage[0], query, storage[1], lse, eps, key_weight, scale, output_weight, output_eps
        )
        checked_mode.verify("phase2", name, {**arguments, "delta": addend}, {"out": out, "new_partial": new_partial})
    return outputs


def _oracle_arguments(
    partial: Tensor,
    query: Tensor,
    inter_out: Tensor,
    inter_lse: Tensor,
    eps: float,
    key_weight: Tensor | None,
    scale: float,
    output_weight: Tensor | None,
    output_eps: float,
) -> dict[str, Any]:
    return {
        "partial_sum": partial,
        "pseudo_query": query,
        "inter_out": inter_out,
        "inter_lse": inter_lse,
        "eps": eps,
        "rms_weight": key_weight,
        "scale": scale,
        "output_rms_weight": output_weight,
        "output_rms_eps": output_eps,
    }


def _allocate_gradients(
    d_out: Tensor,
    d_new_partial: Tensor | None,
    partial: Tensor,
    query: Tensor,
    key_weight: Tensor | None,
    inter_out: Tensor,
    inter_lse: Tensor,
    output_weight: Tensor | None,
    logit: Tensor,
    rstd: Tensor,
    eps: float,
    output_eps: float,
    scale: float,
    backend: str,
) -> list[Tensor]:
    """d_partial, d_inter_out, d_inter_lse, d_query, d_key_weight, d_output_weight (the last two empty without such a weight)."""
    found = [tensor.new_empty(tensor.shape) for tensor in (partial, inter_out, inter_lse, query)]
    return found + [
        query.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        for weight in (key_weight, output_weight)
    ]


def _backward(
    d_out: Tensor,
    d_new_partial: Tensor | None,
    partial: Tensor,
    query: Tensor,
    key_weight: Tensor | None,
    inter_out: Tensor,
    inter_lse: Tensor,
    output_weight: Tensor | None,
    logit: Tensor,
    rstd: Tensor,
    eps: float,
    output_eps: float,
    scale: float,
    backend: str,
) -> list[Tensor]:
    gradients = _allocate_gradients(
        d_out,
        d_new_partial,
        partial,
        query,
        key_weight,
        inter_out,
        inter_lse,
        output_weight,
        logit,
        rstd,
        eps,
        output_eps,
        scale,
        backend,
    )
    fill_gradients(
        gradients,
        d_out,
        d_new_partial,
        partial,
        query,
        key_weight,
        inter_out,
        inter_lse,
        output_weight,
        logit,
        rstd,
        eps,
        output_eps,
        scale,
        backend,
    )
    return gradients


def fill_gradients(
    gradients: list[Tensor],
    d_out: Tensor,
    d_new_partial: Tensor | None,
    partial: Tensor,
    query: Tensor,
    key_weight: Tensor | None,
    inter_out: Tensor,
    inter_lse: Tensor,
    output_weight: Tensor | None,
    logit: Tensor,
    rstd: Tensor,
    eps: float,
    output_eps: float,
    scale: float,
    backend: str,
) -> None:
    """Fills d_partial, d_inter_out, d_inter_lse and the parameters' gradients, which may have any of the dtypes."""
    d_partial, d_inter_out, d_inter_lse, d_query, d_key_weight, d_output_weight = gradients
    partial, inter_out = contracts.rows(partial), contracts.rows(inter_out)
    tokens = partial.shape[0]
    if tokens == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    d_out = contracts.rows(d_out.contiguous())
    d_new_partial = None if d_new_partial is None else contracts.rows(d_new_partial.contiguous())
    d_partial, d_inter_out = contracts.rows(d_partial), contracts.rows(d_inter_out)
    query, d_query = contracts.vector(query), contracts.vector(d_query)
    lse, d_lse = contracts.vector(inter_lse.contiguous()), contracts.vector(d_inter_lse)
    d_key = None if key_weight is None else d_key_weight
    d_output = None if output_weight is None else d_output_weight
    storage = [d_out, partial, inter_out, d_partial, d_inter_out] + ([] if d_new_partial is None else [d_new_partial])
    name = backends.choose_backward(contracts.spec("phase2_bwd", storage), backend)
    backends.launch(
        "phase2_bwd",
        name,
        d_out.device,
        d_out,
        d_new_partial,
        partial,
        query,
        key_weight,
        inter_out,
        lse,
        output_weight,
        eps,
        output_eps,
        scale,
        contracts.vector(logit),
        contracts.vector(rstd),
        d_partial,
        d_inter_out,
        d_lse,
        d_query,
        d_key,
        d_output,
    )
    if checked_mode.is_on():
        # x is given as the partial sum and returned as the new one, by a delta of zeros: so its gradient has both parts
        arguments = _oracle_arguments(partial, query, inter_out, lse, eps, key_weight, scale, output_weight, output_eps)
        results = {
            "d_partial_sum": d_partial,
            "d_pseudo_query": d_query,
            "d_inter_out": d_inter_out,
            "d_inter_lse": d_lse,
            "d_rms_weight": d_key,
            "d_output_rms_weight": d_output,
        }
        grads = {"out": d_out, "new_partial": d_new_partial}
        checked_mode.verify("phase2", name, {**arguments, "delta": torch.zeros_like(partial)}, results, grads)


def _save(ctx: Any, arguments: tuple[Any, ...], outputs: Outputs) -> None:
    partial, delta, query, key_weight, inter_out, inter_lse, output_weight, eps, output_eps, scale, _, backend, _ = (
        arguments
    )
    _, new_partial, logit, rstd = outputs
    ctx.mark_non_differentiable(logit, rstd)
    ctx.set_materialize_grads(False)
    x = partial if delta is None else new_partial
    ctx.save_for_backward(x, query, key_weight, inter_out, inter_lse, output_weight, logit, rstd)
    ctx.options = (eps, output_eps, scale, backend)
    ctx.has_delta = delta is not None


def _gradient(
    ctx: Any,
    backward: Callable[..., list[Tensor]],
    d_out: Tensor | None,
    d_new_partial: Tensor | None,
    *_: Tensor | None,
) -> tuple[Any, ...]:
    x, query, key_weight, inter_out, inter_lse, output_weight, logit, rstd = ctx.saved_tensors
    d_new_partial = d_new_partial if ctx.has_delta else None
    if d_out is None:
        d_out = torch.zeros_like(x)
    found = backward(
        d_out, d_new_partial, x, query, key_weight, inter_out, inter_lse, output_weight, logit, rstd, *ctx.options
    )
    d_partial, d_inter_out, d_inter_lse, d_query, d_key_weight, d_output_weight = found
    return (
        d_partial,
        d_partial if ctx.has_delta else None,
        d_query,
        None if key_weight is None else d_key_weight,
        d_inter_out,
        d_inter_lse,
        None if output_weight is None else d_output_weight,
        *(None,) * 6,
    )


_phase_2 = Operator(
    "phase_2",
    "(Tensor partial, Tensor? delta, Tensor query, Tensor? key_weight, Tensor inter_out, Tensor inter_lse, Tensor? output_weight, "
    "float eps, float output_eps, float scale, bool save_statistics, str backend, str origin) -> (Tensor, Tensor, Tensor, Tensor)",
    "(Tensor d_out, Tensor? d_new_partial, Tensor partial, Tensor query, Tensor? key_weight, Tensor inter_out, Tensor inter_lse, "
    "Tensor? output_weight, Tensor logit, Tensor rstd, float eps, float output_eps, float scale, str backend) -> Tensor[]",
    forward=forward,
    backward=_backward,
    allocate_forward=_allocate,
    allocate_backward=_allocate_gradients,
    save=_save,
    gradient=_gradient,
)
