"""Phase 1 of Block AttnRes (inter-block): all S sites of a block mix the N finished block representations at once."""

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
from attnres.scaled import ScaledTensor, new_stand_in


class Options(NamedTuple):
    """What the operator takes that has no gradient."""

    eps: float
    scale: float
    stacked: bool
    save_statistics: bool
    backend: str
    origin: str
    values: list[Tensor] | None = None  # of scaled sources
    scales: list[Tensor] | None = None
    scaled_out: bool = False
    out_dtype: torch.dtype | None = None
    seed: int | None = None


_OPTIONS = (
    "float eps, float scale, bool stacked, bool save_statistics, str backend, str origin, Tensor[]? values, Tensor[]? scales, "
    "bool scaled_out, ScalarType? out_dtype, int? seed"
)


def phase_1(
    block_representations: Sequence[contracts.Rows] | contracts.Rows,
    pseudo_queries: Tensor,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    storage: str | None = None,
    out_dtype: torch.dtype | None = None,
    stochastic_seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor | Any, Tensor]:
    """Mixes the finished blocks for all queries of a block (arXiv:2603.15031, the inter-block phase of Block AttnRes).

        logit_si = scale * <q_s * rms_weight_s, v_i> / sqrt(mean(v_i^2) + eps)
        out_s = sum_i softmax_i(logit_s)_i v_i          lse_s = log sum_i exp(logit_si)

    Args:
        block_representations: 1 to 64 blocks [..., D] of one dtype (bfloat16, float16 or float32) or all of them ScaledTensor,
            or one stacked tensor [N, ..., D].
        pseudo_queries: [S, D].
        eps: epsilon of the keys' RMSNorm.
        rms_weight: weight of the keys' RMSNorm: [D] for all sites, or [S, D], one per site; None is a weight of ones.
        scale: factor of the logits.
        storage: "fp16_scaled" stores out as a ScaledTensor, with scales of the bounds sum_i p_si max |v_i|; None as a plain tensor.
        out_dtype: dtype of out (of a ScaledTensor: the one it acts as), of those that dtypes.TABLE lists; None is the blocks'.
        stochastic_seed: None rounds out to nearest; an int rounds it and the blocks' gradient stochastically, with this seed
            (rounding.py says how). Each call that is to round independently needs a seed of its own.
        backend: "auto", "cute", "triton" or "torch"; None leaves it to use_backend and ATTNRES_BACKEND.

    Returns:
        out [S, ..., D] (a ScaledTensor if `storage` says so), normalised, and lse [S, ...] in float32, both with gradient: what
        phase_2 merges.

    Saved for the backward: the inputs, lse, the logits [S, N, T] and 1/rms [N, T] in float32. Arithmetic is float32; the
    same inputs give the same bits. Least traffic: (N + S) T D elements forward, (2 N + S) T D backward.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
        BackendError: the named backend cannot take the call.
    """
    tensors = (*contracts.flat(block_representations), pseudo_queries, rms_weight)
    other = (eps, scale, storage, out_dtype)
    key = ("phase_1", backend, type(block_representations), *other) if stochastic_seed is None else None
    call = recall(tensors, key)
    if call is None:
        sources = contracts.check_phase_1(
            block_representations,
            pseudo_queries,
            eps,
            rms_weight,
            scale,
            storage=storage,
            out_dtype=out_dtype,
            stochastic_seed=stochastic_seed,
        )
        stand_ins, values, scales = contracts.parts(sources)
        differentiable = needs_grad(pseudo_queries, rms_weight, *stand_ins)
        options = Options(
            eps,
            scale,
            contracts.is_stacked(block_representations),
            differentiable,
            *backends.requested(backend),
            values,
            scales,
            storage is not None,
            out_dtype,
            stochastic_seed,
        )
        call = remember(Call(differentiable, options), tensors, key)
    else:
        stand_ins = list(tensors[:-2])
    out, lse, _, _, out_values, out_scale = _phase_1(call, stand_ins, pseudo_queries, rms_weight)
    return (out if storage is None else ScaledTensor.from_parts(out_values, out_scale, out)), lse


def _allocate(sources: list[Tensor], queries: Tensor, key_weights: Tensor | None, options: Options) -> Outputs:
    """out [S, ..., D], lse [S, ...], logits [S, N, T], rstd [N, T], out's values [S, ..., D] and scale [S, ...].

    The last four are None where not wanted. With scaled_out, out is the stand-in.
    """
    first, stacked, dtype = sources[0], options.stacked, options.out_dtype
    *leading, size = first.shape[1:] if stacked else first.shape
    depth, sites = first.shape[0] if stacked else len(sources), queries.shape[0]
    logits = rstd = None
    if options.save_statistics:
        tokens = math.prod(leading)
        logits = first.new_empty((sites, depth, tokens), dtype=torch.float32)
        rstd = first.new_empty((depth, tokens), dtype=torch.float32)
    lse = first.new_empty((sites, *leading), dtype=torch.float32)
    shape = (sites, *leading, size)
    if not options.scaled_out:
        return first.new_empty(shape, dtype=dtype), lse, logits, rstd, None, None
    out_values = first.new_empty(shape, dtype=torch.float16)
    return new_stand_in(first, shape, dtype or first.dtype), lse, logits, rstd, out_values, torch.empty_like(lse)


def _forward(
    sources: list[Tensor],
    queries: Tensor,
    key_weights: Tensor | None,
    options: Options,
    call: Call | None = None,
) -> Outputs:
    outputs = _allocate(sources, queries, key_weights, options)
    given = (*contracts.slices(sources, options.stacked), queries, key_weights, *outputs)
    if call is None or not call.replay(given):
        fill_outputs(outputs, sources, queries, key_weights, options, call)
    return outputs


def fill_outputs(
    outputs: Outputs,
    sources: list[Tensor],
    queries: Tensor,
    key_weights: Tensor | None,
    options: Options,
    call: Call | None = None,
) -> None:
    """Fills out (or its values and scale), lse and, where they are wanted, logits and rstd."""
    out, lse, logits, rstd, out_values, out_scale = outputs
    eps, scale, stacked, seed = options.eps, options.scale, options.stacked, options.seed
    rows = contracts.unstack(options.values or sources, stacked)
    row_scales = contracts.unstack_scales(options.scales, stacked)
    sites, (tokens, size) = queries.shape[0], rows[0].shape
    out = out if out_values is None else out_values
    out, lse = out.view(sites, tokens, size), lse.view(sites, tokens)
    out_scale = None if out_scale is None else out_scale.view(sites, tokens)
    scaled = row_scales is not None or out_scale is not None
    asked = contracts.spec("phase1_fwd", rows, len(rows), sites, stored=(out.dtype,), scaled=scaled, seed=seed)
    name = backends.choose(asked, (options.backend, options.origin))
    if tokens == 0:
        return
    arguments = (rows, queries, _per_site(key_weights, queries), eps, scale, out, lse, logits, rstd)
    precision = {"source_scales": row_scales, "out_scale": out_scale, "seed": seed}
    launcher = backends.launch("phase1_fwd", name, queries.device, *arguments, **precision)
    if checked_mode.is_on():
        oracle = _oracle_arguments(rows, row_scales, queries, key_weights, eps, scale)
        stored = contracts.scaled_or_plain(out, out_scale)
        stochastic = () if seed is None else ("out",)
        checked_mode.verify("phase1", name, oracle, {"out": stored, "lse": lse}, stochastic=stochastic)
    elif call is not None:
        given = (*contracts.slices(sources, stacked), queries, key_weights, *outputs)
        call.record("phase1_fwd", name, launcher, given, arguments)


def _per_site(key_weights: Tensor | None, queries: Tensor) -> Tensor | None:
    """A view [S, D]."""
    return key_weights if key_weights is None else key_weights.expand(queries.shape)


def _oracle_arguments(
    rows: list[Tensor],
    row_scales: list[Tensor] | None,
    queries: Tensor,
    key_weights: Tensor | None,
    eps: float,
    scale: float,
) -> dict[str, Any]:
    return {
        "block_representations": contracts.represented(rows, row_scales),
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
    options: Options,
) -> list[Tensor]:
    """d_sources, then d_queries and d_key_weights (empty where there is no weight)."""
    d_weights = queries.new_empty(0) if key_weights is None else empty_as(key_weights)
    return [*map(empty_as, sources), empty_as(queries), d_weights]


def _backward(*arguments: Any) -> list[Tensor]:
    """As _allocate_gradients, whose arguments it has."""
    gradients = _allocate_gradients(*arguments)
    fill_gradients(gradients, False, *arguments)
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
    options: Options,
) -> None:
    """Fills d_sources (with `accumulate` adds to them), d_queries and d_key_weights, which may have any of the dtypes."""
    *d_sources, d_queries, d_key_weights = gradients
    eps, scale, stacked = options.eps, options.scale, options.stacked
    if accumulate and checked_mode.is_on():  # the oracle judges what this call alone contributes
        shares = [torch.empty_like(d_source) for d_source in d_sources]
        given = d_out, d_lse, sources, queries, key_weights, lse, logits, rstd, options
        fill_gradients([*shares, d_queries, d_key_weights], False, *given)
        for d_source, share in zip(d_sources, shares, strict=True):
            d_source.add_(share)
        return
    rows, d_rows = contracts.unstack(options.values or sources, stacked), contracts.unstack(d_sources, stacked)
    row_scales = contracts.unstack_scales(options.scales, stacked)
    seed = None if d_rows[0].dtype == torch.float32 else options.seed
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
    rows_of_gradients, scaled = [contracts.rows(d_out), *d_rows], row_scales is not None
    asked = contracts.spec("phase1_bwd", rows, len(rows), sites, gradients=rows_of_gradients, scaled=scaled, seed=seed)
    name = backends.choose_backward(asked, options.backend)
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
        source_scales=row_scales,
        seed=seed,
    )
    if d_weights is not None and d_weights is not d_key_weights:
        d_key_weights.copy_(d_weights.sum(0))
    if checked_mode.is_on():
        arguments = _oracle_arguments(rows, row_scales, queries, key_weights, eps, scale)
        results: dict[str, Tensor | Sequence[Tensor] | None] = {
            "d_block_representations": d_rows,
            "d_pseudo_queries": d_queries,
            "d_rms_weight": d_key_weights if key_weights is not None else None,
        }
        stochastic = () if seed is None else ("d_block_representations",)
        checked_mode.verify("phase1", name, arguments, results, {"out": d_out, "lse": d_lse}, stochastic)


def _save(ctx: Any, tensors: tuple[Any, ...], options: Options, outputs: Outputs) -> None:
    sources, queries, key_weights = tensors
    _, lse, logits, rstd, _, _ = outputs
    saved = (queries, key_weights, lse, logits, rstd)
    ctx.save_for_backward(*saved, *sources, *(options.values or ()), *(options.scales or ()))
    ctx.options, ctx.count = options, len(sources)
    if options.values is not None:  # saved above
        ctx.options = options._replace(values=None, scales=None)


def _gradient(
    ctx: Any, backward: Callable[..., list[Tensor]], d_out: Tensor | None, d_lse: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    queries, key_weights, lse, logits, rstd, *tensors = ctx.saved_tensors
    sources, values, scales = contracts.thirds(tensors, ctx.count)
    options = ctx.options if values is None else ctx.options._replace(values=values, scales=scales)
    if d_out is None:
        first = contracts.slices(sources, options.stacked)[0]
        d_out = first.new_zeros((queries.shape[0], *first.shape))
    found = backward(d_out, d_lse, sources, queries, key_weights, lse, logits, rstd, options)
    *d_sources, d_queries, d_key_weights = found
    return d_sources, d_queries, None if key_weights is None else d_key_weights


_phase_1 = Operator(
    "phase_1",
    Options,
    f"(Tensor[] sources, Tensor queries, Tensor? key_weights, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "(Tensor d_out, Tensor? d_lse, Tensor[] sources, Tensor queries, Tensor? key_weights, Tensor lse, Tensor logits, "
    f"Tensor rstd, {_OPTIONS}) -> Tensor[]",
    forward=_forward,
    backward=_backward,
    allocate_forward=_allocate,
    allocate_backward=_allocate_gradients,
    save=_save,
    gradient=_gradient,
    results=2,
    statistics=2,
)
