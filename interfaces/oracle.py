"""The float64 oracle: every operation's formula in plain torch, apart from all backend code.

`mix`, `phase1`, `phase2`, `step` and `network` take the public arguments in any dtype, convert them to `dtype` (float64 unless
told) and return unrounded results of that dtype. The only rounding inside is the one that belongs to an operation's
meaning: the sum partial + delta (prefix + delta) is rounded to the storage dtype before it is used, straight through
for the gradient, so d_delta = d_partial. `gradients` differentiates any of them by autograd.

`reference` is what the accuracy report, the checked mode and the tests compare with. For every output and gradient it
gives the float64 result and three measures of what float32 arithmetic can do on these very inputs (numerics.py turns
them into budgets): the same formula in float32 by autograd; the closed form that kernels compute (closed_form.py);
and that closed form's first-order rounding noise. It works through the tokens in chunks, because float64 autograd of
a full-size problem does not fit a GPU; gradients of queries and weights are summed over the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnres import closed_form, rounding, scaled
from attnres.numerics import Kind, Reference
from attnres.scaled import SCALED_FP16, ScaledTensor

Sources = Sequence[Tensor | ScaledTensor] | Tensor | ScaledTensor


class Mix(NamedTuple):
    out: Tensor  # [..., D]
    weights: Tensor  # [L, ...]


class Phase1(NamedTuple):
    out: Tensor  # [S, ..., D]
    lse: Tensor  # [S, ...]


class Phase2(NamedTuple):
    out: Tensor  # [..., D]
    new_partial: Tensor  # [..., D]: partial_sum, or the rounded sum partial_sum + delta


class Step(NamedTuple):
    out: Tensor  # [T, D]
    prefix: Tensor | Any  # [T, D], or a ScaledTensor as the argument: its value after the call, to the bit
    blocks: Tensor | Any  # [T, B, D], the same


def mix(
    query: Tensor,
    residuals: Sources,
    rms_weight: Tensor | None = None,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    *,
    output_rms_eps: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Mix:
    """m = sum_i p_i v_i, p = softmax_i(scale * rstd(v_i) * <query * rms_weight, v_i>); RMSNorm(m) where its weight is
    given."""
    sources = _stack(residuals, dtype)
    weights = _logits(sources, query, rms_weight, rms_eps, scale).softmax(0)
    mixed = (weights.unsqueeze(-1) * sources).sum(0)
    return Mix(_rms_norm(mixed, output_rms_weight, rms_eps if output_rms_eps is None else output_rms_eps), weights)


def phase1(
    block_representations: Sources,
    pseudo_queries: Tensor,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    dtype: torch.dtype = torch.float64,
) -> Phase1:
    """The mix for each of S queries, and lse = log sum_i exp(logit_i)."""
    sources = _stack(block_representations, dtype)
    outs, lses = [], []
    for site, query in enumerate(pseudo_queries):
        logits = _logits(sources, query, _site_weight(rms_weight, site), eps, scale)
        outs.append((logits.softmax(0).unsqueeze(-1) * sources).sum(0))
        lses.append(logits.logsumexp(0))
    return Phase1(torch.stack(outs), torch.stack(lses))


def phase2(
    partial_sum: Tensor | ScaledTensor,
    pseudo_query: Tensor,
    inter_out: Tensor | ScaledTensor,
    inter_lse: Tensor,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    delta: Tensor | None = None,
    output_rms_weight: Tensor | None = None,
    output_rms_eps: float | None = None,
    dtype: torch.dtype = torch.float64,
    storage: torch.dtype | str | None = None,
) -> Phase2:
    """h = inter_out + sigmoid(logit(x) - inter_lse) * (x - inter_out), x = partial_sum (+ delta, rounded to `storage`).

    `storage` is partial_sum's dtype or "fp16_scaled" format unless told; `reference` says so, having converted the inputs.
    """
    x = partial_sum.to(dtype)
    if delta is not None:
        exact = x + delta.to(dtype)
        kept = storage or (SCALED_FP16 if isinstance(partial_sum, ScaledTensor) else partial_sum.dtype)
        x = exact + (scaled.rounded(exact.detach(), kept) - exact.detach())
    inter = inter_out.to(dtype)
    gap = (_logits(x, pseudo_query, rms_weight, eps, scale) - inter_lse.to(dtype)).unsqueeze(-1)
    # not inter + sigmoid(gap) * (x - inter): near a gate of 1 the share of inter_out would be lost even in float64
    merged = torch.sigmoid(gap) * x + torch.sigmoid(-gap) * inter
    return Phase2(_rms_norm(merged, output_rms_weight, eps if output_rms_eps is None else output_rms_eps), x)


def step(
    prefix: Tensor | ScaledTensor,
    delta: Tensor | None,
    blocks: Tensor | ScaledTensor,
    norm_weight: Tensor | None,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_norm_eps: float,
    *,
    stochastic_seed: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Step:
    """The serving site, out of place: the mix of blocks[:, :num_blocks] and the updated prefix; what is written in
    place."""
    updated: Any = prefix.clone() if delta is None else new_sum(prefix, delta, stochastic_seed)
    arguments = _step_as_mix(updated, blocks, norm_weight, qk_weight, output_norm_weight, num_blocks, eps)
    out = mix(**arguments, output_rms_eps=output_norm_eps, dtype=dtype).out
    written = blocks.clone()
    if block_write_idx >= 0:
        if isinstance(written, ScaledTensor):
            written.values[:, block_write_idx], written.scale[:, block_write_idx] = updated.values, updated.scale
        else:
            written[:, block_write_idx] = updated
    return Step(out, updated, written)


def new_sum(
    partial: Tensor | ScaledTensor, delta: Tensor, seed: int | None = None, storage: str | None = None
) -> Tensor | ScaledTensor:
    """partial + delta [T, D], to the bit as phase 2 and the step store it: in partial's format, or as `storage` says."""
    exact = partial.to(torch.float64) + delta.double()
    if storage is None and isinstance(partial, Tensor):
        # stochastic rounding is defined on the float32 sum
        return exact.to(partial.dtype) if seed is None else _drawn(exact.float(), partial.dtype, seed)
    found = ScaledTensor.from_tensor(exact.float(), partial.dtype)
    if seed is None:
        return found
    rows = exact.float() * scaled.inverse(found.scale).unsqueeze(-1)
    return ScaledTensor(_drawn(rows, torch.float16, seed), found.scale, partial.dtype)


def _drawn(rows: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    return rounding.stochastic(rows, dtype, seed, rounding.PARTIAL_SUM)


def after_step(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """prefix and blocks, to the bit as a step with these public arguments by name leaves them."""
    found = step(**{name: value for name, value in arguments.items() if name != "out_dtype"})
    return {"prefix": found.prefix, "blocks": found.blocks}


def network(
    inputs: Tensor,
    pseudo_queries: Tensor,
    layers: Sequence[Callable[[Tensor], Tensor]],
    block_size: int,
    eps: float = 1e-6,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    output_rms_weight: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The whole network as the paper writes it: one softmax at each site over the finished blocks and the partial sum.

    `layers` take and return tensors of `dtype`; nothing is rounded on the way. Differentiable by autograd.
    """
    blocks, partial = [inputs.to(dtype)], None

    def site(index: int) -> Tensor:
        output = None if output_rms_weight is None else output_rms_weight[index]
        sources = blocks if partial is None else [*blocks, partial]
        return mix(pseudo_queries[index], sources, _site_weight(rms_weight, index), output, eps, scale, dtype=dtype).out

    for index, layer in enumerate(layers):
        if index % block_size == 0 and partial is not None:
            blocks, partial = [*blocks, partial], None
        update = layer(site(index))
        partial = update if partial is None else partial + update
    return site(-1)


def gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Gradients of `function(*inputs)` with respect to every input, by autograd in `dtype`.

    grad_outputs has one entry for each output that `function` returns; None leaves that output out.
    """
    leaves = [value.detach().to(dtype).clone().requires_grad_() for value in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
        pairs = zip([outputs] if isinstance(outputs, Tensor) else outputs, grad_outputs, strict=True)
        used = [(value, grad.to(dtype)) for value, grad in pairs if grad is not None]
        found = torch.autograd.grad(
            [value for value, _ in used], leaves, [grad for _, grad in used], allow_unused=True, materialize_grads=True
        )
    return list(found)


FUNCTIONS: dict[str, Callable[..., Any]] = {"mix": mix, "phase1": phase1, "phase2": phase2}
STATISTICS = ("weights", "lse")  # float32 whatever the storage
_SOURCES = ("residuals", "block_representations")
_PER_TOKEN = (*_SOURCES, "partial_sum", "delta", "inter_out", "out", "new_partial")  # token axis -2
_PER_TOKEN_STATISTICS = ("inter_lse", "lse", "weights")  # token axis -1


def reference(
    op: str,
    arguments: Mapping[str, Any],
    grad_outputs: Mapping[str, Tensor] | None = None,
    *,
    chunk_tokens: int | None = None,
) -> dict[str, Reference]:
    """Exact results of one call, with what float32 can do: outputs by name, gradients as "d_" + argument name.

    op: "mix", "phase1", "phase2" or "step". arguments: the public ones by name, leading dimensions flattened to one
    token axis (residuals [L, T, D] or L tensors [T, D]); names with value None may be left out, and out_dtype makes no
    difference. grad_outputs: by output name ("out", "lse", "new_partial"); with it come the gradients of all tensor
    arguments, residuals as one stacked [L, T, D]. "step" has no gradient; its in-place results come from `after_step`.
    With stochastic_seed the new sum is the one that rounding.py defines, its reference (of a step: "prefix") the exact
    one, and what is rounded stochastically says so.
    """
    seed = arguments.get("stochastic_seed")
    given = {name: value for name, value in arguments.items() if name not in ("out_dtype", "stochastic_seed")}
    if op == "step":
        return _step_reference(given, seed, chunk_tokens)
    summed = None
    if op == "phase2" and seed is not None:
        summed = _stochastic_sum(given["partial_sum"], given["delta"])
        # as it was drawn; adding zeros to it is exact
        kept = new_sum(given["partial_sum"], given["delta"], seed, given.pop("storage", None))
        given |= {"partial_sum": kept, "delta": torch.zeros_like(given["delta"])}
    storage = _sum_format(given) if op == "phase2" else torch.float64
    tensors, options = _split({name: _exact(value) for name, value in given.items() if name != "storage"})
    grads = {name: grad.detach() for name, grad in (grad_outputs or {}).items() if grad is not None}
    collected: dict[str, dict[str, list[Tensor]]] = {}
    for first, count in _chunks(tensors, chunk_tokens):
        part = {name: _narrow(name, value, first, count) for name, value in tensors.items()}
        part_grads = {name: _narrow(name, grad, first, count) for name, grad in grads.items()}
        given_part = (op, part, options, part_grads)
        evaluations = {"exact": _autograd(*given_part, torch.float64, storage)}
        if _beyond_float32(part):
            # float32 cannot evaluate these formulas as they stand; kernels bring the rows into range first
            evaluations["autograd32"] = evaluations["closed32"] = evaluations["exact"]
            _, evaluations["noise"] = closed_form.evaluate(*given_part, storage, torch.float64)
        else:
            evaluations["autograd32"] = _autograd(*given_part, torch.float32, storage)
            evaluations["closed32"], evaluations["noise"] = closed_form.evaluate(*given_part, storage)
        for which, results in evaluations.items():
            for name, value in results.items():
                collected.setdefault(name, {}).setdefault(which, []).append(value)
    references = {}
    for name, found in collected.items():
        joined = {which: _join(name, values, noise=which == "noise") for which, values in found.items()}
        kind: Kind = "gradient" if name.startswith("d_") else "statistic" if name in STATISTICS else "output"
        plain32 = (joined["autograd32"], joined["closed32"])
        references[name] = Reference(
            joined["exact"], kind, plain32, joined["noise"], name[2:] in _SOURCES, name in _drawn_names(op, given, seed)
        )
    return references if summed is None else {**references, "new_partial": summed}


def _step_reference(given: dict[str, Any], seed: int | None, chunk_tokens: int | None) -> dict[str, Reference]:
    eps = given.pop("output_norm_eps")
    del given["block_write_idx"]
    prefix, delta = given.pop("prefix"), given.pop("delta")
    updated = prefix if delta is None else new_sum(prefix, delta, seed)
    as_mix = {**_step_as_mix(updated, **given), "output_rms_eps": eps}
    found = {"out": reference("mix", as_mix, chunk_tokens=chunk_tokens)["out"]}
    return found if seed is None else {**found, "prefix": _stochastic_sum(prefix, delta)}


def _stochastic_sum(partial: Tensor | ScaledTensor, delta: Tensor) -> Reference:
    exact = partial.to(torch.float64) + delta.double()
    return Reference(exact, "output", (exact.float(),), stochastic=True)


def _drawn_names(op: str, given: Mapping[str, Any], seed: int | None) -> tuple[str, ...]:
    """Of phase 1: what its seed rounds stochastically."""
    if op != "phase1" or seed is None:
        return ()
    # of one format; stacked, its dtype is that of each
    blocks = given["block_representations"]
    first = blocks[0] if isinstance(blocks, (list, tuple)) else blocks
    return ("out",) if first.dtype == torch.float32 else ("out", "d_block_representations")


def _beyond_float32(tensors: Mapping[str, Tensor]) -> bool:
    """Whether squares and products of the sources leave float32's range."""
    return any(bool((value.abs() > 2.0**56).any()) for name, value in tensors.items() if name in _PER_TOKEN)


def _autograd(
    op: str,
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grads: Mapping[str, Tensor],
    dtype: torch.dtype,
    storage: torch.dtype | str,
) -> dict[str, Tensor]:
    extra = {**options, "dtype": dtype, **({"storage": storage} if op == "phase2" else {})}
    leaves = {name: value.detach().to(dtype).requires_grad_(bool(grads)) for name, value in tensors.items()}
    with torch.enable_grad():
        outputs = FUNCTIONS[op](**leaves, **extra)._asdict()
        results = {name: value.detach() for name, value in outputs.items()}
        if "delta" not in tensors:
            results.pop("new_partial", None)
        if grads:
            found = torch.autograd.grad(
                [outputs[name] for name in grads],
                list(leaves.values()),
                [grad.to(dtype) for grad in grads.values()],
                allow_unused=True,
                materialize_grads=True,
            )
            results |= {f"d_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return results


def _logits(sources: Tensor, query: Tensor, weight: Tensor | None, eps: float, scale: float) -> Tensor:
    key = query.to(sources.dtype)
    if weight is not None:
        key = key * weight.to(sources.dtype)
    return scale * (sources.square().mean(-1) + eps).rsqrt() * (key * sources).sum(-1)


def _rms_norm(value: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return value
    return value * (value.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(value.dtype)


def _site_weight(weight: Tensor | None, site: int) -> Tensor | None:
    return weight[site] if weight is not None and weight.dim() == 2 else weight


def _stack(sources: Sources, dtype: torch.dtype) -> Tensor:
    return sources.to(dtype) if isinstance(sources, Tensor) else torch.stack([source.to(dtype) for source in sources])


def _exact(value: Any) -> Any:
    """An argument with each ScaledTensor as the float64 tensor that it stands for."""
    if isinstance(value, (list, tuple)):
        return [_exact(part) for part in value]
    return value.detach().to(torch.float64) if isinstance(value, ScaledTensor) else value


def _sum_format(given: Mapping[str, Any]) -> torch.dtype | str:
    """Of phase 2's new partial sum."""
    partial = given["partial_sum"]
    return SCALED_FP16 if given.get("storage") or isinstance(partial, ScaledTensor) else partial.dtype


def _step_as_mix(
    updated: Tensor | ScaledTensor,
    blocks: Tensor | ScaledTensor,
    norm_weight: Tensor | None,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    eps: float,
) -> dict[str, Any]:
    return {
        "query": qk_weight,
        "residuals": [*blocks[:, :num_blocks].unbind(1), updated],
        "rms_weight": norm_weight,
        "output_rms_weight": output_norm_weight,
        "rms_eps": eps,
    }


def _split(arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in _SOURCES and not isinstance(value, Tensor):
            value = torch.stack(list(value))
        if isinstance(value, Tensor):
            tensors[name] = value
        elif value is not None:
            options[name] = value
    return tensors, options


def token_axis(name: str) -> int | None:
    """The axis over tokens, from the end, of an argument, output or gradient; None where there is none."""
    bare = name.removeprefix("d_")
    return -2 if bare in _PER_TOKEN else -1 if bare in _PER_TOKEN_STATISTICS else None


def _narrow(name: str, value: Tensor, first: int, count: int) -> Tensor:
    axis = token_axis(name)
    return value if axis is None else value.narrow(axis, first, count)


def _join(name: str, values: Sequence[Tensor], noise: bool) -> Tensor:
    axis = token_axis(name)
    if axis is not None:
        return values[0] if len(values) == 1 else torch.cat(list(values), axis)
    if noise:
        return torch.stack(list(values)).norm(dim=0)
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _chunks(tensors: Mapping[str, Tensor], chunk_tokens: int | None) -> Iterator[tuple[int, int]]:
    per_token = {name: value for name, value in tensors.items() if name in _PER_TOKEN}
    largest = max(per_token.values(), key=Tensor.numel)
    tokens, width = largest.shape[-2], max(1, largest.numel() // max(1, largest.shape[-2]))
    # float64 autograd holds about ten tensors of this many elements
    limit = 2**27 if largest.is_cuda else 2**23
    count = chunk_tokens or max(1, limit // width)
    for first in range(0, max(tokens, 1), count):
        yield first, min(count, tokens - first)
