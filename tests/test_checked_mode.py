"""Checked mode in every format of dtypes.TABLE: right results pass, and each result that is wrong once is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnres
from attnres import ScaledTensor, formats, inputs, numerics, oracle, report
from attnres import backend as backends
from attnres.inputs import Shape

EVERY = [(op, name) for op in inputs.OPS for name in formats.DTYPES if formats.read(op, name)]
# each thing that may differ from one dtype of everything
CHOSEN = (
    "bf16/fp32",
    "fp16/bf16",
    "bf16+inter_out=fp16_scaled",
    "bf16+out=fp32",
    "bf16+storage=fp16_scaled",
    "bf16+stochastic",
    "fp32+delta=bf16",
    "fp16_scaled",
    "fp16_scaled+stochastic",
)
# of each launch the arguments that it fills or updates, and what they are in the public result
WRITTEN = {
    "mix_fwd": {"out": "out", "weights": "weights"},
    "mix_bwd": {
        "d_sources": "d_residuals",
        "d_query": "d_query",
        "d_key_weight": "d_rms_weight",
        "d_output_weight": "d_output_rms_weight",
    },
    "phase1_fwd": {"out": "out", "lse": "lse", "out_scale": "out"},
    "phase1_bwd": {
        "d_sources": "d_block_representations",
        "d_queries": "d_pseudo_queries",
        "d_key_weights": "d_rms_weight",
    },
    "phase2_fwd": {"out": "out", "new_partial": "new_partial", "new_partial_scale": "new_partial"},
    "phase2_bwd": {
        "d_partial": "d_partial_sum",
        "d_inter_out": "d_inter_out",
        "d_inter_lse": "d_inter_lse",
        "d_query": "d_pseudo_query",
        "d_key_weight": "d_rms_weight",
        "d_output_weight": "d_output_rms_weight",
    },
    "serve_step": {
        "prefix": "prefix",
        "prefix_scale": "prefix",
        "blocks": "blocks",
        "blocks_scale": "blocks",
        "out": "out",
    },
}
LAUNCHES = {op: [launch for launch in WRITTEN if launch.startswith(op)] for op in inputs.OPS} | {"step": ["serve_step"]}


@pytest.mark.parametrize(("op", "name"), EVERY)
def test_right_results_pass(op: str, name: str) -> None:
    for backend in ("torch", "triton") if name in CHOSEN else ("torch",):
        with attnres.checked("full"):
            report.call(inputs.make_case(op, Shape(2, 24, 2, 2), dtype=name), backend)


@pytest.mark.parametrize(("op", "name"), [choice for choice in EVERY if choice[1] in CHOSEN])
def test_right_rows_pass_where_some_are_looked_at(op: str, name: str) -> None:
    with attnres.checked("sample"):
        report.call(inputs.make_case(op, Shape(100, 24, 3, 2), dtype=name), "torch")


@pytest.mark.parametrize(("op", "name"), [choice for choice in EVERY if choice[1] in CHOSEN])
def test_each_wrong_result_is_named(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = inputs.make_case(op, Shape(5, 24, 3, 2), dtype=name)
    original, broken = backends.launcher, []
    for launch in LAUNCHES[op]:
        for argument, tensor in WRITTEN[launch].items():
            found: list[Tensor] = []
            monkeypatch.setattr(backends, "launcher", _breaking(original, launch, argument, found))
            report.call(case, "torch")
            if not found:  # the format has no such argument
                continue
            with attnres.checked("full"), pytest.raises(attnres.NumericsError, match="on backend 'torch'") as caught:
                report.call(case, "torch")
            assert caught.value.verdict.tensor == tensor, (launch, argument)
            broken.append(argument)
    plain = {argument for launch in LAUNCHES[op] for argument in WRITTEN[launch] if not argument.endswith("_scale")}
    assert set(broken) >= plain
    scaled = "scaled" in name and not (op == "phase1" and "storage" not in name) and "inter_out" not in name
    assert any(argument.endswith("_scale") for argument in broken) == (scaled and op != "mix")


def _breaking(
    original: Callable[..., Any], launch: str, argument: str, found: list[Tensor]
) -> Callable[..., Callable[..., None]]:
    """A launcher after which one element of an argument, if it is given, is off by 5 %, a scale by 2."""

    def launcher(wanted: str, backend: str) -> Callable[..., None]:
        run = original(wanted, backend)

        def wrong(*args: Any, **kwargs: Any) -> None:
            run(*args, **kwargs)
            target = inspect.signature(run).bind(*args, **kwargs).arguments.get(argument)
            if wanted != launch or target is None:
                return
            first = target[-1] if isinstance(target, list) else target
            found.append(first)
            values = first if argument != "blocks" else first[:, 2]  # the one that the step writes
            place = int(values.abs().nan_to_num().argmax())
            flat = values.reshape(-1)
            flat[place] *= 2 if argument.endswith("_scale") else 1.05
            values.copy_(flat.view_as(values))

        return wrong

    return launcher


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("magnitude", [1e20, 1e30])
@pytest.mark.parametrize("op", inputs.OPS)
def test_budgets_are_as_tight_where_float32_squares_overflow(
    op: str, magnitude: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formulas as they stand overflow float32 there, so it is no measure of what can be reached."""
    case = inputs.make_case(op, Shape(5, 40, 3, 2), dtype="fp16_scaled")
    for name in ("residuals", "block_representations", "partial_sum", "inter_out", "delta", "prefix", "blocks"):
        if name in case.arguments:
            case.arguments[name] = _times(case.arguments[name], magnitude)
    for name, reference in oracle.reference(op, case.arguments, case.grad_outputs).items():
        stored = torch.float32 if name in ("weights", "lse", "d_inter_lse") else torch.bfloat16
        found = numerics.judge_reference(reference.exact.to(stored), reference)
        assert found.budget < 4e-3, name
    with attnres.checked("full"):
        report.call(case, backend)
    launch = LAUNCHES[op][-1]
    argument = {"mix": "d_query", "phase1": "d_queries", "phase2": "d_query", "step": "out"}[op]
    monkeypatch.setattr(backends, "launcher", _breaking(backends.launcher, launch, argument, []))
    with attnres.checked("full"), pytest.raises(attnres.NumericsError):
        report.call(case, backend)


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [_times(part, factor) for part in value]
    if isinstance(value, ScaledTensor):
        return ScaledTensor.from_tensor(value.to(torch.float32) * factor, value.dtype)
    return value * factor
