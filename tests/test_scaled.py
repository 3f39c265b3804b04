"""Scaled fp16: the format, ScaledTensor as torch's machinery meets it, and every operation on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree

import attnres
from attnres import ScaledTensor, inputs, numerics, oracle
from attnres import backend as backends
from attnres.inputs import Shape
from attnres.scaled import SCALED_FP16

BACKENDS = ("torch", "triton")
EPS = 1e-6
SMALL = Shape(5, 72, 3, 2)


def rows(*shape: int, magnitude: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)


def magnitudes(tokens: int = 6, size: int = 40, seed: int = 0) -> Tensor:
    """A row each of 1e30, 1e-30, subnormal numbers, zeros, one and of everything between 2^-40 and one."""
    value = rows(tokens, size, seed=seed)
    value *= torch.tensor([1e30, 1e-30, 3e-40, 0.0, 1.0, 1.0])[:tokens, None]
    value[5:] *= torch.exp2(-torch.arange(size) % 41).flip(0)
    return value


# --- the format ---


@pytest.mark.parametrize("magnitude", [2.0**-100, 1e-30, 1e-6, 1.0, 65504.0, 1e5, 1e30, 2.0**126])
def test_every_row_has_its_own_power_of_two(magnitude: float) -> None:
    value = rows(50, 64, magnitude=magnitude / 8)
    scaled = ScaledTensor.from_tensor(value)
    mantissa, _ = scaled.scale.frexp()
    assert (mantissa == 0.5).all()
    peaks = scaled.values.float().abs().amax(-1)
    assert (peaks >= 2**14).all()
    assert (peaks <= 2**15).all()
    exact = value.double()
    error = (scaled.to(torch.float64) - exact).abs()
    # half a unit in the last of 11 bits, and below 2^-28 of the row's largest half of a fixed spacing
    assert (error <= torch.maximum(2.0**-11 * exact.abs(), 2.0**-39 * exact.abs().amax(-1, keepdim=True))).all()
    assert torch.equal(scaled.to(torch.float64), scaled.to(torch.float32).double())


def test_sixteen_bit_values_come_back_exactly() -> None:
    value = rows(20, 64).half()
    assert torch.equal(ScaledTensor.from_tensor(value).to(torch.float16), value)
    wide = rows(20, 64, magnitude=1e30, dtype=torch.bfloat16)
    assert torch.equal(ScaledTensor.from_tensor(wide).to(torch.bfloat16), wide)


def test_special_rows() -> None:
    inf, nan = math.inf, math.nan
    value = torch.tensor(
        [[0.0, -0.0, 0.0], [inf, 1.0, -3.0], [nan, -inf, 2.0**-30], [nan, inf, inf], [2.0**-149, -(2.0**-140), 0.0]]
    )
    scaled = ScaledTensor.from_tensor(value)
    assert scaled.scale.tolist() == [1.0, 2.0 ** (1 - 14), 2.0 ** (-30 - 14), 1.0, 2.0**-126]
    assert torch.equal(scaled.to().nan_to_num(nan=0.5), value.nan_to_num(nan=0.5))
    assert scaled.values[0].signbit().tolist() == [False, True, False]


def test_numbers_below_2_to_the_minus_140_are_exact() -> None:
    value = torch.arange(1, 257).float() * 2.0**-149
    assert torch.equal(ScaledTensor.from_tensor(value).to(), value)


@pytest.mark.parametrize("seed", [None, 3])
def test_torch_and_triton_store_the_same_bits(seed: int | None) -> None:
    """A partial sum, whose float32 value both find: it alone is rounded."""
    partial, delta = magnitudes(seed=1), magnitudes(seed=2) / 3
    partial[4, 7] = math.inf
    found = []
    for backend in BACKENDS:
        given = {"delta": delta, "storage": SCALED_FP16, "stochastic_seed": seed, "backend": backend}
        _, new = attnres.phase_2(partial, torch.zeros(40), partial, torch.zeros(6), EPS, **given)
        found.append(new)
    expected = ScaledTensor.from_tensor(partial + delta)
    assert torch.equal(found[0].scale, expected.scale)
    if seed is None:
        assert torch.equal(found[0].values, expected.values)
    for name in ("values", "scale"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


# --- as a tensor ---


def test_the_gradient_goes_straight_through_the_rounding() -> None:
    value = rows(3, 8, dtype=torch.bfloat16).requires_grad_()
    scaled = ScaledTensor.from_tensor(value)
    assert scaled.requires_grad
    assert scaled.dtype == torch.bfloat16
    upstream = rows(3, 8, seed=1)
    scaled.to(torch.float32).backward(upstream)
    assert torch.equal(value.grad, upstream.bfloat16())
    assert not scaled.detach().requires_grad
    assert scaled.detach().values is scaled.values
    with torch.no_grad():
        assert not ScaledTensor.from_tensor(value).requires_grad


def test_a_leaf_gathers_its_gradient() -> None:
    leaf = ScaledTensor.from_tensor(rows(2, 3, 8)).requires_grad_()
    (leaf[1].to().sum() + leaf.to().sum()).backward()
    assert torch.equal(leaf.grad, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 3, 8))


def test_it_costs_no_more_than_its_two_tensors() -> None:
    scaled = ScaledTensor.from_tensor(rows(100, 64))
    assert scaled.stand_in.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_from_phase_2_to_phase_1_and_its_blocks(backend: str) -> None:
    """As those of the float32 tensors that the scaled ones stand for, where nothing between is rounded visibly."""
    blocks, partial, delta = rows(3, 5, 40), rows(5, 40, seed=1), rows(5, 40, seed=2)
    queries, upstream = rows(2, 40, seed=3), rows(5, 40, seed=4)
    found = []
    for stored in (True, False):
        leaves = [value.clone().requires_grad_() for value in (blocks, partial, delta, queries)]
        b, p = (ScaledTensor.from_tensor(leaf) for leaf in leaves[:2]) if stored else leaves[:2]
        out, lse = attnres.phase_1(b, leaves[3], EPS, storage=SCALED_FP16 if stored else None, backend=backend)
        h, new = attnres.phase_2(p, leaves[3][1], out[1], lse[1], EPS, delta=leaves[2], backend=backend)
        (h * upstream).sum().backward(retain_graph=True)
        (new.to() if stored else new).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for scaled, plain in zip(*found, strict=True):
        assert (scaled - plain).norm() < 2e-3 * plain.norm()


def test_rows_are_indexed_and_never_cut() -> None:
    scaled = ScaledTensor.from_tensor(magnitudes().view(2, 3, 40))
    assert torch.equal(scaled[1].to(), scaled.to()[1])
    assert torch.equal(scaled[:, 1:].to(), scaled.to()[:, 1:])
    assert torch.equal(scaled[torch.tensor([1, 0])].to(), scaled.to()[[1, 0]])
    assert [tuple(part.shape) for part in scaled] == [(3, 40)] * 2
    assert [tuple(part.shape) for part in scaled.unbind(1)] == [(2, 40)] * 3
    assert len(scaled) == 2
    for index in ((..., 0), (0, 0, slice(3)), (slice(None), slice(None), 1)):
        with pytest.raises(IndexError):
            scaled[index]
    with pytest.raises(IndexError, match="allowed are the leading dimensions, 0 to 1"):
        scaled.unbind(2)


@pytest.mark.parametrize(
    ("values", "scale", "message"),
    [
        (torch.zeros(3, 8), torch.ones(3), r"values is torch\.float32"),
        (torch.zeros(3, 8).half(), torch.ones(3, 1), r"allowed is torch\.float32 \[3\]"),
        (torch.zeros(3, 8).half(), torch.ones(3).half(), r"scale is torch\.float16"),
        (torch.zeros(3, 8).half(), torch.ones(3, device="meta"), "scale is on meta"),
        (torch.zeros(3, 8).half().requires_grad_(), torch.ones(3), "use requires_grad_"),
    ],
)
def test_parts_that_do_not_fit_are_refused(values: Tensor, scale: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaledTensor(values, scale)


def test_only_floating_rows_are_scaled() -> None:
    with pytest.raises(ValueError, match=r"tensor is torch\.float64"):
        ScaledTensor.from_tensor(torch.zeros(3, 8).double())
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        ScaledTensor(torch.zeros(3, 8).half(), torch.ones(3), torch.float64)
    with pytest.raises(ValueError, match="D >= 1"):
        ScaledTensor.from_tensor(torch.zeros(3, 0))


def test_it_is_a_pytree_node() -> None:
    scaled = ScaledTensor.from_tensor(rows(3, 8, dtype=torch.bfloat16))
    leaves, spec = _pytree.tree_flatten({"blocks": [scaled]})
    assert len(leaves) == 2
    back = _pytree.tree_unflatten(leaves, spec)["blocks"][0]
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.to(), scaled.to())
    moved = _pytree.tree_map(lambda tensor: tensor.to("meta"), scaled)
    assert (moved.device.type, moved.shape) == ("meta", scaled.shape)
    assert _pytree.tree_map(lambda tensor: tensor.dim(), scaled).scale == 1
    paths, _ = _pytree.tree_flatten_with_path(scaled.requires_grad_())
    assert [_pytree.keystr(path) for path, _ in paths] == [".values", ".scale", ".stand_in"]
    assert _pytree.tree_map(lambda tensor: tensor, scaled).stand_in is scaled.stand_in


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    scaled = ScaledTensor.from_tensor(magnitudes())
    save_file(scaled.state("block.0"), tmp_path / "state.safetensors")
    tensors = load_file(tmp_path / "state.safetensors")
    assert sorted(tensors) == ["block.0.scale", "block.0.values"]
    assert torch.equal(ScaledTensor.from_state(tensors, "block.0").to(), scaled.to())


# --- the operations ---

STORAGE = {
    "mix": ("residuals",),
    "phase1": ("block_representations",),
    "phase2": ("partial_sum", "inter_out"),
    "step": ("prefix", "blocks"),
}


def scaled_case(
    op: str, shape: Shape = SMALL, device: str = "cpu", dtype: str = "bf16/fp32", magnitude: float = 1.0
) -> inputs.Case:
    """A case whose storage tensors are scaled fp16."""
    case = inputs.make_case(op, shape, dtype=dtype, device=device, seed=3)

    def stored(value: Tensor) -> ScaledTensor:
        return ScaledTensor.from_tensor(value.float() * magnitude, value.dtype)

    for name in STORAGE[op]:
        value = case.arguments[name]
        case.arguments[name] = [stored(v) for v in value] if isinstance(value, list) else stored(value)
    return case


def call(op: str, arguments: dict[str, Any], grad_outputs: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """Outputs and gradients of one public call, by the names of oracle.reference."""
    given = {name: _leaf(value) for name, value in arguments.items()}
    if op == "step":
        given = {name: value.clone() if name in STORAGE["step"] else value for name, value in arguments.items()}
        out = attnres.attn_res_step(**given, **options)
        return {"out": out, "prefix": given["prefix"], "blocks": given["blocks"]}
    if op == "mix":
        names = ("out", "weights")
        outputs = attnres.attn_res(**given, return_weights=True, **options)
    else:
        names = ("out", "lse") if op == "phase1" else ("out", "new_partial")
        outputs = (attnres.phase_1 if op == "phase1" else attnres.phase_2)(**given, **options)
    results = dict(zip(names, outputs if isinstance(outputs, tuple) else [outputs], strict=False))
    pairs = [(_place(results[name]), grad.to(results[name].dtype)) for name, grad in grad_outputs.items()]
    torch.autograd.backward(*zip(*pairs, strict=True))
    found = {name: value.detach() for name, value in results.items()}
    for name, value in given.items():
        if isinstance(value, list):
            found[f"d_{name}"] = [leaf.grad for leaf in value]
        elif isinstance(value, (Tensor, ScaledTensor)):
            found[f"d_{name}"] = value.grad
    return found


def _leaf(value: Any) -> Any:
    if isinstance(value, list):
        return [_leaf(part) for part in value]
    return value.detach().clone().requires_grad_() if isinstance(value, (Tensor, ScaledTensor)) else value


def _place(value: Tensor | ScaledTensor) -> Tensor:
    return value if isinstance(value, Tensor) else value.stand_in


def broken(op: str, case: inputs.Case, results: dict[str, Any], **told: Any) -> dict[str, numerics.Measurement]:
    references = oracle.reference(op, {**case.arguments, **told}, case.grad_outputs)
    measured = numerics.judge_all(results, references)
    return {name: found for name, found in measured.items() if not found.ok}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", STORAGE)
def test_every_operation_takes_it(op: str, backend: str) -> None:
    case = scaled_case(op)
    results = call(op, case.arguments, case.grad_outputs, backend=backend)
    assert broken(op, case, results) == {}
    if op == "step":
        expected = oracle.step(**case.arguments)
        for name in ("prefix", "blocks"):
            for part in ("values", "scale"):
                found, wanted = (getattr(value, part) for value in (results[name], getattr(expected, name)))
                assert torch.equal(found.nan_to_num(nan=0.5), wanted.nan_to_num(nan=0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["phase1", "phase2"])
def test_it_is_stored_when_asked(op: str, backend: str) -> None:
    case = inputs.make_case(op, Shape(5, 72, 3, 2), dtype="bf16", seed=4)
    results = call(op, case.arguments, case.grad_outputs, backend=backend, storage=SCALED_FP16)
    stored = results["out" if op == "phase1" else "new_partial"]
    assert isinstance(stored, ScaledTensor)
    assert stored.dtype == torch.bfloat16
    assert broken(op, case, results, storage=SCALED_FP16) == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_phase_1_takes_the_scale_of_a_bound(backend: str) -> None:
    """sum_n p_n max |v_n|: the row's own where there is one block, little more else; a block without weight has no part."""
    blocks = [rows(6, 72, seed=seed) for seed in range(3)]
    options = {"storage": SCALED_FP16, "backend": backend}
    out, _ = attnres.phase_1(blocks, rows(2, 72, seed=3), EPS, **options)
    exact = oracle.phase1(blocks, rows(2, 72, seed=3), EPS).out.float()
    ratio = out.scale / ScaledTensor.from_tensor(exact).scale
    assert (ratio >= 1).all()
    assert (ratio <= 4).all()
    one, _ = attnres.phase_1(blocks[:1], rows(2, 72, seed=3), EPS, **options)
    assert torch.equal(one.scale, ScaledTensor.from_tensor(blocks[0].expand(2, 6, 72)).scale)
    opposed, _ = attnres.phase_1([blocks[0], -blocks[0]], torch.zeros(1, 72), EPS, **options)
    assert torch.equal(opposed.scale[0], one.scale[0])
    assert (opposed.values == 0).all()
    # logits of 1000 and -1000: the larger block has a weight of zero
    query = 1000 * blocks[0][:1] / blocks[0][0].norm()
    alone, _ = attnres.phase_1([blocks[0][:1], -(2.0**20) * blocks[0][:1]], query, EPS, **options)
    assert torch.equal(alone.scale[0], one.scale[0, :1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacked_blocks_are_the_blocks_one_by_one(backend: str) -> None:
    stacked = ScaledTensor.from_tensor(magnitudes(6, 40).view(3, 2, 40)).requires_grad_()
    separate = [part.detach().clone().requires_grad_() for part in stacked.detach().unbind()]
    queries = rows(2, 40)
    for value in (stacked, separate):
        out, lse = attnres.phase_1(value, queries, EPS, backend=backend)
        assert (out.dtype, out.shape) == (torch.float32, (2, 2, 40))
        (out.sum() + lse.sum()).backward()
    assert torch.equal(stacked.grad, torch.stack([part.grad for part in separate]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
def test_nothing_overflows_up_to_1e30(norm: bool, backend: str) -> None:
    """Rows of 1e30 and of 1e-30, forward and gradients, as good as rows of one."""
    weight = 1 + 0.2 * rows(40, seed=9) if norm else None
    blocks = [ScaledTensor.from_tensor(magnitudes(2, seed=i)) for i in range(3)]
    partial, delta = ScaledTensor.from_tensor(magnitudes(2, seed=4)), magnitudes(2, seed=5)
    queries, upstream = rows(2, 40, seed=6), rows(2, 40, seed=7)
    leaves = [_leaf(value) for value in (*blocks, partial)]
    out, lse = attnres.phase_1(leaves[:3], queries, EPS, weight, storage=SCALED_FP16, backend=backend)
    h, new = attnres.phase_2(
        leaves[3], queries[0], out[0], lse[0], EPS, weight, delta=delta, output_rms_weight=weight, backend=backend
    )
    mixed = attnres.attn_res(queries[0], leaves[:3], weight, weight, backend=backend)
    torch.autograd.backward((h, mixed), (upstream, upstream))

    exact = [leaf.detach().to(torch.float64).requires_grad_() for leaf in leaves]
    inter = oracle.phase1(exact[:3], queries, EPS, weight)
    kept = inter.out + (out.detach().to(torch.float64) - inter.out.detach())  # as it was stored
    x = exact[3] + (new.detach().to(torch.float64) - exact[3].detach())
    merged = oracle.phase2(x, queries[0], kept[0], inter.lse[0], EPS, weight, output_rms_weight=weight).out
    direct = oracle.mix(queries[0], exact[:3], weight, weight, EPS).out
    torch.autograd.backward((merged, direct), (upstream.double(), upstream.double()))
    pairs = [(out.to(torch.float64), inter.out, 2.0**-11), (h, merged, 1e-5), (mixed, direct, 1e-5)]
    pairs += [(leaf.grad, value.grad, 1e-4) for leaf, value in zip(leaves, exact, strict=True)]
    for found, expected, allowed in pairs:
        error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert (error < allowed).all(), error
    assert (lse - inter.lse).abs().max() < 1e-4


def test_the_step_takes_rows_of_1e30() -> None:
    blocks = ScaledTensor.from_tensor(torch.stack([magnitudes(2, seed=i) for i in range(3)], 1))
    prefix, delta = ScaledTensor.from_tensor(magnitudes(2, seed=4)), magnitudes(2, seed=5)
    query, weight = rows(40, seed=6), 1 + 0.2 * rows(40, seed=9)
    expected = oracle.step(prefix, delta, blocks, weight, query, weight, 2, 2, EPS, EPS)
    for backend in BACKENDS:
        given = prefix.clone(), delta, blocks.clone(), weight, query, weight, 2, 2, EPS, EPS
        out = attnres.attn_res_step(*given, backend=backend)
        assert ((out - expected.out).norm(dim=-1) < 1e-5 * expected.out.norm(dim=-1)).all()
        assert torch.equal(given[2].values, expected.blocks.values)
        assert torch.equal(given[2].scale, expected.blocks.scale)


def test_mixed_lists_are_refused() -> None:
    plain, scaled = rows(3, 8), ScaledTensor.from_tensor(rows(3, 8))
    for sources in ([plain, scaled], [scaled, plain]):
        with pytest.raises((ValueError, TypeError), match=r"residuals\[1\]"):
            attnres.attn_res(torch.zeros(8), sources)
    with pytest.raises(ValueError, match="blocks is fp16_scaled"):
        attnres.attn_res_step(plain, None, scaled[None], None, torch.zeros(8), None, 1, -1, EPS, EPS)


def test_checked_mode_catches_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    original = backends.launcher

    def broken(op: str, backend: str) -> Any:
        def run(*arguments: Any, **precision: Any) -> None:
            original(op, backend)(*arguments, **precision)
            precision["out_scale"][1, 3] *= 2

        return run

    monkeypatch.setattr(backends, "launcher", broken)
    with attnres.checked("full"), pytest.raises(attnres.NumericsError, match=r"fp16_scaled.* in row 8 ") as caught:
        attnres.phase_1(rows(3, 5, 40), rows(2, 40), EPS, storage=SCALED_FP16, backend="torch")
    assert caught.value.verdict.tensor == "out"


def test_compiled_graphs_take_and_make_it() -> None:
    def block(queries: Tensor, a: Tensor, b: Tensor, partial: ScaledTensor, delta: Tensor) -> tuple[Any, ...]:
        sources = [ScaledTensor.from_tensor(a), ScaledTensor.from_tensor(b)]
        out, lse = attnres.phase_1(sources, queries, EPS, storage=SCALED_FP16)
        h, new = attnres.phase_2(partial, queries[0], out[0], lse[0], EPS, delta=delta)
        return h, new.to(), attnres.attn_res(queries[1], sources), new

    values = rows(2, 24), rows(4, 24, seed=1), rows(4, 24, seed=2), rows(4, 24, seed=3), rows(4, 24, seed=4)
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [value.clone().requires_grad_() for value in values]
        *outputs, new = run(*leaves[:3], ScaledTensor.from_tensor(leaves[3]), leaves[4])
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, new.values, new.scale, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [None, 11])
def test_torch_and_triton_store_the_same_bits_on_the_gpu(seed: int | None) -> None:
    for tokens, size in ((257, 7186), (1000, 2048)):
        partial, delta = (rows(tokens, size, seed=s).cuda() for s in (1, 2))
        partial[: min(6, tokens)] *= torch.tensor([1e30, 1e-30, 3e-40, 0.0, 1.0, 1.0], device="cuda")[:tokens, None]
        found = []
        for backend in BACKENDS:
            given = {"delta": delta, "storage": SCALED_FP16, "stochastic_seed": seed, "backend": backend}
            lse = torch.zeros(tokens, device="cuda")
            _, new = attnres.phase_2(partial, torch.zeros(size, device="cuda"), partial, lse, EPS, **given)
            found.append(new)
        assert torch.equal(found[0].values, found[1].values)
        assert torch.equal(found[0].scale, found[1].scale)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0, 1])
@pytest.mark.parametrize(("tokens", "size"), [(1, 7168), (7, 384), (100, 2304), (257, 2304), (257, 7168)])
def test_phase_2_on_hopper_stores_what_torch_does(
    tokens: int, size: int, spread: int, dtype: torch.dtype, seed: int | None
) -> None:
    """Each of partial sum, merged row and new sum scaled or not; the mix to the budget of one rounding.

    spread: of magnitudes along a row, so that each warp's part has another scale, or none.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    factors = 2.0 ** (spread * (8 if dtype == torch.float16 else 50) * torch.linspace(-1, 1, size))
    factors[: spread * size // 4] = 0
    values = [(rows(tokens, size, seed=s, dtype=dtype) * factors).to(dtype).cuda() for s in (1, 2, 3)]
    query, lse = rows(size, seed=4).cuda() / size**0.5, rows(tokens, seed=5).cuda()
    for scaled_partial, scaled_inter, storage in (
        (False, True, None),
        (True, False, None),
        (True, True, None),
        (False, False, SCALED_FP16),
        (False, True, SCALED_FP16),
    ):
        partial = ScaledTensor.from_tensor(values[0]) if scaled_partial else values[0]
        inter = ScaledTensor.from_tensor(values[1]) if scaled_inter else values[1]
        given = {"delta": values[2], "output_rms_weight": 1 + query, "storage": storage, "stochastic_seed": seed}
        found = {}
        for backend in ("torch", "cute"):
            poison = torch.full((4, tokens, size), math.nan, device="cuda")  # what the allocator hands out next
            del poison
            found[backend] = attnres.phase_2(partial, query, inter, lse, EPS, **given, backend=backend)
        new, expected = found["cute"][1], found["torch"][1]
        if isinstance(new, ScaledTensor):
            assert torch.equal(new.scale, expected.scale)
            new, expected = new.values, expected.values
        assert torch.equal(new, expected)
        kept = found["cute"][1]
        x = kept.to(torch.float64)
        logit = (x * query).sum(-1) / (x.square().mean(-1) + EPS).sqrt()
        mixed = inter.to(torch.float64)
        mixed = mixed + torch.sigmoid(logit - lse)[:, None] * (x - mixed)
        exact = mixed / (mixed.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + query)
        assert (found["cute"][0] - exact).norm() <= 1.05 * (exact.to(dtype) - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("op", STORAGE)
def test_every_operation_takes_it_on_the_gpu(op: str) -> None:
    for shape in (Shape(257, 384, 9, 12), Shape(7, 7186, 5, 3)):
        case = scaled_case(op, shape, "cuda")
        assert broken(op, case, call(op, case.arguments, case.grad_outputs, backend="triton")) == {}
        if op == "phase1":
            results = call(op, case.arguments, case.grad_outputs, backend="triton", storage=SCALED_FP16)
            assert broken(op, case, results) == {}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [Shape(1, 7168, 9, 12), Shape(257, 2304, 5, 8), Shape(300, 384, 9, 24), Shape(129, 7168, 8, 24)]
)
def test_hopper_makes_it_and_takes_its_gradients(shape: Shape, ran: list[tuple[str, str]]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    case = inputs.make_case("phase1", shape, dtype="bf16/fp32", device="cuda", seed=3)
    results, again = (
        call("phase1", case.arguments, case.grad_outputs, backend="cute", storage=SCALED_FP16) for _ in range(2)
    )
    assert broken("phase1", case, results, storage=SCALED_FP16) == {}
    assert torch.equal(results["out"].values, again["out"].values)
    assert torch.equal(results["out"].scale, again["out"].scale)
    for op in ("phase1", "phase2", "mix"):
        case = scaled_case(op, shape, "cuda")
        assert broken(op, case, call(op, case.arguments, case.grad_outputs, backend="auto")) == {}
    launches = {("phase1_fwd", "cute"), ("phase2_fwd", "cute"), ("phase2_bwd", "cute"), ("mix_bwd", "cute")}
    assert launches <= set(ran)


# One of every way rows take: clusters of CTAs, registers, the ring with one and two rows a slot, chunks, padding.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 7168, 9),
        Shape(66, 7168, 9),
        Shape(132, 4096, 5),
        Shape(257, 7168, 9, output_norm=False),
        Shape(300, 7168, 17),
        Shape(1000, 2048, 17),
        Shape(301, 2304, 4),
        Shape(700, 384, 9, key_weight=False),
        Shape(61, 72, 32),
        Shape(140, 8, 1),
    ],
    ids=lambda shape: shape.for_op("mix"),
)
@pytest.mark.parametrize("op", ["mix", "step"])
def test_hopper_mixes_scaled_sources(op: str, shape: Shape, ran: list[tuple[str, str]]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    case = scaled_case(op, shape, "cuda")
    poison = torch.full((4, shape.tokens, shape.hidden_size), math.nan, device="cuda")  # what is handed out next
    del poison
    results, again = (call(op, case.arguments, case.grad_outputs, backend="cute") for _ in range(2))
    assert broken(op, case, results) == {}
    assert torch.equal(results["out"], again["out"])
    # Every token of another magnitude.
    factor = torch.exp2(45.0 * (torch.arange(shape.tokens, device="cuda") % 5 - 2))
    for name in STORAGE[op]:
        for value in case.arguments[name] if op == "mix" else [case.arguments[name]]:
            value.scale.mul_(factor.view(-1, *(1,) * (value.scale.dim() - 1)))
    for out_dtype, allowed in ((torch.bfloat16, 2.0**-8), (torch.float32, 4e-6)):
        found = call(op, case.arguments, {}, backend="cute", out_dtype=out_dtype) if op == "step" else {}
        if op == "mix":
            found["out"] = attnres.attn_res(**case.arguments, backend="cute", out_dtype=out_dtype)
        expected = (oracle.step if op == "step" else oracle.mix)(**case.arguments)
        error = (found["out"].double() - expected.out).norm(dim=-1) / expected.out.norm(dim=-1)
        assert error.max() <= allowed, (out_dtype, error.max(), error.argmax(), error[:10])
    assert {backend for _, backend in ran} == {"cute"}
    if op == "step":
        for name in ("prefix", "blocks"):
            for part in ("values", "scale"):
                stored, wanted = (getattr(value, part) for value in (found[name], getattr(expected, name)))
                assert torch.equal(stored.nan_to_num(nan=0.5), wanted.nan_to_num(nan=0.5)), (name, part)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [None, SCALED_FP16])
@pytest.mark.parametrize(
    ("query", "weighted"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
@pytest.mark.parametrize(
    ("tokens", "size", "depth", "queries"),
    [(257, 2048, 4, 8), (67, 7168, 8, 16), (301, 384, 1, 2), (77, 2304, 2, 12), (61, 8192, 12, 24), (9, 72, 32, 1)],
)
def test_phase_1_on_hopper_takes_blocks_of_any_magnitude(
    tokens: int, size: int, depth: int, queries: int, query: torch.dtype, weighted: bool, storage: str | None
) -> None:
    """Magnitudes apart by up to 2^80 within a token, rows of zeros, of 1e30 and of subnormal numbers; each row's error."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    value = rows(depth, tokens, size, seed=1)
    value *= torch.exp2(torch.randint(-40, 41, (depth, tokens, 1), generator=torch.Generator().manual_seed(2)))
    value[:, 3:6] = rows(depth, 3, size, seed=3) * torch.tensor([0.0, 1e30, 3e-40])[:, None]
    blocks = ScaledTensor.from_tensor(value.cuda(), torch.bfloat16)
    given = rows(queries, size, seed=4).to("cuda", query) * (2 / size**0.5)
    weight = 1 + rows(size, seed=5).cuda() / 5 if weighted else None
    poison = torch.full((queries + 1, tokens, size), math.nan, device="cuda")
    del poison
    (out, lse), (again, _) = (
        attnres.phase_1(blocks, given, EPS, weight, storage=storage, backend="cute") for _ in range(2)
    )
    assert torch.equal(*(found.values if storage else found for found in (out, again)))
    exact = oracle.phase1(blocks, given, EPS, weight)
    assert (lse - exact.lse).abs().max() <= 2e-6 * exact.lse.abs().max()
    kept = exact.out.float()
    stored = ScaledTensor.from_tensor(kept) if storage else kept.bfloat16()
    if storage:
        assert ((out.scale >= stored.scale) & (out.scale <= 64 * stored.scale)).all()
    largest = exact.out.abs().amax(-1, keepdim=True).clamp_min(2.0**-120)
    error, floor = (((found.to(torch.float64) - exact.out) / largest).norm(dim=-1) for found in (out, stored))
    assert error.norm() <= 1.05 * floor.norm()
    # a block alone may be exact
    assert (error <= 1.2 * floor + 1e-6).all()


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1.0, 1e30])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "bf16/fp32"])
@pytest.mark.parametrize(
    "shape", [Shape(1, 384, 1, 1), Shape(300, 1000, 7, 8), Shape(257, 2304, 5, 12), Shape(129, 7168, 8, 24)], ids=str
)
def test_hopper_takes_the_gradient_of_phase_1(
    shape: Shape, dtype: str, magnitude: float, ran: list[tuple[str, str]]
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CuTe kernels need a Hopper GPU")
    case = scaled_case("phase1", shape, "cuda", dtype, magnitude)
    results, again = (call("phase1", case.arguments, case.grad_outputs, backend="auto") for _ in range(2))
    assert broken("phase1", case, results) == {}
    for found, repeated in zip(results["d_block_representations"], again["d_block_representations"], strict=True):
        assert torch.equal(found, repeated)
    assert torch.equal(results["d_pseudo_queries"], again["d_pseudo_queries"])
    assert ("phase1_bwd", "cute") in ran


@pytest.mark.gpu
def test_auto_takes_triton_for_what_cute_has_no_kernel_for(ran: list[tuple[str, str]]) -> None:
    prefix, blocks = (ScaledTensor.from_tensor(rows(*shape).cuda()) for shape in ((4, 64), (4, 2, 64)))
    given = prefix, rows(4, 64).cuda(), blocks, None, torch.zeros(64, device="cuda"), None, 2, -1, EPS, EPS
    attnres.attn_res_step(*given, backend="auto")
    assert ran == [("serve_step", "triton")]
    if torch.cuda.get_device_capability() == (9, 0):
        with pytest.raises(attnres.BackendError, match="no CuTe kernel yet for float32 beside 16-bit storage"):
            attnres.attn_res_step(*given, backend="cute")
