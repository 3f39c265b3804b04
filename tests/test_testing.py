"""attnres.testing holds kernels of others against the oracle: right ones pass, each kind of mistake is named."""

from __future__ import annotations

import doctest
import inspect
import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import attnres
from attnres import ScaledTensor, inputs, numerics, report, testing
from attnres.testing import Shape, assert_within_budget, make_case


def test_the_example_of_the_module_runs() -> None:
    found = doctest.testmod(testing)
    assert found.failed == 0
    assert found.attempted >= 6


@pytest.mark.parametrize("op", inputs.OPS)
@pytest.mark.parametrize(
    "dtype", ["bf16", "fp32", "fp16_scaled", "bf16+out=fp32", "bf16+storage=fp16_scaled", "fp16_scaled+stochastic"]
)
def test_the_torch_backend_passes_and_says_what_the_report_says(op: str, dtype: str) -> None:
    case = make_case(op, Shape(3, 24, 3, 2), dtype=dtype)
    results = report.call(case, "torch")
    measured = assert_within_budget(op, case.arguments, results, case.grad_outputs)
    rows, _ = report.evaluate(case, ["torch"])
    said = {row.tensor: (row.error, row.floor, row.budget) for row in rows if row.error is not None}
    assert {name: (found.error, found.floor, found.budget) for name, found in measured.items()} == said


@triton.jit
def _someones_phase_2(p_x, p_query, p_inter, p_lse, p_out, eps, D: tl.constexpr, ROUND_LOGIT: tl.constexpr):
    """One token a program; ROUND_LOGIT is the mistake."""
    token, column = tl.program_id(0), tl.arange(0, D)
    x = tl.load(p_x + token * D + column).to(tl.float32)
    inter = tl.load(p_inter + token * D + column).to(tl.float32)
    logit = tl.sum(x * tl.load(p_query + column).to(tl.float32)) * tl.rsqrt(tl.sum(x * x) / D + eps)
    if ROUND_LOGIT:
        logit = logit.to(tl.bfloat16).to(tl.float32)
    gate = tl.sigmoid(logit - tl.load(p_lse + token))
    tl.store(p_out + token * D + column, (inter + gate * (x - inter)).to(tl.bfloat16))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_triton_kernel_of_ones_own(wrong: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain: dict[str, Any] = {"key_weight": False, "output_norm": False, "delta": False}
    case = make_case("phase2", Shape(16, 64, 4, **plain), dtype="bf16", device=device)
    given = case.arguments
    out = torch.full_like(given["partial_sum"], torch.nan)
    tensors = [given[name] for name in ("partial_sum", "pseudo_query", "inter_out", "inter_lse")]
    _someones_phase_2[(16,)](*tensors, out, given["eps"], D=64, ROUND_LOGIT=wrong)
    if not wrong:
        assert assert_within_budget("phase2", given, {"out": out})["out"].ratio < 1.05
        return
    with pytest.raises(AssertionError, match=r"phase2 on backend 'mine': out \(bfloat16, \[16, 64\]\)") as caught:
        assert_within_budget("phase2", given, {"out": out}, name="mine")
    assert re.search(r"relative L2 error \S+ \(budget \S+, rounding floor \S+\)", str(caught.value))


def test_leading_dimensions_lists_and_stacked_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(3, 2, 5, 16, generator=generator).bfloat16()
    query, upstream = torch.randn(16, generator=generator), torch.randn(2, 5, 16, generator=generator).bfloat16()
    for residuals in (stacked, list(stacked)):
        leaves = [r.clone().requires_grad_() for r in residuals] if isinstance(residuals, list) else residuals.clone()
        tensors = leaves if isinstance(leaves, list) else [leaves.requires_grad_()]
        out, weights = attnres.attn_res(query, leaves, return_weights=True, backend="torch")
        grads = torch.autograd.grad(out, tensors, upstream)
        arguments = {"query": query, "residuals": residuals}
        results = {"out": out, "weights": weights, "d_residuals": grads if isinstance(leaves, list) else grads[0]}
        found = assert_within_budget("mix", arguments, results, {"out": upstream})
        assert list(found) == ["out", "weights", "d_residuals"]
        wrong = [grad.clone() for grad in grads]
        wrong[-1][..., 0, 3] += 1
        spoilt = {**results, "d_residuals": wrong if isinstance(leaves, list) else wrong[0]}
        with pytest.raises(AssertionError, match="d_residuals"):
            assert_within_budget("mix", arguments, spoilt, {"out": upstream})
    out, lse = attnres.phase_1(stacked, query[None], 1e-6, backend="torch")
    assert out.shape == (1, 2, 5, 16)
    arguments = {"block_representations": stacked, "pseudo_queries": query[None], "eps": 1e-6}
    assert list(assert_within_budget("phase1", arguments, {"out": out, "lse": lse})) == ["out", "lse"]
    assert testing.exact("phase1", arguments)["out"].shape == (1, 10, 16)


def test_scaled_tensors_with_leading_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [ScaledTensor.from_tensor(1e20 * torch.randn(2, 5, 16, generator=generator)) for _ in range(3)]
    queries, partial = torch.randn(2, 16, generator=generator), 1e20 * torch.randn(2, 5, 16, generator=generator)
    out, lse = attnres.phase_1(blocks, queries, 1e-6, storage="fp16_scaled")
    arguments = {"block_representations": blocks, "pseudo_queries": queries, "eps": 1e-6}
    assert list(assert_within_budget("phase1", arguments, {"out": out, "lse": lse})) == ["out", "lse"]
    wrong = out.clone()
    wrong.scale[1, 0, 2] *= 2
    with pytest.raises(AssertionError, match=r"phase1 .* out \(fp16_scaled, \[2, 2, 5, 16\]\) .* in row 12 "):
        assert_within_budget("phase1", arguments, {"out": wrong, "lse": lse})
    merging = {"partial_sum": ScaledTensor.from_tensor(partial), "pseudo_query": queries[0], "inter_out": out[0]}
    merging |= {"inter_lse": lse[0], "eps": 1e-6, "delta": partial / 3, "stochastic_seed": 3}
    h, total = attnres.phase_2(**merging)
    found = assert_within_budget("phase2", merging, {"out": h, "new_partial": total})
    assert 1e-4 < found["new_partial"].error < 1e-3


def test_all_that_is_wrong_is_named() -> None:
    case = make_case("phase1", Shape(4, 32, 3, 2))
    results = report.call(case, "torch")
    assert isinstance(results["out"], Tensor)
    assert isinstance(results["lse"], Tensor)
    wrong = {**results, "out": results["out"] * 1.02, "lse": results["lse"] + 0.01}
    with pytest.raises(AssertionError) as caught:
        assert_within_budget("phase1", case.arguments, wrong, case.grad_outputs)
    assert [line.split(": ")[1].split()[0] for line in str(caught.value).splitlines()] == ["out", "lse"]


def test_a_step_is_right_to_the_bit_in_place() -> None:
    case = make_case("step", Shape(4, 32, 3))
    results = report.call(case, "torch")
    assert list(assert_within_budget("step", case.arguments, results)) == ["out"]
    expected = testing.exact("step", case.arguments)
    for name in ("prefix", "blocks"):
        assert isinstance(results[name], Tensor)
        assert numerics.differing_elements(results[name], expected[name]) == 0
        wrong = results[name].clone()
        wrong[0, 0] += 1
        with pytest.raises(AssertionError, match=f"elements of {name} differ"):
            assert_within_budget("step", case.arguments, {name: wrong, "out": results["out"]})


def test_unusable_results() -> None:
    case = make_case("mix", Shape(4, 32, 3))
    out = report.call(case, "torch")["out"]
    with pytest.raises(
        ValueError, match=r"mix: results d_query; known are out, weights \(gradients need grad_outputs\)"
    ):
        testing.measure("mix", case.arguments, {"d_query": out})
    with pytest.raises(ValueError, match="mix: results are empty"):
        testing.measure("mix", case.arguments, {})
    with pytest.raises(ValueError, match=r"mix: out has shape \[3, 32\], expected \[4, 32\]"):
        testing.measure("mix", case.arguments, {"out": out[:3]})


def test_everything_public_is_documented() -> None:
    for name in testing.__all__:
        value = getattr(testing, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__
