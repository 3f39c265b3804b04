"""The whole network: results against the float64 oracle, what is kept and recomputed, and torch's machinery around it."""

import copy
import gc
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import attnres
from attnres import backend as backends
from attnres import oracle, torch_ref
from attnres.inputs import EPS
from attnres.sites import direct_is_cheaper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 16


class MLP(nn.Module):
    """Several parameters; what a sublayer is."""

    def __init__(self, size: int = SIZE, dropout: float = 0.0):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(size, 2 * size), nn.Linear(2 * size, size), nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.up(hidden))))


def make(
    layers: Sequence[nn.Module] | int = 7,
    block_size: int = 3,
    *,
    size: int = SIZE,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> attnres.BlockAttnRes:
    """A network whose pseudo-queries and weights are away from where training starts."""
    torch.manual_seed(0)
    chain = [MLP(size) for _ in range(layers)] if isinstance(layers, int) else layers
    network = attnres.BlockAttnRes(chain, size, block_size, **options)
    with torch.no_grad():
        for weight in (network.pseudo_queries, network.rms_weight, network.output_rms_weight):
            if weight is not None:
                weight += 0.3 * torch.randn_like(weight)
    return network.to(device=device, dtype=dtype)


def embedding(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, 5, SIZE)), generator=generator).to(device, dtype)


Results = dict[str, Tensor | None]


def run(network: attnres.BlockAttnRes, inputs: Tensor, call: Callable[..., Tensor] | None = None) -> Results:
    """The output and every gradient, for a gradient of the output that does not depend on the network."""
    network.zero_grad()
    leaf = inputs.detach().requires_grad_()
    out = (network if call is None else call)(leaf)
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape).to(out))
    gradients = {name: parameter.grad for name, parameter in network.named_parameters(remove_duplicate=True)}
    return {"out": out.detach(), "inputs": leaf.grad, **gradients}


def exact(network: attnres.BlockAttnRes, inputs: Tensor, dtype: torch.dtype = torch.float64) -> Results:
    """The same by the oracle, from the very same numbers."""
    network = copy.deepcopy(network).to(dtype)

    def call(leaf: Tensor) -> Tensor:
        return oracle.network(
            leaf,
            network.pseudo_queries,
            list(network.layers),
            network.block_size,
            network.eps,
            network.rms_weight,
            network.scale,
            output_rms_weight=network.output_rms_weight,
            dtype=dtype,
        )

    return run(network, inputs.to(dtype), call)


def errors(found: Results, reference: Results) -> dict[str, float]:
    """Relative L2 errors; gradients must be there where the reference has them, and nowhere else."""
    assert found.keys() == reference.keys()
    assert [name for name in found if (found[name] is None) != (reference[name] is None)] == []
    measured = {}
    for name, value in reference.items():
        if value is not None:
            scale = value.double().norm().clamp_min(1e-30)
            measured[name] = float((found[name].double() - value.double()).norm() / scale)
    return measured


def assert_same_bits(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] is value is None or torch.equal(found[name], value), name


FLOAT32 = 5e-6  # of a float32 network against float64: a few dozen roundings in a row

SHAPES = {
    "ragged": (7, 3),
    "whole blocks": (6, 3),
    "one site a block": (3, 1),
    "two sites a block": (5, 2),
    "one block": (4, 9),
    "one layer": (1, 3),
    "no layer": (0, 2),
}


@pytest.mark.parametrize(
    "options", [{}, {"key_weight": True, "output_norm": True, "scale": 0.5}], ids=["plain", "full"]
)
@pytest.mark.parametrize("memory_saving", [True, False], ids=["saving", "autograd"])
@pytest.mark.parametrize(("layers", "block_size"), SHAPES.values(), ids=SHAPES.keys())
def test_float32_against_the_oracle(layers: int, block_size: int, memory_saving: bool, options: dict[str, Any]) -> None:
    network = make(layers, block_size, memory_saving=memory_saving, backend="torch", **options)
    inputs = embedding()
    found = errors(run(network, inputs), exact(network, inputs))
    assert {name: error for name, error in found.items() if error > FLOAT32} == {}


@pytest.mark.parametrize("memory_saving", [True, False], ids=["saving", "autograd"])
def test_triton_against_the_oracle(memory_saving: bool, ran: list[tuple[str, str]]) -> None:
    network = make(5, 3, memory_saving=memory_saving, backend="triton", key_weight=True, output_norm=True)
    inputs = embedding(3, SIZE)
    found = errors(run(network, inputs), exact(network, inputs))
    assert {name: error for name, error in found.items() if error > FLOAT32} == {}
    assert {backend for _, backend in ran} == {"triton"}


@pytest.mark.parametrize("memory_saving", [True, False], ids=["saving", "autograd"])
def test_bfloat16_is_as_good_as_its_roundings(memory_saving: bool) -> None:
    """Three times what bfloat16 layers alone make of it, or one rounding: the blocks' gradients are sums of rounded ones."""
    network = make(8, 3, dtype=torch.bfloat16, memory_saving=memory_saving, backend="torch", key_weight=True)
    inputs = embedding(4, 33, SIZE, dtype=torch.bfloat16)
    reference = exact(network, inputs)

    class Rounded(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor) -> Tensor:
            return self.layer(hidden.bfloat16()).to(hidden.dtype)

    rounded = copy.deepcopy(network)
    inner = copy.deepcopy(network.layers)
    rounded.float()
    rounded.layers = nn.ModuleList(Rounded(layer) for layer in inner)
    best = run(
        rounded,
        inputs.float(),
        lambda leaf: oracle.network(
            leaf, rounded.pseudo_queries, list(rounded.layers), 3, EPS, rounded.rms_weight, dtype=torch.float32
        ),
    )
    floors = errors({name.replace(".layer.", "."): value for name, value in best.items()}, reference)
    found = errors(run(network, inputs), reference)
    floor = 2.0**-9
    assert {name: (error, floors[name]) for name, error in found.items() if error > 3 * max(floors[name], floor)} == {}


@pytest.mark.parametrize("keep_last_block", [True, False])
@pytest.mark.parametrize("block_size", [1, 3, 9])
def test_the_modes_agree(block_size: int, keep_last_block: bool) -> None:
    network, inputs = make(7, block_size, output_norm=True, keep_last_block=keep_last_block), embedding()
    saving = run(network, inputs)
    assert_same_bits(run(network, inputs), saving)
    network.memory_saving = False
    plain = run(network, inputs)
    assert torch.equal(saving["out"], plain["out"])
    recomputed = run(network, inputs, lambda leaf: checkpoint(network, leaf, use_reentrant=False))
    assert_same_bits(recomputed, plain)
    assert max(errors(saving, plain).values()) < FLOAT32


def test_without_gradient_the_output_is_the_same_but_for_rounding() -> None:
    network, inputs = make(7, 3), embedding()
    expected = network(inputs.requires_grad_()).detach()
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), expected)
    assert network(inputs.detach()).requires_grad
    network.requires_grad_(False)
    assert not network(inputs.detach()).requires_grad


def test_inputs_that_are_a_view_with_row_strides() -> None:
    network = make(4, 2)
    wide = embedding(6, 2 * SIZE)
    assert_same_bits(run(network, wide[:, :SIZE]), run(network, wide[:, :SIZE].contiguous()))


def test_no_tokens() -> None:
    network = make(4, 2, output_norm=True, key_weight=True)
    found = run(network, embedding(0, SIZE))
    assert found["out"].shape == (0, SIZE)
    assert {float(value.abs().sum()) for value in found.values()} == {0.0}


# --- parameters, frozen and shared; hooks ---


def test_frozen_parameters_get_no_gradient() -> None:
    network = make(5, 2)
    network.layers[1].up.weight.requires_grad_(False)
    network.layers[2].requires_grad_(False)
    network.pseudo_queries.requires_grad_(False)
    inputs = embedding()
    found = run(network, inputs)
    assert found["pseudo_queries"] is found["layers.1.up.weight"] is found["layers.2.down.bias"] is None
    assert max(errors(found, exact(network, inputs)).values()) < FLOAT32


@pytest.mark.parametrize("block_size", [2, 4])
def test_a_layer_at_two_sites_gets_the_sum(block_size: int) -> None:
    """Within a block and across blocks; used twice in one backward, and by two networks in one."""
    shared = MLP()
    network, inputs = make([shared, MLP(), shared, MLP(), shared], block_size), embedding()
    found = run(network, inputs)
    assert max(errors(found, exact(network, inputs)).values()) < FLOAT32
    twice = run(network, inputs, lambda leaf: network(leaf) + network(leaf))
    for name, value in found.items():
        torch.testing.assert_close(twice[name], 2 * value)


def test_hooks_of_parameters_run_once_on_the_whole_gradient() -> None:
    shared = MLP()
    network, inputs = make([shared, MLP(), shared], 2), embedding()
    expected = run(network, inputs)
    seen: list[str] = []
    for name, parameter in network.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.append(f"tensor {name}") or 2 * gradient)
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(f"accumulated {name}"))
    found = run(network, inputs)
    names = [name for name, _ in network.named_parameters()]
    assert sorted(seen) == sorted([f"tensor {name}" for name in names] + [f"accumulated {name}" for name in names])
    for name in names:
        torch.testing.assert_close(found[name], 2 * expected[name])


def test_hooks_of_layers_run() -> None:
    network = make(3, 2)
    calls: list[str] = []
    network.layers[1].register_forward_hook(lambda *_: calls.append("forward"))
    network.layers[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    run(network, embedding())
    assert calls == ["forward", "forward", "backward"]  # forward, its recomputation, backward


def test_layers_that_return_odd_things() -> None:
    class Transposed(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mT.contiguous().mT

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(2, 5, SIZE))

        def forward(self, hidden: Tensor) -> Tensor:
            return self.value

    class Detached(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.detach()

    class Whole(nn.Module):
        """Its parameter's gradient is the gradient of its output, the same memory."""

        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(2, 5, SIZE))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.value

    layers = [Whole(), Transposed(), Constant(), nn.Identity(), Detached(), Whole(), nn.Identity(), Whole()]
    for block_size in (1, 3, 8):
        network, inputs = make(layers, block_size), embedding()
        assert max(errors(run(network, inputs), exact(network, inputs)).values()) < FLOAT32


def test_plain_callables() -> None:
    queries, inputs = 0.3 * torch.randn(4, SIZE), embedding().requires_grad_()
    layers = [torch.tanh, lambda hidden: 2 * hidden, torch.sin]
    found = torch.autograd.grad(attnres.block_attn_res(inputs, queries, layers, 2).sum(), inputs)[0]
    wide = inputs.detach().double().requires_grad_()
    expected = torch.autograd.grad(oracle.network(wide, queries.double(), layers, 2).sum(), wide)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_callable_that_hides_parameters_is_refused() -> None:
    hidden_layer, inputs = MLP(), embedding().requires_grad_()
    layers = [nn.Identity(), lambda hidden: hidden_layer(hidden)]
    queries = torch.zeros(3, SIZE)
    with pytest.raises(ValueError, match=r"layers\[1\] is no torch.nn.Module and uses .* memory_saving=False"):
        attnres.block_attn_res(inputs, queries, layers, 2)
    out = attnres.block_attn_res(inputs, queries, layers, 2, keep_last_block=False)
    with pytest.raises(ValueError, match=r"layers\[1\] is no torch.nn.Module and uses .* memory_saving=False"):
        out.sum().backward()
    attnres.block_attn_res(inputs, queries, layers, 2, memory_saving=False).sum().backward()
    assert hidden_layer.up.weight.grad is not None


# --- the recomputation ---


@pytest.mark.parametrize("keep_last_block", [True, False])
def test_dropout_is_recomputed_with_the_same_mask(keep_last_block: bool) -> None:
    torch.manual_seed(3)
    network = make([MLP(dropout=0.5) for _ in range(5)], 2, keep_last_block=keep_last_block)
    inputs = embedding(40, SIZE)
    results = []
    for network.memory_saving in (True, False):
        torch.manual_seed(4)
        results.append(run(network, inputs))
    saving, plain = results
    assert torch.equal(saving["out"], plain["out"])
    assert max(errors(saving, plain).values()) < FLOAT32
    network.memory_saving = True
    torch.manual_seed(4)
    out = network(inputs.requires_grad_())
    state = torch.get_rng_state()
    torch.rand(3)
    torch.set_rng_state(state)
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backward_within", [True, False])
def test_autocast_is_recomputed(backward_within: bool) -> None:
    seen: list[torch.dtype] = []

    class Spy(MLP):
        def forward(self, hidden: Tensor) -> Tensor:
            out = super().forward(hidden)
            seen.append(out.dtype)
            return out

    network, inputs = make([Spy() for _ in range(4)], 2), embedding(9, SIZE).requires_grad_()
    found = []
    for network.memory_saving in (True, False):
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(inputs)
            if backward_within:
                out.sum().backward()
        if not backward_within:
            out.sum().backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert set(seen) == {torch.bfloat16}
    assert out.dtype == torch.float32
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0.05, atol=0.02)


def test_checked_mode_judges_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also phase 1's backward, which adds to gradients that are there."""
    network, inputs = make(5, 2, key_weight=True, output_norm=True, backend="torch"), embedding(9, SIZE)
    expected = run(network, inputs)
    with attnres.checked("full"):
        found = run(network, inputs)
    assert max(errors(found, expected).values()) < FLOAT32
    original = torch_ref.phase1_bwd

    def wrong(*arguments: Any) -> None:
        original(*arguments)
        arguments[10][0][-1] += 1  # d_sources

    monkeypatch.setattr(torch_ref, "phase1_bwd", wrong)
    monkeypatch.setattr(backends, "launcher", lambda op, backend: getattr(torch_ref, op))
    with attnres.checked("full"), pytest.raises(attnres.NumericsError, match="d_block_representations"):
        run(network, inputs)


def test_a_parameter_changed_before_the_backward_is_an_error() -> None:
    network = make(3, 2)
    out = network(embedding())
    with torch.no_grad():
        network.layers[1].up.weight += 1
    with pytest.raises(RuntimeError, match=r"float32 \[32, 16\]\) was modified in place"):
        out.sum().backward()


def test_a_kept_graph_runs_its_backward_again() -> None:
    network, inputs = make(5, 2), embedding().requires_grad_()
    out = network(inputs).sum()
    first = torch.autograd.grad(out, [inputs, *network.parameters()], retain_graph=True)
    second = torch.autograd.grad(out, [inputs, *network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("keep_last_block", [True, False])
def test_each_layer_runs_twice_and_no_more(keep_last_block: bool) -> None:
    network = make(5, 2, keep_last_block=keep_last_block)
    calls = [0] * 5
    for index, layer in enumerate(network.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    run(network, embedding())
    assert calls == [2, 2, 2, 2, 1 if keep_last_block else 2]


# --- what is kept ---


def test_only_block_representations_are_saved() -> None:
    network, inputs = make(6, 3, keep_last_block=False), embedding(50, SIZE).requires_grad_()
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
    ):
        network(inputs)
    per_token = [tensor for tensor in packed if tensor.shape[:1] == (50,) and tensor.dim() == 2]
    assert len(per_token) == 3  # inputs and two blocks
    assert sum(tensor.numel() for tensor in packed) < 4 * inputs.numel() + network.pseudo_queries.numel()


class Watch(nn.Module):
    """Keeps weak references to what the network gives it, and counts those alive at each call."""

    def __init__(self, seen: list[Any], alive: list[int]):
        super().__init__()
        self.seen, self.alive = seen, alive

    def forward(self, hidden: Tensor) -> Tensor:
        self.alive.append(sum(reference() is not None for reference in self.seen))
        out = hidden * 1.0
        self.seen += [weakref.ref(hidden), weakref.ref(out)]
        return out


@pytest.mark.parametrize("gradient", [True, False])
def test_tensors_of_a_site_are_freed_as_soon_as_they_can_be(gradient: bool) -> None:
    seen: list[Any] = []
    alive: list[int] = []
    network = make([Watch(seen, alive) for _ in range(12)], 4, keep_last_block=False)
    inputs = embedding().requires_grad_()
    gc.disable()
    try:
        with torch.set_grad_enabled(gradient):
            out = network(inputs)
        # at the second site: the first output, which is the partial sum, and its input, a view of phase 1's result
        assert max(alive) <= 2
        assert sum(reference() is not None for reference in seen) == 0
        if gradient:
            alive.clear()
            out.sum().backward()
            assert max(alive) <= 2 * 4  # of the block that is recomputed: inputs, and the first output as partial sum
            assert sum(reference() is not None for reference in seen) == 0
    finally:
        gc.enable()


# --- torch.compile and data-parallel training ---


def test_compiled_layers() -> None:
    network, inputs = make(4, 3), embedding()
    expected = run(network, inputs)
    network.layers = nn.ModuleList(torch.compile(layer, backend="eager") for layer in network.layers)
    found = run(network, inputs)
    renamed = {name.replace("._orig_mod", ""): value for name, value in found.items()}
    assert_same_bits(renamed, expected)


@pytest.mark.parametrize("memory_saving", [True, False], ids=["saving", "autograd"])
def test_inside_a_compiled_function(memory_saving: bool) -> None:
    network, inputs = make(4, 3, memory_saving=memory_saving), embedding()
    expected = run(network, inputs)
    found = run(network, inputs, torch.compile(network, backend="eager", fullgraph=not memory_saving))
    assert_same_bits(found, expected)


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or os.name != "posix", reason="needs torch.distributed with gloo")
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    shared = MLP()
    network, inputs = make([shared, MLP(), shared], 2), embedding()
    expected = run(network, inputs)
    wrapped = DistributedDataParallel(network, bucket_cap_mb=1)
    assert_same_bits(run(network, inputs, wrapped), expected)
    assert_same_bits(run(network, inputs, wrapped), expected)


# --- errors ---

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "inputs": ({"inputs": torch.zeros(2, SIZE, dtype=torch.int64)}, ValueError, "inputs has dtype int64"),
    "queries": (
        {"pseudo_queries": torch.zeros(3, SIZE)},
        ValueError,
        r"pseudo_queries has shape \[3, 16\]; allowed is \[4, 16\]",
    ),
    "layers": ({"layers": MLP()}, TypeError, "layers is a MLP; allowed are a sequence"),
    "a layer": ({"layers": [MLP(), None, MLP()]}, TypeError, r"layers\[1\] is a NoneType"),
    "block size": ({"block_size": 0}, ValueError, "block_size is 0; allowed are 1 and more"),
    "block size type": ({"block_size": 2.0}, TypeError, "block_size is a float"),
    "too many blocks": (
        {"layers": [nn.Identity()] * 128, "pseudo_queries": torch.zeros(129, SIZE)},
        ValueError,
        "make 65 block representations; allowed are at most 64, block_size 3 and more",
    ),
    "eps": ({"eps": -1.0}, ValueError, "eps is -1.0"),
    "scale": ({"scale": float("nan")}, ValueError, "scale is nan"),
    "key weight": (
        {"rms_weight": torch.ones(2, SIZE)},
        ValueError,
        r"rms_weight has shape \[2, 16\]; allowed are \[16\] and \[4, 16\]",
    ),
    "output weight": (
        {"output_rms_weight": torch.ones(SIZE)},
        ValueError,
        r"output_rms_weight has shape \[16\]; allowed is \[4, 16\]",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    "returned type": ({"layers": [lambda hidden: (hidden,)] * 3}, TypeError, r"layers\[0\] returned a tuple"),
    "returned shape": (
        {"layers": [lambda hidden: hidden[:1]] * 3},
        ValueError,
        r"layers\[0\] returned float32 \[1, 16\]; allowed",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str, ran: list[tuple[str, str]]) -> None:
    given = {
        "inputs": torch.zeros(2, SIZE),
        "pseudo_queries": torch.zeros(4, SIZE),
        "layers": [MLP()] * 3,
        "block_size": 2,
    }
    changed, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        attnres.block_attn_res(**{**given, **changed})
    assert not ran or name.startswith("returned")


def test_a_backend_asked_for_by_name_is_not_replaced() -> None:
    with pytest.raises(attnres.BackendError, match="backend='cute' cannot take phase1_fwd"):
        make(3, 2, backend="cute")(embedding())


# --- modules ---


def test_training_starts_from_the_plain_mean() -> None:
    sources = [embedding() + index for index in range(3)]
    site = attnres.AttnRes(SIZE)
    torch.testing.assert_close(site(sources), torch.stack(sources).mean(0))
    network = attnres.BlockAttnRes([nn.Identity()], SIZE, 2)
    torch.testing.assert_close(network(sources[0]), sources[0])


def test_module_options_reach_the_operation() -> None:
    site = attnres.AttnRes(SIZE, 1e-3, 0.5, key_weight=True, output_norm=True, backend="torch", dtype=torch.float64)
    assert {name: parameter.dtype for name, parameter in site.named_parameters()} == dict.fromkeys(
        ("pseudo_query", "rms_weight", "output_rms_weight"), torch.float64
    )
    site = site.float()
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.normal_()
    sources = [embedding() + index for index in range(3)]
    expected = oracle.mix(site.pseudo_query, sources, site.rms_weight, site.output_rms_weight, 1e-3, 0.5).out
    torch.testing.assert_close(site(sources).double(), expected, rtol=1e-4, atol=1e-5)
    assert repr(site) == "AttnRes(16, eps=0.001, scale=0.5, key_weight=True, output_norm=True, backend='torch')"
    site.reset_parameters()
    assert [float(parameter.detach().unique()) for parameter in site.parameters()] == [0, 1, 1]
    shown = repr(make(2, 2, memory_saving=False))
    assert "16, block_size=2, eps=1e-06, memory_saving=False" in shown


def test_state_is_kept_and_loaded() -> None:
    network = make(3, 2, key_weight=True)
    other = attnres.BlockAttnRes([MLP() for _ in range(3)], SIZE, 2, key_weight=True)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(embedding()), network(embedding()))
    assert [name for name, _ in network.named_parameters()][:2] == ["pseudo_queries", "rms_weight"]


# --- a block of sites around layers that the caller runs ---


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("two_phases", [True, False])
def test_block_sites_are_the_direct_mixes(num_blocks: int, two_phases: bool, ran: list[tuple[str, str]]) -> None:
    blocks = [embedding() + index for index in range(num_blocks)]
    queries, norms, keys = torch.randn(4, SIZE) / 4, torch.rand(4, SIZE) + 0.5, torch.rand(4, SIZE) + 0.5
    with torch.no_grad():
        sites = attnres.BlockSites(blocks, queries, EPS, keys, output_rms_weight=norms, two_phases=two_phases)
        partial, delta = None, None
        for site in range(4):
            hidden = sites.mix(delta)
            sources = blocks if partial is None else [*blocks, partial]
            expected = oracle.mix(queries[site], sources, keys[site], norms[site], EPS).out
            torch.testing.assert_close(hidden.double(), expected, rtol=1e-4, atol=1e-5)
            delta = torch.sin(hidden + site)
            partial = delta if partial is None else partial + delta
        torch.testing.assert_close(sites.close(delta), partial)
        with pytest.raises(ValueError, match="mix is called for site 4; allowed are 4 calls"):
            sites.mix(delta)
    assert {"phase1_fwd", "phase2_fwd"} <= {op for op, _ in ran} or (num_blocks == 1 and not two_phases)


@pytest.mark.parametrize("output_norm", [False, True])
@pytest.mark.parametrize("scaled_blocks", [False, True])
def test_block_sites_in_scaled_fp16(scaled_blocks: bool, output_norm: bool) -> None:
    """Of the error of bfloat16 storage, a quarter at most is left; magnitudes beyond fp16's are no matter."""
    torch.manual_seed(0)
    blocks = [(1e6 * (embedding(64, SIZE) + index)).bfloat16() for index in range(3)]
    queries, norms = torch.randn(5, SIZE) / 4, torch.rand(5, SIZE) + 0.5 if output_norm else None
    deltas = [(1e6 * torch.randn(64, SIZE)).bfloat16() for _ in range(5)]

    def run(storage: str | None) -> tuple[list[torch.Tensor], Any]:
        given: Any = (
            [attnres.ScaledTensor.from_tensor(block) for block in blocks] if scaled_blocks and storage else blocks
        )
        sites = attnres.BlockSites(given, queries, EPS, output_rms_weight=norms, two_phases=True, storage=storage)
        hidden = [sites.mix(None if site == 0 else deltas[site - 1]) for site in range(5)]
        return hidden, sites.close(deltas[4])

    exact, total = [], torch.zeros(64, SIZE, dtype=torch.float64)
    for site in range(5):
        sources = [block.double() for block in blocks] + ([total.clone()] if site else [])
        exact.append(oracle.mix(queries[site], sources, None, None if norms is None else norms[site], EPS).out)
        total += deltas[site].double()

    def error(found: Any, wanted: torch.Tensor) -> float:
        return float((found.to(torch.float64) - wanted).norm() / wanted.norm())

    with torch.no_grad():
        (plain, plain_sum), (scaled, scaled_sum) = run(None), run("fp16_scaled")
    assert all(each.dtype == torch.bfloat16 for each in scaled)
    assert isinstance(scaled_sum, attnres.ScaledTensor) == scaled_blocks
    assert scaled_sum.dtype == torch.bfloat16
    # out is rounded to bfloat16 either way: what differs is what was rounded before
    floor = [error(each.bfloat16(), each) for each in exact]
    assert all(error(s, e) < 1.05 * f for s, e, f in zip(scaled, exact, floor, strict=True))
    assert error(plain[4], exact[4]) > 1.2 * floor[4]
    if scaled_blocks:
        assert error(scaled_sum, total) < 0.25 * error(plain_sum, total)


def test_block_sites_in_scaled_fp16_have_gradients() -> None:
    blocks = [embedding().requires_grad_() for _ in range(2)]
    queries = (torch.randn(3, SIZE) / 4).requires_grad_()

    def gradients(storage: str | None) -> tuple[torch.Tensor, ...]:
        given: Any = [attnres.ScaledTensor.from_tensor(block) for block in blocks] if storage else blocks
        sites = attnres.BlockSites(given, queries, EPS, storage=storage)
        hidden = sites.mix()
        hidden = sites.mix(torch.sin(hidden))
        hidden = sites.mix(torch.cos(hidden))
        total = sites.close(torch.sin(hidden))
        loss = total.to(torch.float32).square().mean()
        return torch.autograd.grad(loss, [*blocks, queries])

    for found, expected in zip(gradients("fp16_scaled"), gradients(None), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_block_sites_want_the_last_output() -> None:
    sites = attnres.BlockSites([embedding()], torch.zeros(2, SIZE), EPS)
    with pytest.raises(ValueError, match="delta is a tensor at site 0"):
        sites.mix(embedding())
    sites.mix()
    with pytest.raises(ValueError, match="delta is None at site 1"):
        sites.mix()


def test_direct_mixes_only_where_they_move_fewer_bytes() -> None:
    assert [direct_is_cheaper(1, sites) for sites in (1, 2, 3, 24)] == [False, True, True, True]
    assert not any(direct_is_cheaper(blocks, sites) for blocks in range(2, 9) for sites in range(1, 25))


# --- on a GPU ---


def gpu_network(backend: str, **options: Any) -> attnres.BlockAttnRes:
    return make(7, 3, size=256, dtype=torch.bfloat16, device="cuda", backend=backend, **options)


def on_gpu(network: attnres.BlockAttnRes, tokens: int) -> Results:
    try:
        return run(network, embedding(tokens, 256, dtype=torch.bfloat16, device="cuda"))
    except attnres.BackendError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 257, 1000])
@pytest.mark.parametrize("options", [{}, {"key_weight": True, "output_norm": True}], ids=["plain", "full"])
@pytest.mark.parametrize("backend", ["torch", "triton", "cute"])
def test_gpu_against_the_oracle(backend: str, options: dict[str, Any], tokens: int) -> None:
    """The torch backend's own error is the measure: the layers' roundings are most of it."""
    network = gpu_network(backend, **options)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors are born full of NaN
    try:
        found = on_gpu(network, tokens)
    finally:
        torch.use_deterministic_algorithms(False)
    inputs = embedding(tokens, 256, dtype=torch.bfloat16, device="cuda")
    reference = exact(network, inputs)
    network.backend, network.memory_saving = "torch", False
    floors = errors(run(network, inputs), reference)
    measured = errors(found, reference)
    floor = 2.0**-9
    assert {
        name: (error, floors[name]) for name, error in measured.items() if not error <= 1.5 * max(floors[name], floor)
    } == {}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cute"])
def test_gpu_same_bits(backend: str) -> None:
    network = gpu_network(backend, key_weight=True)
    assert_same_bits(on_gpu(network, 1000), on_gpu(network, 1000))


@pytest.mark.gpu
def test_gpu_dropout_is_recomputed_with_the_same_mask() -> None:
    network = make([MLP(256, 0.5) for _ in range(5)], 2, size=256, device="cuda")
    inputs, results = embedding(64, 256, device="cuda"), []
    for network.memory_saving in (True, False):
        torch.manual_seed(4)
        results.append(run(network, inputs))
    assert torch.equal(results[0]["out"], results[1]["out"])
    assert max(errors(*results).values()) < 10 * FLOAT32


@pytest.mark.gpu
def test_gpu_memory() -> None:
    """No growth over steps; less than with every operation's own savings."""

    def peak(network: attnres.BlockAttnRes) -> int:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            run(network, inputs)
        return torch.cuda.max_memory_allocated()

    inputs = embedding(4096, 256, dtype=torch.bfloat16, device="cuda")
    network = make(32, 8, size=256, dtype=torch.bfloat16, device="cuda")
    run(network, inputs)
    saving, allocated = peak(network), torch.cuda.memory_allocated()
    for _ in range(50):
        run(network, inputs)
    assert torch.cuda.memory_allocated() == allocated
    network.memory_saving = False
    assert saving < 0.6 * peak(network)
