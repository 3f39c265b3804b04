"""Which dtypes go together, float32 outputs, and stochastic rounding: its definition, its evidence, the same bits everywhere."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnres
from attnres import ScaledTensor, contracts, dtypes, inputs, numerics, oracle, rounding
from attnres import backend as backends
from attnres.inputs import Shape
from attnres.scaled import SCALED_FP16
from cute_kernels import config as cute_config

BACKENDS = ("torch", "triton")
EPS = 1e-6
DTYPE = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
BF16, FP16, FP32 = DTYPE.values()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(value: Tensor, storage: str) -> Tensor | ScaledTensor:
    return ScaledTensor.from_tensor(value.bfloat16()) if storage == SCALED_FP16 else value.to(DTYPE[storage])


# --- the table ---

MIXES = [
    (row.storage, *choice) for row in dtypes.TABLE.values() for choice in itertools.product(row.parameters, row.out)
]
MERGES = [
    (row.storage, *choice)
    for row in dtypes.TABLE.values()
    for choice in itertools.product(row.delta, row.inter_out, row.out)
]


def within_budget(op: str, arguments: dict[str, Any], results: dict[str, Any], options: dict[str, Any]) -> None:
    references = oracle.reference(op, arguments)
    for name, value in results.items():
        found = numerics.judge_reference(value, references[name])
        assert found.ok, (name, options, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("storage", "parameters", "out"), MIXES)
def test_sources_with_parameters_and_outputs_of_other_dtypes(
    storage: str, parameters: str, out: str, backend: str
) -> None:
    sources = [stored(rows(3, 24, seed=i), storage) for i in range(3)]
    queries, weight = rows(2, 24, seed=5).to(DTYPE[parameters]), (1 + 0.2 * rows(24, seed=6)).to(DTYPE[parameters])
    options = {"out_dtype": DTYPE[out], "backend": backend}
    mixed = attnres.attn_res(queries[0], sources, weight, weight, **options)
    assert mixed.dtype == DTYPE[out]
    given = {"query": queries[0], "residuals": sources, "rms_weight": weight, "output_rms_weight": weight}
    within_budget("mix", given, {"out": mixed}, options)
    inter, lse = attnres.phase_1(sources, queries, EPS, weight, **options)
    given = {"block_representations": sources, "pseudo_queries": queries, "eps": EPS, "rms_weight": weight}
    within_budget("phase1", given, {"out": inter, "lse": lse}, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("storage", "delta", "inter_out", "out"), MERGES)
def test_partial_sums_with_addends_and_phase_1_results_of_other_dtypes(
    storage: str, delta: str, inter_out: str, out: str, backend: str
) -> None:
    partial, addend = stored(rows(3, 24), storage), rows(3, 24, seed=1).to(DTYPE[delta])
    inter, lse, query = stored(rows(3, 24, seed=2), inter_out), rows(3, seed=3), rows(24, seed=4)
    options = {"out_dtype": DTYPE[out], "backend": backend}
    merged, new = attnres.phase_2(partial, query, inter, lse, EPS, delta=addend, **options)
    assert merged.dtype == DTYPE[out]
    assert (type(new), new.dtype) == (type(partial), partial.dtype)
    given = {
        "partial_sum": partial,
        "pseudo_query": query,
        "inter_out": inter,
        "inter_lse": lse,
        "eps": EPS,
        "delta": addend,
    }
    within_budget("phase2", given, {"out": merged, "new_partial": new}, options)
    with torch.no_grad():
        blocks = stored(rows(3, 2, 24, seed=5), storage)
        prefix = partial.clone()
        step = attnres.attn_res_step(prefix, addend, blocks, None, query, None, 1, 1, EPS, EPS, **options)
    assert step.dtype == DTYPE[out]
    expected = oracle.step(partial, addend, blocks, None, query, None, 1, 1, EPS, EPS)
    assert numerics.judge(step, expected.out, kind="output", plain32=expected.out.float()).ok
    for found, wanted in ((prefix, expected.prefix), (blocks, expected.blocks)):
        assert torch.equal(found.to(torch.float64), wanted.to(torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", [BF16, FP16, FP32])
def test_gradients_have_the_dtypes_of_their_arguments(out: torch.dtype, backend: str) -> None:
    """A float32 partial sum with bf16 addends and fp16 results of phase 1; float32 upstream gradients for bf16 sources."""
    partial, delta, inter = rows(3, 24), rows(3, 24, seed=1).bfloat16(), rows(3, 24, seed=2).half()
    lse, query = rows(3, seed=3), rows(24, seed=4).bfloat16()
    leaves = [value.clone().requires_grad_() for value in (partial, query, inter, lse, delta)]
    merged, new = attnres.phase_2(*leaves[:4], EPS, delta=leaves[4], out_dtype=out, backend=backend)
    grads = {"out": rows(3, 24, seed=6).to(out), "new_partial": rows(3, 24, seed=7)}
    torch.autograd.backward((merged, new), tuple(grads.values()))
    names = ("partial_sum", "pseudo_query", "inter_out", "inter_lse", "delta")
    given = dict(zip(names, (partial, query, inter, lse, delta), strict=True))
    references = oracle.reference("phase2", {**given, "eps": EPS}, grads)
    for name, leaf in zip(names, leaves, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert numerics.judge_reference(leaf.grad, references[f"d_{name}"]).ok, name

    case = inputs.make_case("mix", Shape(3, 24, 3), dtype="bf16")
    sources = [source.requires_grad_() for source in case.arguments.pop("residuals")]
    grad = rows(3, 24, seed=8)
    attnres.attn_res(residuals=sources, **case.arguments, out_dtype=FP32, backend=backend).backward(grad)
    given = {**case.arguments, "residuals": [source.detach() for source in sources]}
    references = oracle.reference("mix", given, {"out": grad})
    assert numerics.judge_reference([source.grad for source in sources], references["d_residuals"]).ok


def test_float32_outputs_have_float32s_error() -> None:
    case = inputs.make_case("mix", Shape(5, 72, 4), dtype="bf16")
    exact = oracle.reference("mix", case.arguments)["out"].exact
    out = attnres.attn_res(**case.arguments, out_dtype=FP32)
    assert (out - exact).norm() < 1e-6 * exact.norm()


S = torch.zeros(3, 8)
ILLEGAL = [
    (lambda: attnres.attn_res(S[0], [S.half()], out_dtype=BF16), "out_dtype is bfloat16", "float16"),
    (lambda: attnres.phase_1([S.bfloat16()], S, EPS, out_dtype=FP16), "out_dtype is float16", "bfloat16"),
    (lambda: attnres.phase_1([S], S, EPS, out_dtype=torch.float64), "out_dtype is float64", "float32"),
    (lambda: attnres.phase_2(S.half(), S[0], S.bfloat16(), S[:, 0], EPS), "inter_out is bfloat16", "float16"),
    (
        lambda: attnres.phase_2(S.bfloat16(), S[0], S.bfloat16(), S[:, 0], EPS, delta=S),
        "delta is float32",
        "bfloat16",
    ),
    (
        lambda: attnres.attn_res_step(S.half(), S, S[:, None].half(), None, S[0], None, 1, -1, EPS, EPS),
        "delta is float32",
        "float16",
    ),
]


@pytest.mark.parametrize(("call", "message", "storage"), ILLEGAL)
def test_what_the_table_does_not_list_is_refused_with_its_row(call: Any, message: str, storage: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == f"{message}; allowed with {dtypes.TABLE[storage]}"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"storage": "fp8"}, ValueError, "storage is 'fp8'; allowed are None and 'fp16_scaled'"),
        ({"storage": SCALED_FP16, "delta": None}, ValueError, "there is none without delta"),
        ({"stochastic_seed": 3, "delta": None}, ValueError, "there is none without delta"),
        ({"stochastic_seed": 3}, ValueError, "float32 result; allowed are bfloat16, float16 and scaled fp16"),
        ({"stochastic_seed": -1, "storage": SCALED_FP16}, ValueError, r"allowed are 0 to 2\*\*63 - 1"),
        ({"stochastic_seed": 1.0}, TypeError, "stochastic_seed is a float; allowed is an int"),
    ],
)
def test_options_that_say_nothing_are_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attnres.phase_2(S, S[0], S, S[:, 0], EPS, **{"delta": S, **given})


def test_cute_refuses_what_it_has_no_kernel_for() -> None:
    call = {
        "op": "phase2_fwd",
        "dtype": BF16,
        "hidden_size": 64,
        "num_sources": 1,
        "num_queries": 1,
        "byte_alignment": 16,
    }
    assert cute_config.refusal(**call) is None
    for options, expected in (
        ({"storage": {BF16, FP32}}, "phase2_fwd has no CuTe kernel yet for float32 beside 16-bit storage"),
        ({"storage": {BF16, FP16}, "scaled": True, "seed": 1}, "None"),
        ({"storage": {BF16}}, "None"),
    ):
        assert expected in str(cute_config.refusal(**call, features=dtypes.features(**options)))
    call["op"] = "serve_step"
    for options, expected in (
        ({"storage": {BF16}, "seed": 1}, "None"),
        ({"storage": {FP16, BF16}, "scaled": True, "seed": 1, "stored": (FP32,)}, "None"),
        ({"storage": {FP16, FP32}}, "serve_step has no CuTe kernel yet for float32 beside 16-bit storage"),
    ):
        assert expected in str(cute_config.refusal(**call, features=dtypes.features(**options)))
    for op, missing in (
        ("mix_fwd", ("gradients of several dtypes", "stochastic rounding")),
        ("mix_bwd", ("gradients of several dtypes", "stochastic rounding")),
        ("phase1_fwd", ("gradients of several dtypes",)),
        ("phase1_bwd", ("gradients of several dtypes",)),
        ("phase2_bwd", ("gradients of several dtypes", "stochastic rounding")),
    ):
        call["op"] = op
        for feature in missing:
            assert f"{op} has no CuTe kernel yet for {feature}" == cute_config.refusal(**call, features=(feature,))


def test_explain_knows_the_options() -> None:
    given = (rows(3, 8).bfloat16(), S[0], rows(3, 8).bfloat16(), S[:, 0], EPS)
    found = attnres.explain(
        attnres.phase_2, *given, delta=rows(3, 8).bfloat16(), stochastic_seed=4, storage=SCALED_FP16
    )
    assert found.forward == "torch"
    assert attnres.explain(attnres.phase_1, [given[0]], S, EPS, storage=SCALED_FP16).backward == "torch"
    prefix, blocks = ScaledTensor.from_tensor(S), ScaledTensor.from_tensor(S[:, None])
    step = attnres.explain(
        attnres.attn_res_step, prefix, S, blocks, None, S[0], None, 1, -1, EPS, EPS, stochastic_seed=1
    )
    assert step.forward == "torch"


# --- stochastic rounding: the definition ---


def test_philox_has_its_published_values() -> None:
    vectors = [
        ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in vectors:
        assert tuple(int(word) for word in rounding.philox(key, tuple(map(torch.tensor, counter)))) == expected


def test_bits_depend_on_seed_stream_and_element_alone() -> None:
    cpu = torch.device("cpu")
    all_rows = rounding.random_bits(5, 1, 0, 20, 37, cpu)
    assert torch.equal(rounding.random_bits(5, 1, 7, 3, 37, cpu), all_rows[7:10])
    assert torch.equal(rounding.random_bits(5, 1, 0, 20, 16, cpu), all_rows[:, :16])
    step, start, *_ = (int(word) for word in rounding.philox(5, tuple(map(torch.tensor, (9, 0, 1, 0)))))
    assert all_rows[9].tolist() == [(step * d + start) % 2**32 >> 16 for d in range(37)]
    for other in ((6, 1, 0), (5, 2, 0), (5 + 2**32, 1, 0), (5, 1, 2**32)):
        share = (rounding.random_bits(*other, 20, 37, cpu) == all_rows).float().mean()
        assert share < 0.01


def test_bits_are_uniform_and_those_of_two_elements_independent() -> None:
    """Over rows: how often the upper three bits of one, and of both, have each value."""
    columns = [0, 1, 2, 3, 8, 64, 4095, 4096, 7168, 2**16, 2**17 - 1]
    upper = rounding.random_bits(11, 0, 0, 4096, 2**17, torch.device("cpu"))[:, columns] >> 13
    for first, second in itertools.combinations(range(len(columns)), 2):
        counts = torch.bincount(8 * upper[:, first] + upper[:, second], minlength=64).double().view(8, 8)
        chi2 = ((counts - 64).square() / 64).sum()  # 63 degrees of freedom
        assert chi2 < 63 + 6 * (2 * 63) ** 0.5, (columns[first], columns[second])
        singly = ((counts.sum(1) - 512).square() / 512).sum()
        assert singly < 7 + 6 * 14**0.5


def test_errors_of_a_row_do_not_add_up() -> None:
    """The variance of sums of rounding errors is the sum of variances, for sums that alternate in sign, too."""
    exact = rows(1, 512, seed=3)
    seeds = 2000
    errors = torch.stack([rounding.stochastic(exact, BF16, seed, 0).double() - exact for seed in range(seeds)])[:, 0]
    variance = errors.square().mean(0).sum()
    signs = torch.ones(512, dtype=torch.float64)
    for factors in (signs, signs.cumsum(0) % 2 * 2 - 1, rows(1, 512, seed=4)[0].sign().double()):
        sums = errors @ factors
        # The fourth moment of a sum is not that of independent errors: hence the margin
        assert abs(sums.square().mean() / variance - 1) < 0.25
        assert sums.mean().abs() < 5 * (variance / seeds).sqrt()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_numbers_that_the_target_has_stay(dtype: torch.dtype) -> None:
    value = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 64)
    rounded = rounding.stochastic(value.float(), dtype, 3, 0)
    assert torch.equal(rounded.nan_to_num(nan=0.5), value.nan_to_num(nan=0.5))
    finite = value.isfinite()
    assert torch.equal(rounded.view(torch.int16)[finite], value.view(torch.int16)[finite])  # the sign of zero, too


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("magnitude", [1.0, 2.0**-16, 2.0**-24, 2.0**-130, 60000.0, 3e38])
def test_the_result_is_a_neighbour_and_right_on_average(dtype: torch.dtype, magnitude: float) -> None:
    value = (torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) - 0.5) * 2 * magnitude
    seeds = 400
    drawn = torch.stack([rounding.stochastic(value, dtype, seed, 0) for seed in range(seeds)])
    measured = numerics.judge(drawn[0], value.double(), kind="output", plain32=value, stochastic=True)
    assert measured.ok
    exact = value.double()
    low, high = (numerics._neighbour(exact, dtype, up) for up in (False, True))
    assert ((drawn.double() == low) | (drawn.double() == high)).all()
    inside = low.isfinite() & high.isfinite() & (low < high)
    share = ((exact - low) / (high - low))[inside]  # probability of the upper neighbour
    found = (drawn.double() == high)[:, inside].double().mean(0)
    # float16's subnormal numbers drop what is finer than 2^-13 of a step
    deviation = (share * (1 - share) / seeds).sqrt() + 2.0**-13
    assert ((found - share).abs() < 5 * deviation).all()
    if len(share):
        assert ((found - share) / deviation).mean().abs() < 5 / math.sqrt(len(share))


def test_overflow_infinity_and_nan() -> None:
    inf, nan = math.inf, math.nan
    value = torch.tensor([[inf, -inf, nan, 65519.0, 65521.0, 65536.0, -70000.0, 65504.0]])
    drawn = torch.stack([rounding.stochastic(value, FP16, seed, 0) for seed in range(50)])[:, 0]
    assert (drawn[:, 0] == inf).all()
    assert (drawn[:, 1] == -inf).all()
    assert drawn[:, 2].isnan().all()
    for column in (3, 4):
        assert set(drawn[:, column].tolist()) == {65504.0, inf}
    assert (drawn[:, 5] == inf).all()
    assert (drawn[:, 6] == -inf).all()
    assert (drawn[:, 7] == 65504).all()
    top = torch.full((1, 8), 2.0**127 * (2 - 2.0**-9))  # halfway between bfloat16's largest number and infinity
    drawn = torch.stack([rounding.stochastic(top, BF16, seed, 0) for seed in range(50)])
    assert set(drawn.flatten().tolist()) == {torch.finfo(BF16).max, inf}


# --- stochastic rounding: the operations ---


@pytest.mark.parametrize("storage", ["bfloat16", "float16", SCALED_FP16])
@pytest.mark.parametrize("size", [3, 40])
def test_torch_and_triton_draw_the_same_sums(storage: str, size: int) -> None:
    """In training and in serving, whatever else the call does."""
    partial, delta, query = stored(rows(5, size), storage), rows(5, size, seed=1).bfloat16(), rows(size, seed=2)
    if storage == "float16":
        delta = delta.half()
    found = []
    for backend, seed in itertools.product(BACKENDS, (7, 2**40 + 7)):
        options = {"stochastic_seed": seed, "backend": backend}
        _, new = attnres.phase_2(
            partial, query, rows(5, size, seed=3).to(delta.dtype), rows(5), EPS, delta=delta, **options
        )
        with torch.no_grad():
            prefix, blocks = partial.clone(), stored(rows(5, 2, size), storage)
            attnres.attn_res_step(prefix, delta, blocks, None, query, None, 1, 1, EPS, EPS, **options)
        found.append(new.to(FP32))
        assert torch.equal(prefix.to(FP32), new.to(FP32))
        assert torch.equal(blocks[:, 1].to(FP32), new.to(FP32))
    expected = [
        value.to(FP32) for value in (_drawn(partial.to(FP32) + delta.float(), storage, seed) for seed in (7, 2**40 + 7))
    ]
    for value, wanted in zip(found, 2 * expected, strict=True):
        assert torch.equal(value, wanted)
    assert not torch.equal(*expected)


def _drawn(exact: Tensor, storage: str, seed: int) -> Tensor | ScaledTensor:
    if storage != SCALED_FP16:
        return rounding.stochastic(exact, DTYPE[storage], seed, rounding.PARTIAL_SUM)
    value = ScaledTensor.from_tensor(exact)
    return ScaledTensor(
        rounding.stochastic(exact / value.scale[:, None], FP16, seed, rounding.PARTIAL_SUM), value.scale
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", [None, SCALED_FP16])
def test_phase_1_rounds_its_output_and_the_blocks_gradient(storage: str | None, backend: str) -> None:
    blocks = [rows(5, 40, seed=i).bfloat16().requires_grad_() for i in range(3)]
    queries, upstream = rows(3, 40, seed=5), rows(3, 5, 40, seed=6)
    arguments = {"block_representations": [b.detach() for b in blocks], "pseudo_queries": queries, "eps": EPS}
    references = oracle.reference("phase1", {**arguments, "stochastic_seed": 1}, {"out": upstream.bfloat16()})
    nearest = attnres.phase_1(blocks, queries, EPS, storage=storage, backend=backend)[0].detach()
    drawn = []
    for seed in (1, 2, 1):
        out, _ = attnres.phase_1(blocks, queries, EPS, storage=storage, stochastic_seed=seed, backend=backend)
        for block in blocks:
            block.grad = None
        (out if storage is None else out.stand_in).backward(upstream.bfloat16())
        grads = [block.grad for block in blocks]
        assert numerics.judge_reference(out.detach(), references["out"]).ok
        assert numerics.judge_reference(grads, references["d_block_representations"]).ok
        drawn.append((out.detach().to(FP32), torch.stack(grads)))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], nearest.to(FP32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_added_to_are_rounded_stochastically(backend: str) -> None:
    """phase1_bwd's `accumulate`: the sum with what is there is rounded once."""
    sources, queries = [rows(5, 40, seed=i).bfloat16() for i in range(3)], rows(2, 40, seed=4)
    d_out = rows(2, 5, 40, seed=5).bfloat16()
    statistics = rows(2, 5), torch.zeros(2, 3, 5), torch.zeros(3, 5)
    out = torch.zeros(2, 5, 40)
    backends.launcher("phase1_fwd", backend)(sources, queries, None, EPS, 1.0, out, *statistics)
    had = [rows(5, 40, seed=10 + i).bfloat16() for i in range(3)]
    given = (d_out, None, sources, queries, None, EPS, 1.0, *statistics)
    run, d_queries = backends.launcher("phase1_bwd", backend), torch.zeros(2, 40)
    alone, summed = [torch.zeros(5, 40) for _ in had], [value.clone() for value in had]
    run(*given, alone, False, d_queries, None)
    run(*given, summed, True, d_queries, None, seed=3)
    for i, (found, share, before) in enumerate(zip(summed, alone, had, strict=True)):
        exact = share.double() + before.double()
        assert numerics.judge(found, exact, kind="gradient", plain32=exact.float(), stochastic=True).ok
        drawn = rounding.stochastic(exact.float(), BF16, 3, rounding.D_SOURCES, i * 5)
        assert (found == drawn).float().mean() > 0.99  # but for where float32 sums differ in their last bit


def test_the_mean_over_seeds_is_the_float32_result() -> None:
    """Of a bf16 partial sum: within the statistical error, where rounding to nearest is off by half of it."""
    partial, delta = rows(4, 64).bfloat16(), rows(4, 64, seed=1).bfloat16() / 256
    exact = partial.double() + delta.double()
    given = (torch.zeros(64), partial, torch.zeros(4), EPS)
    seeds = 300
    total = torch.zeros_like(exact)
    for seed in range(seeds):
        total += attnres.phase_2(partial, *given, delta=delta, stochastic_seed=seed)[1].double()
    low, high = (numerics._neighbour(exact, BF16, up) for up in (False, True))
    deviation = ((exact - low) * (high - exact) / seeds).sqrt()
    assert ((total / seeds - exact).abs() <= 5 * deviation + 1e-12).all()
    nearest = attnres.phase_2(partial, *given, delta=delta)[1].double()
    assert (nearest - exact).norm() > 4 * (total / seeds - exact).norm()


@pytest.mark.parametrize("storage", ["bfloat16", SCALED_FP16])
def test_checked_mode_takes_stochastic_rounding_and_catches_a_third_number(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, delta, query = stored(rows(5, 40), storage), rows(5, 40, seed=1).bfloat16(), rows(40)
    blocks = stored(rows(5, 2, 40, seed=4), storage)

    def calls() -> None:
        given = {"delta": delta, "stochastic_seed": 3}
        out, _ = attnres.phase_1([partial, partial], query[None], EPS, stochastic_seed=5)
        attnres.phase_2(partial, query, out[0], torch.zeros(5), EPS, **given)

    def step() -> None:
        given = partial.clone(), delta, blocks.clone(), None, query, None, 1, 1, EPS, EPS
        attnres.attn_res_step(*given, stochastic_seed=3)

    with attnres.checked("full"):
        calls()
        step()
    original = rounding.stochastic

    def beside(*arguments: Any) -> Tensor:
        value = original(*arguments)
        value.view(torch.int16)[1, 2] += 2
        return value

    monkeypatch.setattr(rounding, "stochastic", beside)
    with attnres.checked("full"), pytest.raises(attnres.NumericsError, match=r"phase1.*out"):
        attnres.phase_1([partial], query[None], EPS, stochastic_seed=5)
    with attnres.checked("full"), pytest.raises(attnres.NumericsError, match=r"step.*prefix"):
        step()


def test_compiled_graphs_round_stochastically() -> None:
    def merge(seed: int, partial: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        query, lse = torch.zeros(24), torch.zeros(4)
        return attnres.phase_2(partial, query, partial, lse, EPS, delta=delta, stochastic_seed=seed, out_dtype=FP32)

    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    given = rows(4, 24).bfloat16(), rows(4, 24, seed=1).bfloat16()
    for seed in (3, 4, 5):
        for eager, found in zip(merge(seed, *given), compiled(seed, *given), strict=True):
            assert torch.equal(eager, found)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["bfloat16", "float16", SCALED_FP16])
def test_torch_and_triton_draw_the_same_sums_on_the_gpu(storage: str, ran: list[tuple[str, str]]) -> None:
    for tokens, size in ((7, 7186), (1000, 2048)):
        partial = stored(rows(tokens, size).cuda(), storage)
        delta = rows(tokens, size, seed=1).cuda().to(FP16 if storage == "float16" else BF16)
        query, lse, inter = torch.zeros(size, device="cuda"), torch.zeros(tokens, device="cuda"), delta.clone()
        found = []
        for backend in ("torch", "triton", "auto"):
            options = {"stochastic_seed": 2**41 + 3, "backend": backend}
            _, new = attnres.phase_2(partial, query, inter, lse, EPS, delta=delta, **options)
            prefix, blocks = partial.clone(), stored(torch.zeros(tokens, 2, size, device="cuda"), storage)
            attnres.attn_res_step(prefix, delta, blocks, None, query, None, 1, 1, EPS, EPS, **options)
            found += [new.to(FP32), prefix.to(FP32), blocks[:, 1].to(FP32)]
        assert all(torch.equal(value, found[0]) for value in found)
    assert ran[-1] == ("serve_step", "cute" if torch.cuda.get_device_capability() == (9, 0) else "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "size"), [(1, 7168), (7, 384), (257, 2304), (1000, 7168)])
def test_cute_draws_the_sums_of_torch(tokens: int, size: int, dtype: torch.dtype, ran: list[tuple[str, str]]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    prefix, delta = (rows(tokens, size, seed=s).cuda().to(dtype) for s in (1, 2))
    query, found = torch.zeros(size, device="cuda"), []
    for backend in ("torch", "cute"):
        options = {"stochastic_seed": 2**62 + 3, "backend": backend}
        new, blocks = prefix.clone(), torch.zeros(tokens, 2, size, device="cuda", dtype=dtype)
        attnres.attn_res_step(new, delta, blocks, None, query, None, 1, 1, EPS, EPS, **options)
        lse = torch.zeros(tokens, device="cuda")
        found.append((new, blocks, attnres.phase_2(prefix, query, delta, lse, EPS, delta=delta, **options)[1]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert ran[-2:] == [("serve_step", "cute"), ("phase2_fwd", "cute")]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "size", "queries"), [(1, 72, 2), (257, 2048, 8), (131, 4096, 16), (40, 7168, 24)])
def test_cute_draws_phase_1_as_torch_does(
    tokens: int, size: int, queries: int, dtype: torch.dtype, ran: list[tuple[str, str]]
) -> None:
    """A block of scaled fp16 twice: the mix is the block, exactly, in every backend, with more bits than bf16, and than fp16 has of
    such small numbers."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    block = ScaledTensor.from_tensor(rows(tokens, size).cuda() * (1.0 if dtype == BF16 else 1e-5))
    query, found = rows(queries, size, seed=1).cuda(), []
    for backend in ("torch", "triton", "cute"):
        options = {"out_dtype": dtype, "stochastic_seed": 2**62 + 3, "backend": backend}
        found.append(attnres.phase_1([block, block], query, EPS, **options)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], block.to(dtype).expand_as(found[0]))
    assert ran[-1] == ("phase1_fwd", "cute")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_cute_rounds_no_nan_to_a_number(dtype: torch.dtype) -> None:
    """Of eight equal blocks: an item of the kernel is one token, and the others are drawn as torch does."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    values, query = rows(9, 2048).cuda(), rows(16, 2048, seed=1).cuda()
    values[4, 100], values[7, 5] = math.nan, math.inf
    block = ScaledTensor.from_tensor(values)
    options = {"out_dtype": dtype, "stochastic_seed": 2**62 + 3}
    found, wanted = (attnres.phase_1([block] * 8, query, EPS, **options, backend=name)[0] for name in ("cute", "torch"))
    assert found[:, (4, 7)].isnan().all()
    others = [t for t in range(9) if t not in (4, 7)]
    assert torch.equal(found[:, others], wanted[:, others])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("storage", [None, SCALED_FP16])
def test_phase_1_on_the_gpu(storage: str | None, backend: str, ran: list[tuple[str, str]]) -> None:
    for shape in (Shape(7, 7186, 3, 5), Shape(1000, 2048, 4, 8), Shape(33, 8192, 12, 24)):
        case = inputs.make_case("phase1", shape, dtype="bf16", device="cuda")
        with attnres.checked("full"), attnres.use_backend(backend):
            blocks = [block.requires_grad_() for block in case.arguments.pop("block_representations")]
            given = {"storage": storage, "stochastic_seed": 12}
            out, lse = attnres.phase_1(blocks, **case.arguments, **given)
            (out.to(FP32).square().sum() + lse.sum()).backward()
    on_cute = backend == "auto" and torch.cuda.get_device_capability() == (9, 0)
    assert ("phase1_bwd", "cute" if on_cute else "triton") in ran


def blocks_gradients(case: inputs.Case, backend: str, had: list[Tensor] | None, seed: int) -> list[Tensor]:
    """Of phase1_bwd, after Triton's forward; added to those that are there, if any."""
    arguments = case.arguments
    stand_ins, values, scales = contracts.parts(arguments["block_representations"])
    sources, queries, weight = values or stand_ins, arguments["pseudo_queries"], arguments["rms_weight"]
    weights = None if weight is None else weight.expand(queries.shape)
    d_out, d_lse = case.grad_outputs["out"], case.grad_outputs["lse"]
    lse, logits = torch.empty_like(d_lse), d_lse.new_empty(len(queries), len(sources), d_lse.shape[1])
    given, statistics = (queries, weights, EPS, arguments["scale"]), (lse, logits, torch.empty_like(logits[0]))
    precision = {} if scales is None else {"source_scales": scales}
    backends.launcher("phase1_fwd", "triton")(sources, *given, torch.empty_like(d_out), *statistics, **precision)
    found = [torch.full_like(value, math.nan) for value in stand_ins] if had is None else [v.clone() for v in had]
    parameters = torch.empty_like(queries), None if weights is None else torch.empty_like(queries)
    run = backends.launcher("phase1_bwd", backend)
    run(d_out, d_lse, sources, *given, *statistics, found, had is not None, *parameters, seed=seed, **precision)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "bf16/fp32", "fp16/fp32", "fp16_scaled", "fp16_scaled/fp32"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 8, 1, 1, key_weight=False),
        Shape(257, 2048, 4, 8, key_weight=False),
        Shape(7, 384, 5, 3),
        Shape(61, 4104, 7, 12),
        Shape(40, 4096, 8, 32, key_weight=False),
        Shape(33, 7168, 8, 24, key_weight=False),
        Shape(33, 7168, 8, 24),
    ],
    ids=lambda shape: shape.for_op("phase1"),
)
def test_cute_draws_the_blocks_gradients_of_triton(shape: Shape, dtype: str, accumulate: bool) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    check_blocks_gradients(inputs.make_case("phase1", shape, dtype=dtype, device="cuda", seed=5), accumulate, "cute")


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16/fp32", "fp16_scaled"])
def test_torch_draws_the_blocks_gradients_of_triton(dtype: str, accumulate: bool) -> None:
    check_blocks_gradients(inputs.make_case("phase1", Shape(5, 40, 3, 2), dtype=dtype), accumulate, "torch")


def check_blocks_gradients(case: inputs.Case, accumulate: bool, backend: str) -> None:
    """Neighbours of the exact numbers, and the same bits but where float32 sums differ."""
    seed = 2**41 + 3
    stand_ins, _, _ = contracts.parts(case.arguments["block_representations"])
    had = [rows(*value.shape, seed=i).to(value) for i, value in enumerate(stand_ins)] if accumulate else None
    references = oracle.reference("phase1", {**case.arguments, "stochastic_seed": seed}, case.grad_outputs)
    reference, equal = references["d_block_representations"], []
    for i, (found, wanted) in enumerate(
        zip(*(blocks_gradients(case, name, had, seed) for name in (backend, "triton")), strict=True)
    ):
        before = 0 if had is None else had[i].double()
        plain32 = [value.double() + before for value in reference[i].plain32]
        judged = {"kind": "gradient", "plain32": plain32, "noise": reference[i].noise, "stochastic": True}
        assert all(numerics.judge(value, reference[i].exact + before, **judged).ok for value in (found, wanted))
        equal.append((found == wanted).float().mean())
    assert torch.stack(equal).mean() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("op", ["mix", "phase1", "phase2"])
def test_float32_outputs_on_the_gpu(op: str, backend: str, ran: list[tuple[str, str]]) -> None:
    for shape in (Shape(1, 384, 2, 3), Shape(257, 2304, 9, 12)):
        case = inputs.make_case(op, shape, dtype="fp16" if op == "mix" else "bf16/fp32", device="cuda")
        function = {"mix": attnres.attn_res, "phase1": attnres.phase_1, "phase2": attnres.phase_2}[op]
        with attnres.checked("full"), attnres.use_backend(backend):
            out = function(**case.arguments, out_dtype=FP32)
        assert (out if isinstance(out, Tensor) else out[0]).dtype == FP32
        if op != "phase1":
            on_cute = backend == "auto" and torch.cuda.get_device_capability() == (9, 0)
            assert ran[-1][1] == ("cute" if on_cute else "triton")


def test_backends_are_told_what_a_call_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[backends.Spec] = []
    original = backends.choose
    monkeypatch.setattr(backends, "choose", lambda spec, request: asked.append(spec) or original(spec, request))
    value = rows(3, 8).bfloat16()
    attnres.attn_res(S[0], [value, value])
    attnres.attn_res(S[0], [value, value], out_dtype=FP32)
    attnres.attn_res(S[0], [ScaledTensor.from_tensor(value)])
    attnres.phase_1([value], S, EPS, storage=SCALED_FP16)
    attnres.phase_1([value], S, EPS, stochastic_seed=1)
    found = [spec.features for spec in asked]
    mixed, scaled = "mixed storage dtypes", "scaled fp16"
    wide = "float32 results of 16-bit storage"
    assert found == [
        (),
        (mixed, wide),
        (mixed, scaled),
        (mixed, scaled),
        ("stochastic rounding",),
    ]
