"""Hold a kernel of your own against the float64 oracle, with the error budgets that attnres's backends are held to.

    >>> import torch
    >>> from attnres import testing
    >>> case = testing.make_case("mix", testing.Shape(tokens=4, hidden_size=64, sources=3), kind="outliers", dtype="bf16")
    >>> def my_kernel(query, residuals, rms_weight, output_rms_weight, rms_eps, scale):
    ...     sources = torch.stack(residuals).float()
    ...     rstd = (sources.square().mean(-1) + rms_eps).rsqrt()
    ...     logits = scale * rstd * (sources @ (query.float() * rms_weight.float()))
    ...     mixed = (logits.softmax(0).unsqueeze(-1) * sources).sum(0)
    ...     rstd_out = (mixed.square().mean(-1, keepdim=True) + rms_eps).rsqrt()
    ...     return (mixed * rstd_out * output_rms_weight.float()).bfloat16()
    >>> out = my_kernel(**case.arguments)
    >>> measured = testing.assert_within_budget("mix", case.arguments, {"out": out})
    >>> measured["out"].error <= 1.05 * measured["out"].floor
    True
    >>> testing.assert_within_budget("mix", case.arguments, {"out": out * 1.01})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    AssertionError: mix on backend 'given': out (bfloat16, [4, 64]) has relative L2 error ... rounding floor ...

Operations and the names of their arguments and results are those of the public functions:

| op | arguments of | results | gradients, with grad_outputs for |
| --- | --- | --- | --- |
| "mix" | attn_res | out, weights | out |
| "phase1" | phase_1 | out, lse | out, lse |
| "phase2" | phase_2 | out, new_partial | out, new_partial |
| "step" | attn_res_step, as they were before the call | out, prefix, blocks | |

The gradient of an argument is the result "d_" + its name, that of a list of tensors a list or stacked. Tensors may have any
leading dimensions, any of the dtypes, and be on any device; sources, sums and what is stored of them may be ScaledTensors.
`make_case` makes cases in any of the formats DTYPES, with the arguments out_dtype, storage and stochastic_seed that they need.
With stochastic_seed what it rounds has the two neighbours of the exact number as its budget; what follows from a sum so rounded
is judged for the bits that rounding.py defines. The budgets are in numerics.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from attnres import numerics, oracle
from attnres.formats import DTYPES
from attnres.inputs import KINDS, OPS, Capture, Case, Shape, load_capture, make_case
from attnres.numerics import Measurement, Quantiles, judge
from attnres.scaled import SCALED_FP16, ScaledTensor

__all__ = [
    "DTYPES",
    "KINDS",
    "OPS",
    "Capture",
    "Case",
    "Measurement",
    "Quantiles",
    "Shape",
    "assert_within_budget",
    "exact",
    "judge",
    "load_capture",
    "make_case",
    "measure",
]

Result = Tensor | ScaledTensor | Sequence[Tensor]  # a list for the gradients of separate sources
_IN_PLACE = ("prefix", "blocks")


def exact(op: str, arguments: Mapping[str, Any], grad_outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The oracle's float64 results by name, one token axis for all leading dimensions; with grad_outputs the gradients too.

    Of a step: prefix and blocks in their storage dtype, to the bit.
    """
    given, upstream = _flat(op, arguments), _flat(op, grad_outputs or {})
    found = {name: reference.exact for name, reference in oracle.reference(op, given, upstream).items()}
    return {**found, **(oracle.after_step(given) if op == "step" else {})}


def measure(
    op: str,
    arguments: Mapping[str, Any],
    results: Mapping[str, Result],
    grad_outputs: Mapping[str, Tensor] | None = None,
) -> dict[str, Measurement]:
    """Error, rounding floor and budget of each result that is given. A step's prefix (unless it is rounded stochastically) and
    blocks have no budget and are left out."""
    references = oracle.reference(op, _flat(op, arguments), _flat(op, grad_outputs or {}))
    known = [*references, *(_IN_PLACE if op == "step" else ())]
    unknown = sorted(results.keys() - set(known))
    if unknown or not results:
        gradients = "" if grad_outputs or op == "step" else " (gradients need grad_outputs)"
        raise ValueError(f"{op}: results {', '.join(unknown) or 'are empty'}; known are {', '.join(known)}{gradients}")
    judged = {name: reference for name, reference in references.items() if name in results}
    flat = _flat(op, results)
    for name, reference in judged.items():
        shape = _shape(flat[name])
        if shape != list(reference.exact.shape):
            raise ValueError(
                f"{op}: {name} has shape {shape}, expected {list(reference.exact.shape)} (leading dimensions as one)"
            )
    return numerics.judge_all(flat, judged)


def assert_within_budget(
    op: str,
    arguments: Mapping[str, Any],
    results: Mapping[str, Result],
    grad_outputs: Mapping[str, Tensor] | None = None,
    *,
    name: str = "given",
) -> dict[str, Measurement]:
    """AssertionError naming tensor, error, floor and budget for each result outside its budget; `measure`'s numbers otherwise.

    name: of the kernel, for the message. A step's prefix and blocks must be right to the bit.
    """
    measured = measure(op, arguments, results, grad_outputs)
    failed = []
    for tensor, measurement in measured.items():
        verdict = numerics.Verdict(op, tensor, name, _dtype(results[tensor]), str(_shape(results[tensor])), measurement)
        if not verdict.ok:
            failed.append(str(verdict))
    if op == "step":
        for tensor, expected in oracle.after_step(arguments).items():
            if tensor in measured:  # a prefix that is rounded stochastically
                continue
            found = results.get(tensor, expected)
            assert not isinstance(found, Sequence)
            differing = numerics.differing_elements(found, expected)
            if differing:
                failed.append(
                    f"step on backend {name!r}: {differing} elements of {tensor} differ, it must be right to the bit"
                )
    if failed:
        raise AssertionError("\n".join(failed))
    return measured


def _flat(op: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """With all leading dimensions of tokens as one."""
    return {name: _flat_value(op, name, value) for name, value in values.items()}


def _flat_value(op: str, name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_flat_one(each, False, oracle.token_axis(name)) for each in value]
    stacked = name.removeprefix("d_") in ("residuals", "block_representations", "lse", "weights")
    return _flat_one(value, stacked or (op == "phase1" and name == "out"), oracle.token_axis(name))


def _flat_one(value: Any, stacked: bool, axis: int | None) -> Any:
    if not isinstance(value, (Tensor, ScaledTensor)) or axis is None:
        return value.detach() if isinstance(value, Tensor) else value
    value = value.detach()
    if isinstance(value, ScaledTensor):
        scale = value.scale.reshape(*value.shape[:stacked], -1)
        return ScaledTensor(value.values.reshape(*scale.shape, value.shape[-1]), scale, value.dtype)
    # [sources or sites] [tokens, ...] [D]
    first, last = value.shape[:stacked], value.shape[value.dim() + axis + 1 :]
    return value.reshape(*first, -1, *last) if value.numel() else value


def _shape(value: Result) -> list[int]:
    return [len(value), *value[0].shape] if isinstance(value, Sequence) else list(value.shape)


def _dtype(value: Result) -> str:
    if isinstance(value, ScaledTensor):
        return SCALED_FP16
    return str((value[0] if isinstance(value, Sequence) else value).dtype).removeprefix("torch.")
