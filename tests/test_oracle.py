"""The oracle against formulas written another way, finite differences, and itself: chunked, in float32, in closed
form."""

import math

import pytest
import torch

from attnres import inputs, oracle
from attnres.inputs import Shape

CASES = [
    inputs.make_case(op, shape, kind, dtype)
    for op in ("mix", "phase1", "phase2")
    for shape in (Shape(7, 40, 5, 3), Shape(6, 24, 3, 2, key_weight=False, output_norm=False, delta=False, scale=0.7))
    for kind, dtype in (("normal", "fp32"), ("ties", "bf16"), ("depth", "bf16/fp32"))
]


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mix_by_hand() -> None:
    # sources of equal length: logits are <q, v> / rms(v), and rms(v) is 5 / sqrt(2)
    query, sources = torch.tensor([1.0, 0.0]), torch.tensor([[[3.0, 4.0]], [[4.0, 3.0]], [[-5.0, 0.0]]])
    exponentials = [math.exp(x * math.sqrt(2) / 5) for x in (3, 4, -5)]
    p = [value / sum(exponentials) for value in exponentials]
    got = oracle.mix(query, sources, rms_eps=0.0)
    assert got.out.dtype == torch.float64
    torch.testing.assert_close(got.weights[:, 0], torch.tensor(p, dtype=torch.float64), rtol=1e-14, atol=0)
    expected = [3 * p[0] + 4 * p[1] - 5 * p[2], 4 * p[0] + 3 * p[1]]
    torch.testing.assert_close(got.out[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_mix_options() -> None:
    query, sources, weight, output = randn(8), randn(3, 2, 5, 8, seed=1), randn(8, seed=2), randn(8, seed=3)
    plain = oracle.mix(query * weight * 0.3, list(sources), rms_eps=1e-3)
    got = oracle.mix(query, sources, weight, output, 1e-3, 0.3)
    torch.testing.assert_close(got.weights, plain.weights)
    normed = torch.nn.functional.rms_norm(plain.out, [8], output, 1e-3)
    torch.testing.assert_close(got.out, normed)
    torch.testing.assert_close(got.weights.sum(0), torch.ones(2, 5, dtype=torch.float64))
    other = oracle.mix(query, sources, weight, output, 1e-3, 0.3, output_rms_eps=0.5)
    torch.testing.assert_close(other.out, torch.nn.functional.rms_norm(plain.out, [8], output, 0.5))


def test_two_phases_are_the_direct_mix() -> None:
    sources, queries, weight = randn(4, 6, 16), randn(3, 16, seed=1), 1 + 0.1 * randn(16, seed=2)
    inter = oracle.phase1(sources[:3], queries, 1e-6, weight, 0.8)
    for site, query in enumerate(queries):
        merged = oracle.phase2(sources[3], query, inter.out[site], inter.lse[site], 1e-6, weight, 0.8)
        direct = oracle.mix(query, sources, weight, rms_eps=1e-6, scale=0.8)
        torch.testing.assert_close(merged.out, direct.out, rtol=1e-13, atol=1e-14)


def test_phase1_takes_a_weight_for_each_query() -> None:
    sources, queries, weights = randn(3, 4, 8), randn(2, 8, seed=1), randn(2, 8, seed=2)
    together = oracle.phase1(sources, queries, 1e-6, weights)
    for site in range(2):
        alone = oracle.phase1(sources, queries[site : site + 1], 1e-6, weights[site])
        assert torch.equal(together.out[site], alone.out[0])
        assert torch.equal(together.lse[site], alone.lse[0])


def test_phase2_rounds_the_sum_and_passes_its_gradient_straight_through() -> None:
    partial = torch.tensor([[1.0, 2.0, -3.0, 0.5]], dtype=torch.bfloat16)
    delta = torch.tensor([[2.0**-9, 1.0, 2.0**-7, 0.25]], dtype=torch.bfloat16)
    query, inter_out, inter_lse = randn(4), randn(1, 4, seed=1), randn(1, seed=2)
    got = oracle.phase2(partial, query, inter_out, inter_lse, 1e-6, delta=delta)
    assert got.new_partial.tolist() == [[1.0, 3.0, -3.0, 0.75]]  # 1 + 2^-9 and -3 + 2^-7 are no bfloat16
    assert torch.equal(got.out, oracle.phase2(got.new_partial, query, inter_out, inter_lse, 1e-6).out)

    def function(partial: torch.Tensor, delta: torch.Tensor) -> oracle.Phase2:
        return oracle.phase2(partial, query, inter_out, inter_lse, 1e-6, delta=delta, storage=torch.bfloat16)

    upstream = [randn(1, 4, seed=3), randn(1, 4, seed=4)]
    d_partial, d_delta = oracle.gradients(function, [partial, delta], upstream)
    assert torch.equal(d_partial, d_delta)
    d_x = oracle.gradients(
        lambda x: oracle.phase2(x, query, inter_out, inter_lse, 1e-6).out, [got.new_partial], upstream[:1]
    )[0]
    torch.testing.assert_close(d_partial, d_x + upstream[1])


def test_phase2_keeps_the_share_of_inter_out_at_a_gate_of_one() -> None:
    x, inter_out = torch.ones(1, 4), torch.full((1, 4), 1e20)
    inter_lse = torch.tensor([-100.0])
    merged = oracle.phase2(x, torch.zeros(4), inter_out, inter_lse, 0.0).out
    torch.testing.assert_close(merged, torch.full((1, 4), 1 + 1e20 * math.exp(-100.0), dtype=torch.float64))
    d_inter = oracle.gradients(
        lambda inter: oracle.phase2(x, torch.zeros(4), inter, inter_lse, 0.0).out, [inter_out], [torch.ones(1, 4)]
    )[0]
    torch.testing.assert_close(d_inter, torch.full((1, 4), math.exp(-100.0), dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_step(num_blocks: int) -> None:
    case = inputs.make_case("step", Shape(5, 16, num_blocks + 1), dtype="bf16")
    given = case.arguments
    before = {name: given[name].clone() for name in ("prefix", "blocks")}
    got = oracle.step(**given)
    for name, value in before.items():
        assert torch.equal(given[name].view(torch.int16), value.view(torch.int16)), f"{name} was changed in place"
    assert got.prefix.dtype == got.blocks.dtype == torch.bfloat16
    assert torch.equal(got.prefix, given["prefix"] + given["delta"])
    assert torch.equal(got.blocks[:, num_blocks], got.prefix)
    sources = [*given["blocks"][:, :num_blocks].unbind(1), got.prefix]
    mixed = oracle.mix(given["qk_weight"], sources, given["norm_weight"], rms_eps=given["eps"]).out
    expected = torch.nn.functional.rms_norm(mixed, [16], given["output_norm_weight"].double(), given["output_norm_eps"])
    torch.testing.assert_close(got.out, expected)
    if not num_blocks:
        assert torch.equal(mixed, got.prefix.double())
    unwritten = oracle.step(**{**given, "block_write_idx": -1, "delta": None})
    assert torch.equal(unwritten.prefix, given["prefix"])
    assert torch.equal(unwritten.blocks.view(torch.int16), given["blocks"].view(torch.int16))


def test_gradients_by_finite_differences() -> None:
    values = [randn(6), randn(3, 4, 6, seed=1), randn(6, seed=2), randn(6, seed=3)]
    leaves = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(lambda *v: oracle.mix(*v, 1e-2, 0.9).out, leaves)
    queries, weights = randn(2, 6, seed=4).requires_grad_(), randn(2, 6, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, q, w: tuple(oracle.phase1(v, q, 1e-2, w)), [leaves[1], queries, weights])
    inter = [value.requires_grad_() for value in (randn(4, 6, seed=6), randn(4, 6, seed=7), randn(4, seed=8))]

    def phase2(x: torch.Tensor, q: torch.Tensor, inter_out: torch.Tensor, lse: torch.Tensor, w: torch.Tensor):
        return oracle.phase2(x, q, inter_out, lse, 1e-2, w, 0.9, output_rms_weight=w).out

    assert torch.autograd.gradcheck(phase2, [inter[0], leaves[0], *inter[1:], leaves[2]])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_in_chunks_is_the_same(case: inputs.Case) -> None:
    whole = oracle.reference(case.op, case.arguments, case.grad_outputs)
    chunked = oracle.reference(case.op, case.arguments, case.grad_outputs, chunk_tokens=3)
    assert whole.keys() == chunked.keys()
    for name, reference in whole.items():
        assert reference.noise is not None
        assert chunked[name].noise is not None
        torch.testing.assert_close(chunked[name].exact, reference.exact, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(chunked[name].noise, reference.noise, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_covers_everything(case: inputs.Case) -> None:
    """Exact values are those of the plain functions; every argument has its gradient; both float32 evaluations
    agree."""
    references = oracle.reference(case.op, case.arguments, case.grad_outputs)
    tensors = [name for name, value in case.arguments.items() if isinstance(value, (torch.Tensor, list))]
    outputs = {"mix": {"out", "weights"}, "phase1": {"out", "lse"}, "phase2": {"out"}}[case.op]
    outputs |= {"new_partial"} & case.grad_outputs.keys()
    assert references.keys() == outputs | {f"d_{name}" for name in tensors}
    plain = oracle.FUNCTIONS[case.op](**case.arguments)._asdict()
    for name in outputs:
        assert torch.equal(references[name].exact, plain[name])
    for name, reference in references.items():
        assert reference.kind == (
            "gradient" if name[:2] == "d_" else "statistic" if name in ("weights", "lse") else "output"
        )
        assert reference.exact.dtype == torch.float64
        scale = reference.exact.norm()
        for value in reference.plain32:
            assert value.dtype == torch.float32
            assert (value - reference.exact).norm() <= (3e-3 if case.kind == "ties" else 1e-5) * scale, name


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != "ties"], ids=str)
def test_noise_is_what_float32_does(case: inputs.Case) -> None:
    """The expected error is within 4x of the errors that two float32 evaluations have."""
    for name, reference in oracle.reference(case.op, case.arguments, case.grad_outputs).items():
        assert reference.noise is not None
        found = max(float((value - reference.exact).norm()) for value in reference.plain32)
        expected = float(reference.noise.norm())
        assert found <= 4 * expected, name
        assert expected <= 4 * found, name


def test_reference_of_one_source_has_no_query_gradient() -> None:
    case = inputs.make_case("mix", Shape(4, 16, 1, output_norm=False), dtype="fp32")
    reference = oracle.reference("mix", case.arguments, case.grad_outputs)["d_query"]
    assert reference.exact.abs().max() == 0
    assert reference.noise is not None
    assert 0 < reference.noise.max() < 1e-4


def test_reference_of_no_tokens() -> None:
    for op in ("mix", "phase1"):
        case = inputs.make_case(op, Shape(2, 16, 3, 2))
        names = {"residuals", "block_representations"}
        arguments = {k: [x[:0] for x in v] if k in names else v for k, v in case.arguments.items()}
        grads = {name: grad.narrow(-1 if name == "lse" else -2, 0, 0) for name, grad in case.grad_outputs.items()}
        references = oracle.reference(op, arguments, grads)
        assert references["out"].exact.numel() == 0
        query = references["d_query" if op == "mix" else "d_pseudo_queries"]
        assert query.exact.abs().max() == 0
