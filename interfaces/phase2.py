"""Phase 2 of Block AttnRes (intra-block): merges a block's partial sum into phase 1's result, site by site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnres import backend as backends
from attnres import checked_mode, contracts
from attnres.registration import Operator, Outputs, empty_as, needs_grad
from attnres.repeated import Call, recall, remember
from attnres.scaled import ScaledTensor, new_stand_in


class Options(NamedTuple):
    """What the operator takes that has no gradient."""

    eps: float
    output_eps: float
    scale: float
    save_statistics: bool
    backend: str
    origin: str
    partial_values: Tensor | None = None
    partial_scale: Tensor | None = None
    inter_values: Tensor | None = None
    inter_scale: Tensor | None = None
    scaled_sum: bool = False
    out_dtype: torch.dtype | None = None
    seed: int | None = None


_OPTIONS = (
    "float eps, float output_eps, float scale, bool save_statistics, str backend, str origin, Tensor? partial_values, "
    "Tensor? partial_scale, Tensor? inter_values, Tensor? inter_scale, bool scaled_sum, ScalarType? out_dtype, int? seed"
)


def phase_2(
    partial_sum: contracts.Rows,
    pseudo_query: Tensor,
    inter_out: contracts.Rows,
    inter_lse: Tensor,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    delta: Tensor | None = None,
    output_rms_weight: Tensor | None = None,
    output_rms_eps: float | None = None,
    storage: str | None = None,
    out_dtype: torch.dtype | None = None,
    stochastic_seed: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | Any]:
    """Merges the partial sum by an online softmax (arXiv:2603.15031, the intra-block phase of Block AttnRes).

        x = partial_sum, or partial_sum + delta rounded to the partial sum's storage
        logit = scale * <pseudo_query * rms_weight, x> / sqrt(mean(x^2) + eps)
        h = inter_out + sigmoid(logit - inter_lse) * (x - inter_out)
        out = h, or RMSNorm(h, output_rms_eps) * output_rms_weight where that is given

    Args:
        partial_sum: sum of the block's sublayer outputs so far [..., D], bfloat16, float16, float32 or a ScaledTensor.
        pseudo_query: the site's query [D] or [D, 1].
        inter_out, inter_lse: phase_1's results for this site, [..., D] (dtypes.TABLE lists what goes with the partial sum) and
            float32 [...].
        eps: epsilon of the key's RMSNorm.
        rms_weight: weight of the key's RMSNorm [D]; None is a weight of ones.
        scale: factor of the logit.
        delta: the last sublayer's output [..., D], added to the partial sum in the same pass.
        output_rms_weight: weight [D] of an RMSNorm of h, fused: the PreNorm of the sublayer that follows.
        output_rms_eps: its epsilon; None takes eps.
        storage: with delta, "fp16_scaled" stores the new partial sum as a ScaledTensor; None as partial_sum is.
        out_dtype: dtype of out, of those that dtypes.TABLE lists; None is the partial sum's.
        stochastic_seed: with delta, an int rounds the new partial sum stochastically, with this seed (rounding.py says how); None
            to nearest. Each call that is to round independently needs a seed of its own.
        backend: "auto", "cute", "triton" or "torch"; None leaves it to use_backend and ATTNRES_BACKEND.

    Returns:
        out [..., D]; with delta (out, new partial sum [..., D], a ScaledTensor if so stored), both with gradient.

    Saved for the backward: x, inter_out, inter_lse, and per token logit and 1/rms in float32. The same inputs give the same
    bits. Least traffic: 3 T D elements forward and 5 T D backward; 5 T D forward with delta.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
        BackendError: the named backend cannot take the call.
    """
    tensors = (partial_sum, delta, pseudo_query, rms_weight, inter_out, inter_lse, output_rms_weight)
    key = ("phase_2", backend, eps, scale, output_rms_eps, storage, out_dtype) if stochastic_seed is None else None
    call = recall(tensors, key)
    if call is None:
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
            storage=storage,
            out_dtype=out_dtype,
            stochastic_seed=stochastic_seed,
        )
        partial, partial_values, partial_scale = contracts.part(partial_sum)
        inter, inter_values, inter_scale = contracts.part(inter_out)
        differentiable = needs_grad(partial, delta, pseudo_query, rms_weight, inter, inter_lse, output_rms_weight)
        options = Options(
            eps,
            eps if output_rms_eps is None else output_rms_eps,
            scale,
            differentiable,
            *backends.requested(backend),
            partial_values,
            partial_scale,
            inter_values,
            inter_scale,
            delta is not None and (storage is not None or isinstance(partial_sum, ScaledTensor)),
            out_dtype,
            stochastic_seed,
        )
        call = remember(Call(differentiable, options), tensors, key)
        tensors = (partial, delta, pseudo_query, rms_weight, inter, inter_lse, output_rms_weight)
    out, new_partial, _, _, new_values, new_scale = _phase_2(call, *tensors)
    if delta is None:
        return out
    return out, (
        ScaledTensor.from_parts(new_values, new_scale, new_partial) if call.options.scaled_sum else new_partial
    )


def _allocate(
    partial: Tensor,
    delta: Tensor | None,
    query: Tensor,
    key_weight: Tensor | None,
    inter_out: Tensor,
    inter_lse: Tensor,
    output_weight: Tensor | None,
    options: Options,
) -> Outputs:
    """out [..., D], new_partial [..., D] (None without delta), logit [...], rstd [...], new values [..., D] and scale [...].

    The last four are None where not wanted. With scaled_sum, new_partial is the stand-in.
    """
    new_partial = logit = rstd = new_values = new_scale = None
    if options.scaled_sum:
        new_partial = new_stand_in(partial, partial.shape, partial.dtype)
        new_values = partial.new_empty(partial.shape, dtype=torch.float16)
        new_scale = inter_lse.new_empty(inter_lse.shape)
    elif delta is not None:
        new_partial = empty_as(partial)
    if options.save_statistics:
        logit, rstd = empty_as(inter_lse), empty_as(inter_lse)
    return empty_as(partial, options.out_dtype), new_partial, logit, rstd, new_values, new_scale


def forward(
    partial: Tensor,
    delta: Tensor | None,
    query: Tensor,
    key_weight: Tensor | None,
    inter_out: Tensor,
    inter_lse: Tensor,
    output_weight: Tensor | None,
    options: Options,
    call: Call | None = None,
) -> Outputs:
    tensors = (partial, delta, query, key_weight, inter_out, inter_lse, output_weight)
    outputs = _allocate(*tensors, options)
    given = (*tensors, *outputs)
    if call is not None and call.replay(given):
        return outputs
    out, new_partial, logit, rstd, new_values, new_scale = outputs
    new_partial = new_partial if new_values is None else new_values
    eps, output_eps, scale, seed = options.eps, options.output_eps, options.scale, options.seed
    rows = [
        partial if options.partial_values is None else options.partial_values,
        inter_out if options.inter_values is None else options.inter_values,
    ]
    storage = [contracts.rows(tensor) for tensor in (*rows, delta) if tensor is not None]
    stored = (out.dtype,) if new_partial is None else (out.dtype, new_partial.dtype)
    scales = [
        None if value is None else contracts.vector(value)
        for value in (options.partial_scale, options.inter_scale, new_scale)
    ]
    scaled = any(value is not None for value in scales)
    asked = contracts.spec("phase2_fwd", storage, stored=stored, scaled=scaled, seed=seed)
    name = backends.choose(asked, (options.backend, options.origin))
    tokens = storage[0].shape[0]
    if tokens == 0:
        return outputs
    (x, inter), addend = storage[:2], storage[2] if delta is not None else None
    out, new_partial = contracts.rows(out), None if new_partial is None else contracts.rows(new_partial)
    logit, rstd = (None if value is None else contracts.vector(value) for value in (logit, rstd))
    query, lse = contracts.vector(query), contracts.vector(inter_lse.contiguous())
    numbers, results = (eps, output_eps, scale), (out, new_partial, logit, rstd)
    arguments = (x, addend, query, key_weight, inter, lse, output_weight, *numbers, *results)
    precision = dict(zip(("partial_scale", "inter_scale", "new_partial_scale"), scales, strict=True))
    launcher = backends.launch("phase2_fwd", name, partial.device, *arguments, **precision, seed=seed)
    if checked_mode.is_on():
        checked_x = contracts.scaled_or_plain(x, scales[0])
        if addend is not None and new_partial is not None:
            kept = contracts.scaled_or_plain(new_partial, scales[2])
            checked_mode.verify_sum("phase2", "new_partial", name, checked_x, addend, kept, seed is not None)
            checked_x = kept
        checked_inter = contracts.scaled_or_plain(inter, scales[1])
        oracle = _oracle_arguments(checked_x, query, checked_inter, lse, key_weight, output_weight, options)
        checked_mode.verify("phase2", name, oracle, {"out": out})
    elif call is not None:
        call.record("phase2_fwd", name, launcher, given, arguments)
    return outputs


def _oracle_arguments(
    partial: contracts.Rows,
    query: Tensor,
    inter_out: contracts.Rows,
    inter_lse: Tensor,
    key_weight: Tensor | None,
    output_weight: Tensor | None,
    options: Options,
) -> dict[str, Any]:
    return {
        "partial_sum": partial,
        "pseudo_query": query,
        "inter_out": inter_out,
        "inter_lse": inter_lse,
        "eps": options.eps,
        "rms_weight": key_weight,
        "scale": options.scale,
        "output_rms_weight": output_weight,
        "output_rms_eps": options.output_eps,
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
    delta_dtype: torch.dtype | None,
    options: Options,
) -> list[Tensor]:
    """d_partial, d_inter_out, d_inter_lse, d_query, d_key_weight, d_output_weight (the last two empty without such a weight).

    d_partial is delta's gradient too, and has the wider dtype of the two.
    """
    widest = partial.dtype if delta_dtype is None else torch.promote_types(partial.dtype, delta_dtype)
    found = [empty_as(partial, widest), *(empty_as(tensor) for tensor in (inter_out, inter_lse, query))]
    return found + [
        query.new_empty(0) if weight is None else empty_as(weight) for weight in (key_weight, output_weight)
    ]


def _backward(*arguments: Any) -> list[Tensor]:
    """As _allocate_gradients, whose arguments it has; all but delta_dtype are those of fill_gradients."""
    gradients, given = _allocate_gradients(*arguments), [*arguments[:-2], arguments[-1]]
    fill_gradients(gradients, *given)
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
    options: Options,
) -> None:
    """Fills d_partial, d_inter_out, d_inter_lse and the parameters' gradients, which may have any of the dtypes."""
    d_partial, d_inter_out, d_inter_lse, d_query, d_key_weight, d_output_weight = gradients
    partial = contracts.rows(partial if options.partial_values is None else options.partial_values)
    inter_out = contracts.rows(inter_out if options.inter_values is None else options.inter_values)
    scales = [
        None if value is None else contracts.vector(value) for value in (options.partial_scale, options.inter_scale)
    ]
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
    rows_of_gradients = [d_out, d_partial, d_inter_out] + ([] if d_new_partial is None else [d_new_partial])
    scaled = any(value is not None for value in scales)
    asked = contracts.spec("phase2_bwd", [partial, inter_out], gradients=rows_of_gradients, scaled=scaled)
    name = backends.choose_backward(asked, options.backend)
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
        options.eps,
        options.output_eps,
        options.scale,
        contracts.vector(logit),
        contracts.vector(rstd),
        d_partial,
        d_inter_out,
        d_lse,
        d_query,
        d_key,
        d_output,
        partial_scale=scales[0],
        inter_scale=scales[1],
    )
    if checked_mode.is_on():
        # x is given as the partial sum and returned as the new one, by a delta of zeros: so its gradient has both parts
        x, inter = contracts.scaled_or_plain(partial, scales[0]), contracts.scaled_or_plain(inter_out, scales[1])
        arguments = _oracle_arguments(x, query, inter, lse, key_weight, output_weight, options)
        results = {
            "d_partial_sum": d_partial,
            "d_pseudo_query": d_query,
            "d_inter_out": d_inter_out,
            "d_inter_lse": d_lse,
            "d_rms_weight": d_key,
            "d_output_rms_weight": d_output,
        }
        grads = {"out": d_out, "new_partial": d_new_partial}
        checked_mode.verify("phase2", name, {**arguments, "delta": torch.zeros_like(d_partial)}, results, grads)


def _save(ctx: Any, tensors: tuple[Any, ...], options: Options, outputs: Outputs) -> None:
    partial, delta, query, key_weight, inter_out, inter_lse, output_weight = tensors
    _, new_partial, logit, rstd, new_values, new_scale = outputs
    x = partial if delta is None else new_partial
    x_parts = (new_values, new_scale) if options.scaled_sum else (options.partial_values, options.partial_scale)
    statistics = (query, key_weight, inter_out, inter_lse, output_weight, logit, rstd)
    ctx.save_for_backward(x, *statistics, *x_parts, options.inter_values, options.inter_scale)
    ctx.options = options._replace(partial_values=None, partial_scale=None, inter_values=None, inter_scale=None)
    ctx.delta_dtype = None if delta is None else delta.dtype


def _gradient(
    ctx: Any,
    backward: Callable[..., list[Tensor]],
    d_out: Tensor | None,
    d_new_partial: Tensor | None,
    *_: Tensor | None,
) -> tuple[Any, ...]:
    x, *statistics, x_values, x_scale, inter_values, inter_scale = ctx.saved_tensors
    _, key_weight, _, _, output_weight, _, _ = statistics
    d_new_partial = None if ctx.delta_dtype is None else d_new_partial
    if d_out is None:
        d_out = x.new_zeros(x.shape)
    parts = {"partial_values": x_values, "partial_scale": x_scale}
    options = ctx.options._replace(**parts, inter_values=inter_values, inter_scale=inter_scale)
    found = backward(d_out, d_new_partial, x, *statistics, ctx.delta_dtype, options)
    d_partial, d_inter_out, d_inter_lse, d_query, d_key_weight, d_output_weight = found
    return (
        d_partial.to(x.dtype),
        None if ctx.delta_dtype is None else d_partial.to(ctx.delta_dtype),
        d_query,
        None if key_weight is None else d_key_weight,
        d_inter_out,
        d_inter_lse,
        None if output_weight is None else d_output_weight,
    )


_phase_2 = Operator(
    "phase_2",
    Options,
    "(Tensor partial, Tensor? delta, Tensor query, Tensor? key_weight, Tensor inter_out, Tensor inter_lse, Tensor? output_weight, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "(Tensor d_out, Tensor? d_new_partial, Tensor partial, Tensor query, Tensor? key_weight, Tensor inter_out, Tensor inter_lse, "
    f"Tensor? output_weight, Tensor logit, Tensor rstd, ScalarType? delta_dtype, {_OPTIONS}) -> Tensor[]",
    forward=forward,
    backward=_backward,
    allocate_forward=_allocate,
    allocate_backward=_allocate_gradients,
    save=_save,
    gradient=_gradient,
    results=2,
    statistics=2,
)
