"""Budgets: a correct kernel always passes, one wrong element or a lost bit of arithmetic always fails."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnres import inputs, numerics, oracle
from attnres.numerics import judge

SIXTEEN = [torch.bfloat16, torch.float16]


def values(rows: int = 64, width: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def float32_noise(exact: Tensor, seed: int, size: float = 2.0) -> Tensor:
    """What an fp32-accurate kernel has before its one rounding: errors of up to `size` float32 ulps of the row's
    RMS."""
    generator = torch.Generator().manual_seed(seed)
    unit = size * 2.0**-23 * exact.square().mean(-1, keepdim=True).sqrt()
    return exact + unit * (2 * torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 1)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_metrics(dtype: torch.dtype) -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    actual = torch.tensor([[3.0, 4.5], [0.0, 2.0]], dtype=dtype)
    found = judge(actual, exact, kind="output")
    assert found.error == pytest.approx(0.5 / math.sqrt(29))
    assert found.largest == pytest.approx(0.5 / math.sqrt(12.5))
    assert (found.worst_row, found.floor, found.ok, found.ratio) == (0, 0.0, False, math.inf)
    assert judge(exact.to(dtype), exact, kind="output").ratio == 0


@pytest.mark.parametrize(("dtype", "floor"), [(torch.bfloat16, 1.66e-3), (torch.float16, 2.08e-4)])
def test_floor(dtype: torch.dtype, floor: float) -> None:
    exact = values()
    found = judge(exact.to(dtype), exact, kind="output")
    assert found.floor == found.error == pytest.approx(floor, rel=0.03)
    assert found.ratio == 1
    assert found.ok
    assert found.budget == pytest.approx(1.05 * found.floor)
    assert judge(exact.to(dtype), exact, kind="gradient").budget == pytest.approx(1.25 * found.floor)


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from([*SIXTEEN, torch.float32]),
    kind=st.sampled_from(["output", "gradient"]),
    rows=st.integers(1, 5),
    width=st.integers(1, 40),
    exponents=st.tuples(st.integers(-24, 10), st.integers(-24, 10)),
    representable=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_correct_rounding_of_float32_passes(
    dtype: torch.dtype,
    kind: numerics.Kind,
    rows: int,
    width: int,
    exponents: tuple[int, int],
    representable: bool,
    seed: int,
) -> None:
    """Also rows of very different size, below fp16's normal numbers, and results that need no rounding at all."""
    exact = values(rows, width, seed) * torch.logspace(*exponents, rows, base=2, dtype=torch.float64)[:, None]
    if representable:
        exact = exact.to(dtype).double()
    plain = float32_noise(exact, seed + 1).float()
    noise = torch.full_like(exact, 2.0**-23) * exact.square().mean(-1, keepdim=True).sqrt()
    found = judge(float32_noise(exact, seed + 2).to(dtype), exact, kind=kind, plain32=plain, noise=noise)
    assert found.ok, found


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([*SIXTEEN, torch.float32]),
    row=st.integers(0, 63),
    column=st.integers(0, 255),
    wrong=st.sampled_from([math.nan, math.inf, -math.inf, 0.0, "negated", "neighbour", "off by 5 %"]),
    kind=st.sampled_from(["output", "gradient"]),
)
def test_one_wrong_element_fails(
    dtype: torch.dtype, row: int, column: int, wrong: float | str, kind: numerics.Kind
) -> None:
    exact = values()
    # the element and its neighbour: ordinary in size, and apart
    exact[row, column], exact[row, column - 1] = 0.9, -0.6
    actual = exact.to(dtype)
    assert judge(actual, exact, kind=kind, plain32=exact.float()).ok
    by_name = {"negated": -actual[row, column], "neighbour": actual[row, column - 1], "off by 5 %": 0.945}
    actual[row, column] = by_name[wrong] if isinstance(wrong, str) else wrong
    found = judge(actual, exact, kind=kind, plain32=exact.float())
    assert not found.ok
    assert found.worst_row == row
    if not isinstance(wrong, str) and not math.isfinite(wrong):
        assert found.error == math.inf


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_worse_than_one_rounding_fails(dtype: torch.dtype) -> None:
    exact = values(512, 512)
    twice = (exact * 0.7).to(dtype).double() / 0.7
    assert not judge(twice.to(dtype), exact, kind="output").ok, "two roundings"
    truncated = torch.where(exact.to(dtype).double().abs() > exact.abs(), exact * (1 - 2.0**-8), exact).to(dtype)
    assert not judge(truncated, exact, kind="output").ok, "truncation instead of rounding"
    assert not judge((exact * (1 + 2.0**-9)).to(dtype), exact, kind="output").ok, "a bias below the floor"
    assert judge((exact * (1 + 2.0**-14)).to(dtype), exact, kind="gradient").ok


def test_float32_storage_is_judged_by_float32_arithmetic() -> None:
    exact = values()
    plain = float32_noise(exact, 1).float()
    error = float((plain - exact).norm() / exact.norm())
    for size, ok in ((6.0, True), (10.0, False)):
        found = judge(float32_noise(exact, 2, size).float(), exact, kind="output", plain32=plain)
        assert found.ok is ok
        assert found.budget == pytest.approx(4 * error)
    assert not judge(exact.bfloat16().float(), exact, kind="output", plain32=plain).ok
    with pytest.raises(ValueError, match="plain32 is missing"):
        judge(exact.float(), exact, kind="gradient")


def test_float32_is_the_worst_of_all_evaluations() -> None:
    exact = values()
    lucky, other = exact.float(), float32_noise(exact, 1, 8.0).float()
    bad = float32_noise(exact, 2, 8.0).float()
    assert not judge(bad, exact, kind="gradient", plain32=lucky).ok
    assert judge(bad, exact, kind="gradient", plain32=[lucky, other]).ok
    assert judge(bad, exact, kind="gradient", plain32=lucky, noise=(other - exact).abs()).ok


def test_cancellation_gives_sixteen_bit_gradients_four_times_float32() -> None:
    exact = values()
    plain = (exact + 0.01 * values(seed=1)).float()
    assert judge((exact + 0.03 * values(seed=2)).bfloat16(), exact, kind="gradient", plain32=plain).ok
    assert not judge((exact + 0.05 * values(seed=2)).bfloat16(), exact, kind="gradient", plain32=plain).ok
    # where float32 is as good as the floor, one rounding of an equally good result must pass: no jump
    for share in (0.2, 0.3, 0.5, 0.9, 1.0, 1.2):
        plain = (exact + share * 1.66e-3 * values(seed=1)).float()
        actual = (exact + share * 1.66e-3 * values(seed=2)).bfloat16()
        assert judge(actual, exact, kind="gradient", plain32=plain).ok, share


def test_statistics() -> None:
    exact = values().abs() + 1
    for error, ok in ((1e-7, True), (1.9e-6, True), (2.2e-6, False), (1e-4, False)):
        assert judge((exact * (1 + error)).float(), exact, kind="statistic").ok is ok, error
    one = exact.float()
    one[3, 5] += 1e-4
    assert not judge(one, exact, kind="statistic").ok
    plain = (exact * (1 + 2e-6)).float()
    assert judge((exact * (1 + 6e-6)).float(), exact, kind="statistic", plain32=plain).ok


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
def test_exactly_zero(dtype: torch.dtype) -> None:
    """Absolute errors then, and only float32's own noise is allowed."""
    exact, noise = torch.zeros(16, dtype=torch.float64), torch.full((16,), 1e-7, dtype=torch.float64)
    assert judge(exact.to(dtype), exact, kind="gradient", plain32=exact.float()).ok
    spurious = torch.full((16,), 2e-7, dtype=dtype)
    assert judge(spurious, exact, kind="gradient", plain32=exact.float(), noise=noise).ok
    assert not judge(spurious, exact, kind="gradient", plain32=exact.float()).ok
    assert not judge(
        torch.full((16,), 1e-5, dtype=dtype), exact, kind="gradient", plain32=exact.float(), noise=noise
    ).ok
    assert not judge(torch.full((16,), math.nan, dtype=dtype), exact, kind="gradient", plain32=exact.float()).ok


def test_a_tiny_row_does_not_widen_the_bound_of_others() -> None:
    exact = values()
    exact[7] *= 1e-9
    found = judge(exact.half(), exact, kind="output")
    assert found.ok
    assert found.largest_budget < 0.01
    one = exact.half()
    one[9, 9] += 0.05
    assert not judge(one, exact, kind="output").ok


def test_overflow_of_the_storage_must_be_the_same() -> None:
    exact = values()
    exact[2, 3], exact[4, 5] = 1e6, -1e6
    assert judge(exact.half(), exact, kind="output").ok
    clamped = exact.half().clamp(-65504, 65504)
    assert not judge(clamped, exact, kind="output").ok
    exact[6, 7] = math.nan
    assert judge(exact.half(), exact, kind="output").ok
    assert not judge(exact.nan_to_num(0.0).half(), exact, kind="output").ok


def test_the_spread_over_rows() -> None:
    exact = torch.ones(11, 8, dtype=torch.float64) * torch.arange(1, 12).view(-1, 1)
    actual = exact.clone()
    actual[:, ::2] *= 1 + 0.01 * torch.arange(11).view(-1, 1)  # half of the elements: row i is off by 0.01 i / sqrt(2)
    found = judge(actual.float(), exact, kind="output", plain32=exact.float())
    expected = [0.01 * i / math.sqrt(2) for i in (1, 5, 9, 10, 10)]
    assert [getattr(found.row_errors, name) for name in ("p10", "p50", "p90", "p99", "max")] == pytest.approx(
        expected, rel=1e-5
    )
    assert found.row_floors == numerics.Quantiles()
    rounded = judge(values().bfloat16(), values(), kind="output")
    assert rounded.row_errors == rounded.row_floors
    assert rounded.row_errors.p10 < rounded.floor < rounded.row_errors.max
    broken = values()
    broken[3, 3] = math.nan
    assert judge(broken.bfloat16(), values(), kind="output").row_errors.max == math.inf
    assert judge(torch.ones(()), torch.ones(()), kind="statistic").row_errors.max == 0


def test_differing_elements() -> None:
    values = torch.tensor([0.0, 1.0, math.nan])
    for dtype in (torch.float32, *SIXTEEN):
        stored = values.to(dtype)
        assert numerics.differing_elements(stored, stored.clone()) == 0
        assert numerics.differing_elements(stored, torch.tensor([-0.0, 1.5, math.nan]).to(dtype)) == 2


def test_nothing_passes_and_shapes_must_agree() -> None:
    empty = torch.empty(0, 8)
    assert judge(empty, empty.double(), kind="output", plain32=empty).ok
    with pytest.raises(ValueError, match="shape"):
        judge(torch.zeros(2, 8), torch.zeros(8, dtype=torch.float64), kind="output", plain32=torch.zeros(8))


def test_each_source_has_its_own_budget() -> None:
    exact = values().view(4, 16, 256)
    exact[2] *= 1e-3
    reference = numerics.Reference(exact, "gradient", (exact.float(),), per_source=True)
    parts = [part.bfloat16() for part in exact]
    assert numerics.judge_reference(parts, reference).ok
    assert numerics.judge_all({"d": exact.bfloat16()}, {"d": reference})["d"].ok
    parts[2] = (exact[2] * 1.05).bfloat16()
    found = numerics.judge_reference(parts, reference)
    assert not found.ok
    assert found.error == pytest.approx(0.05, rel=0.1)
    # stacked it would have been within budget
    assert judge(torch.stack(parts), exact, kind="gradient").error < 1.25 * found.floor


@pytest.mark.parametrize("op", ["mix", "phase1", "phase2"])
@pytest.mark.parametrize("kind", ["normal", "ties", "peaked"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_one_token_is_no_matter_of_luck(op: str, kind: str, dtype: str) -> None:
    """The same float32 arithmetic in another order (D, sources and tokens reversed) passes, over many draws of one
    token."""
    broken = []
    for seed in range(25):
        case = inputs.make_case(op, inputs.Shape(1, 24, 2, 2), kind, dtype, seed=seed)
        references = oracle.reference(op, case.arguments, case.grad_outputs)
        flipped = {
            name: [x.flip(-1) for x in reversed(value)] if isinstance(value, list) else _flip(name, value)
            for name, value in case.arguments.items()
        }
        grads = {name: _flip(name, value) for name, value in case.grad_outputs.items()}
        again = oracle.reference(op, flipped, grads)
        for name, reference in references.items():
            back = again[name].plain32[0]
            if name not in ("lse", "weights", "d_inter_lse"):
                back = back.flip(-1)
            if reference.per_source or name == "weights":
                back = back.flip(0)
            stored = torch.float32 if name in ("lse", "weights", "d_inter_lse") else case.stored_dtype
            measured = numerics.judge_reference(back.to(stored), reference)
            if not measured.ok:
                broken.append((seed, name, measured))
    assert not broken


def _flip(name: str, value: object) -> object:
    return value.flip(-1) if isinstance(value, Tensor) and name not in ("lse", "inter_lse") else value


def test_messages() -> None:
    exact = values()
    actual = exact.bfloat16()
    actual[3, 3] += 1
    verdict = numerics.Verdict("mix", "out", "triton", "bf16", "T64 D256", judge(actual, exact, kind="output"))
    assert not verdict.ok
    error = numerics.NumericsError(verdict)
    assert error.verdict is verdict
    for part in ("mix", "'triton'", "out", "bf16", "T64 D256", "row 3", "budget", "floor"):
        assert part in str(error)
