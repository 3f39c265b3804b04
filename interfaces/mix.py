"""The direct mix: a softmax over all sources of a site (Full AttnRes, and Block AttnRes without the two phases)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnres import backend as backends
from attnres import checked_mode, contracts
from attnres.registration import Operator, Outputs, empty_as, needs_grad
from attnres.repeated import Call, recall, remember


class Options(NamedTuple):
    """What the operator takes that has no gradient."""

    eps: float
    scale: float
    stacked: bool
    save_statistics: bool
    save_mixed: bool
    want_weights: bool
    backend: str
    origin: str
    values: list[Tensor] | None = None  # of scaled sources
    scales: list[Tensor] | None = None
    out_dtype: torch.dtype | None = None


_OPTIONS = (
    "float eps, float scale, bool stacked, bool save_statistics, bool save_mixed, bool want_weights, str backend, str origin, "
    "Tensor[]? values, Tensor[]? scales, ScalarType? out_dtype"
)


def attn_res(
    query: Tensor,
    residuals: Sequence[contracts.Rows] | contracts.Rows,
    rms_weight: Tensor | None = None,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    return_weights: bool = False,
    checkpoint_level: int = 1,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixes residual sources by a softmax over depth (arXiv:2603.15031, Full AttnRes).

        logit_i = scale * <query * rms_weight, v_i> / sqrt(mean(v_i^2) + rms_eps)
        out = sum_i softmax(logit)_i v_i, then RMSNorm(out, rms_eps) * output_rms_weight where that is given

    Args:
        query: pseudo-query [D] or [D, 1].
        residuals: 1 to 64 sources [..., D] of one dtype (bfloat16, float16 or float32) or all of them ScaledTensor, or one
            stacked tensor [L, ..., D]. Nothing is copied: each source may have its own row stride.
        rms_weight: weight of the keys' RMSNorm [D]; None is a weight of ones.
        output_rms_weight: weight [D] of an RMSNorm of the mix, fused: the PreNorm of the sublayer that follows.
        rms_eps: epsilon of both norms.
        scale: factor of the logits.
        return_weights: also return the softmax weights [L, ...], float32, without gradient.
        checkpoint_level: with output_rms_weight, 0 keeps the mix (float32) for the backward, 1 recomputes it.
        out_dtype: dtype of out, of those that dtypes.TABLE lists; None is the sources' dtype.
        backend: "auto", "cute", "triton" or "torch"; None leaves it to use_backend and ATTNRES_BACKEND.

    Returns:
        out [..., D], or (out, weights).

    query and weights may each be bfloat16, float16 or float32; their gradients come in their own dtype. Saved for the
    backward: the inputs and, per source and token, logit and 1/rms in float32. Arithmetic is float32; the same inputs give
    the same bits, gradients included. Least traffic: (L + 1) T D elements forward, (2 L + 1) T D backward.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
        BackendError: the named backend cannot take the call.
    """
    tensors = (*contracts.flat(residuals), query, rms_weight, output_rms_weight)
    key = ("mix", backend, type(residuals), rms_eps, scale, return_weights, checkpoint_level, out_dtype)
    call = recall(tensors, key)
    if call is None:
        sources = contracts.check_mix(
            query,
            residuals,
            rms_weight,
            output_rms_weight,
            rms_eps,
            scale,
            return_weights,
            checkpoint_level,
            out_dtype=out_dtype,
        )
        stand_ins, values, scales = contracts.parts(sources)
        differentiable = needs_grad(query, rms_weight, output_rms_weight, *stand_ins)
        options = Options(
            rms_eps,
            scale,
            contracts.is_stacked(residuals),
            differentiable,
            checkpoint_level == 0 and output_rms_weight is not None,
            return_weights,
            *backends.requested(backend),
            values,
            scales,
            out_dtype,
        )
        call = remember(Call(differentiable, options), tensors, key)
    else:
        stand_ins = list(tensors[:-3])
    outputs = _mix(call, stand_ins, query, rms_weight, output_rms_weight)
    return (outputs[0], outputs[5]) if return_weights else outputs[0]


def _allocate(
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    output_weight: Tensor | None,
    options: Options,
) -> Outputs:
    """out [..., D], mixed [T, D], logits [L, T], rstd [L, T], lse [T], weights [L, ...]; None where not wanted."""
    first, stacked, dtype = sources[0], options.stacked, options.out_dtype
    shape = first.shape[1:] if stacked else first.shape
    depth = first.shape[0] if stacked else len(sources)
    mixed = logits = rstd = lse = weights = None
    if options.save_statistics:
        tokens = math.prod(shape[:-1])
        logits = first.new_empty((depth, tokens), dtype=torch.float32)
        rstd, lse = empty_as(logits), first.new_empty(tokens, dtype=torch.float32)
        if options.save_mixed:
            mixed = first.new_empty((tokens, shape[-1]), dtype=torch.float32)
    if options.want_weights:
        weights = first.new_empty((depth, *shape[:-1]), dtype=torch.float32)
    out = first.new_empty(shape, dtype=dtype) if stacked else empty_as(first, dtype)
    return out, mixed, logits, rstd, lse, weights


def forward(
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    output_weight: Tensor | None,
    options: Options,
    call: Call | None = None,
) -> Outputs:
    outputs = _allocate(sources, query, key_weight, output_weight, options)
    given = (*contracts.slices(sources, options.stacked), query, key_weight, output_weight, *outputs)
    if call is not None and call.replay(given):
        return outputs
    out, *statistics, weights = outputs
    rows, out = contracts.unstack(options.values or sources, options.stacked), contracts.rows(out)
    row_scales = contracts.unstack_scales(options.scales, options.stacked)
    asked = contracts.spec("mix_fwd", rows, len(rows), stored=(out.dtype,), scaled=row_scales is not None)
    name = backends.choose(asked, (options.backend, options.origin))
    tokens = rows[0].shape[0]
    if tokens == 0:
        return outputs
    weights = None if weights is None else weights.view(len(rows), tokens)
    query, eps, scale = contracts.vector(query), options.eps, options.scale
    arguments = (rows, query, key_weight, output_weight, eps, eps, scale, out, *statistics, weights)
    launcher = backends.launch("mix_fwd", name, query.device, *arguments, source_scales=row_scales)
    if checked_mode.is_on():
        oracle = _oracle_arguments(rows, row_scales, query, key_weight, output_weight, eps, scale)
        checked_mode.verify("mix", name, oracle, {"out": out, "weights": weights})
    elif call is not None:
        call.record("mix_fwd", name, launcher, given, arguments)
    return outputs


def _oracle_arguments(
    rows: list[Tensor],
    row_scales: list[Tensor] | None,
    query: Tensor,
    key_weight: Tensor | None,
    output_weight: Tensor | None,
    eps: float,
    scale: float,
) -> dict[str, Any]:
    return {
        "query": query,
        "residuals": contracts.represented(rows, row_scales),
        "rms_weight": key_weight,
        "output_rms_weight": output_weight,
        "rms_eps": eps,
        "scale": scale,
    }


def _allocate_gradients(
    d_out: Tensor,
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    output_weight: Tensor | None,
    mixed: Tensor | None,
    logits: Tensor,
    rstd: Tensor,
    lse: Tensor,
    options: Options,
) -> list[Tensor]:
    """d_sources, then d_query, d_key_weight and d_output_weight (empty where there is no such weight)."""
    found = [empty_as(tensor) for tensor in (*sources, query)]
    return found + [
        query.new_empty(0) if weight is None else empty_as(weight) for weight in (key_weight, output_weight)
    ]


def _backward(*arguments: Any) -> list[Tensor]:
    """As _allocate_gradients, whose arguments it has."""
    gradients = _allocate_gradients(*arguments)
    fill_gradients(gradients, *arguments)
    return gradients


def fill_gradients(
    gradients: list[Tensor],
    d_out: Tensor,
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    output_weight: Tensor | None,
    mixed: Tensor | None,
    logits: Tensor,
    rstd: Tensor,
    lse: Tensor,
    options: Options,
) -> None:
    """Fills d_sources, d_query, d_key_weight and d_output_weight; those of the parameters may have any of the dtypes."""
    *d_sources, d_query, d_key_weight, d_output_weight = gradients
    eps, scale, stacked = options.eps, options.scale, options.stacked
    rows, d_rows = contracts.unstack(options.values or sources, stacked), contracts.unstack(d_sources, stacked)
    row_scales = contracts.unstack_scales(options.scales, stacked)
    tokens = rows[0].shape[0]
    if tokens == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    d_out = contracts.rows(d_out.contiguous())
    query, d_query = contracts.vector(query), contracts.vector(d_query)
    d_key = None if key_weight is None else d_key_weight
    d_output = None if output_weight is None else d_output_weight
    scaled = row_scales is not None
    asked = contracts.spec("mix_bwd", rows, len(rows), gradients=[d_out, *d_rows], scaled=scaled)
    name = backends.choose_backward(asked, options.backend)
    backends.launch(
        "mix_bwd",
        name,
        d_out.device,
        d_out,
        rows,
        query,
        key_weight,
        output_weight,
        eps,
        eps,
        scale,
        mixed,
        logits,
        rstd,
        lse,
        d_rows,
        d_query,
        d_key,
        d_output,
        source_scales=row_scales,
    )
    if checked_mode.is_on():
        arguments = _oracle_arguments(rows, row_scales, query, key_weight, output_weight, eps, scale)
        results: dict[str, Tensor | Sequence[Tensor] | None] = {
            "d_residuals": d_rows,
            "d_query": d_query,
            "d_rms_weight": d_key,
            "d_output_rms_weight": d_output,
        }
        checked_mode.verify("mix", name, arguments, results, {"out": d_out})


def _save(ctx: Any, tensors: tuple[Any, ...], options: Options, outputs: Outputs) -> None:
    sources, query, key_weight, output_weight = tensors
    _, mixed, logits, rstd, lse, _ = outputs
    saved = (query, key_weight, output_weight, mixed if options.save_mixed else None, logits, rstd, lse)
    ctx.save_for_backward(*saved, *sources, *(options.values or ()), *(options.scales or ()))
    ctx.options, ctx.count = options, len(sources)
    if options.values is not None:  # saved above
        ctx.options = options._replace(values=None, scales=None)


def _gradient(
    ctx: Any, backward: Callable[..., list[Tensor]], d_out: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    query, key_weight, output_weight, mixed, logits, rstd, lse, *tensors = ctx.saved_tensors
    sources, values, scales = contracts.thirds(tensors, ctx.count)
    if d_out is None:
        return [None] * ctx.count, None, None, None
    options = ctx.options if values is None else ctx.options._replace(values=values, scales=scales)
    found = backward(d_out, sources, query, key_weight, output_weight, mixed, logits, rstd, lse, options)
    *d_sources, d_query, d_key_weight, d_output_weight = found
    return (
        d_sources,
        d_query,
        None if key_weight is None else d_key_weight,
        None if output_weight is None else d_output_weight,
    )


_mix = Operator(
    "mix",
    Options,
    f"(Tensor[] sources, Tensor query, Tensor? key_weight, Tensor? output_weight, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "(Tensor d_out, Tensor[] sources, Tensor query, Tensor? key_weight, Tensor? output_weight, Tensor? mixed, Tensor logits, "
    f"Tensor rstd, Tensor lse, {_OPTIONS}) -> Tensor[]",
    forward=forward,
    backward=_backward,
    allocate_forward=_allocate,
    allocate_backward=_allocate_gradients,
    save=_save,
    gradient=_gradient,
    results=1,
    statistics=4,
)
