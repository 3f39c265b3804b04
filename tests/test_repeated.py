"""Calls that repeat: recognised when nothing but addresses differs, launched with the arguments of the long way, and only then."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import attnres
from attnres import backend as backends
from attnres import repeated
from cute_kernels import compile, mix_fwd, phase1_fwd, phase2_fwd, replay, serve_step

T, D = 6, 64
BF16, FP32 = torch.bfloat16, torch.float32


class Kernels:
    """Stands for the compiled kernels: keeps what they were launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.launches.append(tuple(tuple(a) if isinstance(a, (list, tuple)) else a for a in arguments))

    def take(self) -> list[tuple[Any, ...]]:
        taken, self.launches = self.launches, []
        return taken


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """CuTe's launchers on CPU tensors, with kernels that do nothing."""
    stub = Kernels()
    monkeypatch.setattr(backends, "unavailable", lambda name, device: None)
    backends.refusal.cache_clear()
    for module in (mix_fwd, phase1_fwd):
        monkeypatch.setattr(module, "build", lambda config: compile.notable(stub))
        monkeypatch.setattr(module, "current_stream", lambda device: 7)
        module.kernel_for.cache_clear()
    monkeypatch.setattr(mix_fwd, "sm_count", lambda device: 132)
    monkeypatch.setattr(phase1_fwd, "cluster_count", lambda cluster, threads, shared_bytes, device: 132 // cluster)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("ATTNRES_BACKEND", "cute")
    repeated._slot.cache_clear()
    yield stub
    backends.refusal.cache_clear()
    repeated._slot.cache_clear()
    for module in (mix_fwd, phase1_fwd):
        module.kernel_for.cache_clear()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call: whether it was launched as one before."""
    found = []
    original = repeated.Call.replay

    def replay(self: repeated.Call, tensors: Any) -> bool:
        found.append(original(self, tensors))
        return found[-1]

    monkeypatch.setattr(repeated.Call, "replay", replay)
    return found


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(BF16)


def _mix(leading: tuple[int, ...], depth: int) -> tuple[Any, Any]:
    sources, query, weight = [bf16(*leading, D) for _ in range(depth)], bf16(D), torch.randn(D)
    out, weights = attnres.attn_res(query, sources, output_rms_weight=weight, rms_eps=1e-5, return_weights=True)
    rows, nothing = [source.view(-1, D) for source in sources], (None,) * 4
    weights = weights.view(depth, -1)
    return mix_fwd.mix_fwd, (rows, query, None, weight, 1e-5, 1e-5, 1.0, out.view(-1, D), *nothing, weights)


def _phase_1(leading: tuple[int, ...], depth: int, sites: int, size: int = D) -> tuple[Any, Any]:
    sources, queries, weight = [bf16(*leading, size) for _ in range(depth)], bf16(sites, size), bf16(size)
    out, lse = attnres.phase_1(sources, queries, 1e-6, weight)
    rows, shape = [source.view(-1, size) for source in sources], (sites, -1, size)
    outputs = (out.view(shape), lse.view(sites, -1), None, None)
    return phase1_fwd.phase1_fwd, (rows, queries, weight.expand(sites, size), 1e-6, 1.0, *outputs)


def _phase_2(leading: tuple[int, ...], with_delta: bool) -> tuple[Any, Any]:
    partial, inter, delta = (bf16(*leading, D) for _ in range(3))
    query, lse, weight = bf16(D), torch.randn(leading), bf16(D)
    if with_delta:
        out, new = attnres.phase_2(partial, query, inter, lse, 1e-6, delta=delta, output_rms_weight=weight)
        delta, new = delta.view(-1, D), new.view(-1, D)
    else:
        out, delta, new = attnres.phase_2(partial, query, inter, lse, 1e-6, output_rms_weight=weight), None, None
    given = (partial.view(-1, D), delta, query, None, inter.view(-1, D), lse.view(-1), weight)
    return phase2_fwd.phase2_fwd, (*given, 1e-6, 1e-6, 1.0, out.view(-1, D), new, None, None)


def _step(blocks: torch.Tensor, write: int = 3) -> tuple[Any, Any]:
    prefix, delta, query, weight = bf16(T, D), bf16(T, D), bf16(D), bf16(D)
    out = attnres.attn_res_step(prefix, delta, blocks, weight, query, None, 2, write, 1e-6, 1e-5)
    return serve_step.serve_step, (prefix, delta, blocks, query, weight, None, 2, write, 1e-6, 1e-5, out)


CALLS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "mix": lambda: _mix((T,), 9),
    "mix of one": lambda: _mix((T,), 1),
    "mix [B, T, D]": lambda: _mix((2, 3), 4),
    "phase 1": lambda: _phase_1((T,), 3, 8),
    "phase 1 [B, T, D]": lambda: _phase_1((2, 3), 9, 24),
    "phase 1, two launches": lambda: _phase_1((T,), 2, 24, 7168),
    "phase 1, one query": lambda: _phase_1((T,), 3, 1),
    "phase 2": lambda: _phase_2((T,), False),
    "phase 2 with delta": lambda: _phase_2((2, 3), True),
    "step": lambda: _step(bf16(T, 5, D)),
    "step without a write": lambda: _step(bf16(T, 5, D), -1),
    "step, strided blocks": lambda: _step(bf16(T, 9, D)[:, 1::2]),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_get_what_the_launcher_gives_them(name: str, kernels: Kernels, replays: list[bool]) -> None:
    for repeats in (False, False, True, True):
        launcher, arguments = CALLS[name]()
        found = kernels.take()
        launcher(*arguments)
        assert found == kernels.take()
        assert len(found) == (2 if name.endswith("two launches") else 1)
        assert (True in replays) == repeats
        replays.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("step")])
def test_repeated_launches_give_the_launcher_s_bits(name: str, replays: list[bool]) -> None:
    repeated._slot.cache_clear()
    with torch.device("cuda"), attnres.use_backend("cute"):
        for _ in range(4):
            launcher, arguments = CALLS[name]()
            found = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
            launcher(*arguments)
            again = [value for value in arguments if isinstance(value, torch.Tensor)]
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert replays == [False, False, True, True]


@pytest.mark.gpu
def test_a_repeated_step_on_the_gpu(replays: list[bool]) -> None:
    repeated._slot.cache_clear()
    with torch.device("cuda"), torch.no_grad():
        for _ in range(4):
            prefix, delta, blocks, query = bf16(T, D), bf16(T, D), bf16(T, 5, D), bf16(D)
            results = []
            for repeats in (False, True):
                x, b = prefix.clone(), blocks.clone()
                with pytest.MonkeyPatch.context() as patch:
                    if not repeats:
                        patch.setattr(repeated, "TensorGuards", None)
                    out = attnres.attn_res_step(x, delta, b, None, query, None, 2, 3, 1e-6, 1e-6, backend="cute")
                results.append((out, x, b))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert replays[1::2] == [False, False, True, True]


def test_with_gradients_too(kernels: Kernels, replays: list[bool]) -> None:
    for _ in range(4):
        sources = [bf16(T, D).requires_grad_() for _ in range(3)]
        assert attnres.attn_res(bf16(D), sources).requires_grad
    assert replays == [False, False, True, True]
    with torch.no_grad():
        assert not attnres.attn_res(bf16(D), sources).requires_grad
    assert replays.pop() is False
    assert len(kernels.take()) == 5


def _set_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 8)


def _capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def _set_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def _replace_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "launcher", lambda op, backend: lambda *arguments: mix_fwd.mix_fwd(*arguments))


@pytest.mark.parametrize("change", [_set_stream, _capture, _set_device, _replace_launcher])
def test_other_surroundings_go_the_long_way(
    change: Callable[[pytest.MonkeyPatch], None],
    kernels: Kernels,
    replays: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(3):
        _mix((T,), 2)
    assert replays == [False, False, True]
    change(monkeypatch)
    _mix((T,), 2)
    assert replays.pop() is False
    assert len(kernels.take()) == 4


def test_an_unaligned_address_goes_the_long_way(kernels: Kernels, replays: list[bool]) -> None:
    sources, memory = [bf16(T, D), bf16(T, D)], bf16(2 * D)
    for _ in range(3):
        attnres.attn_res(memory[:D], sources)
    attnres.attn_res(memory[1 : D + 1], sources)
    assert replays == [False, False, True, False]
    aligned, copied = (launch[2][0] for launch in kernels.take()[-2:])
    assert aligned == memory.data_ptr()
    assert copied % 16 == 0
    assert copied != aligned


def test_a_launcher_that_copies_goes_the_long_way(kernels: Kernels, replays: list[bool]) -> None:
    sources, queries = [bf16(T, D), bf16(T, D)], bf16(3, D + 1)[:, :D]
    for _ in range(4):
        attnres.phase_1(sources, queries, 1e-6)
    assert replays == [False] * 4
    copies = [launch[2] for launch in kernels.take()]
    assert queries.data_ptr() not in copies
    assert len(copies) == 4


def test_addresses_on_both_sides_of_a_tensor_s_first(kernels: Kernels) -> None:
    kernel = compile.notable(kernels)

    def launcher(a: torch.Tensor, many: list[torch.Tensor], number: int) -> None:
        kernel(a.data_ptr() - 64, [b.data_ptr() + 32 for b in many] + [number], (1, 2), [many[0].data_ptr()], number, 7)

    tensors = [bf16(8) for _ in range(3)]
    again = replay.record(launcher, (tensors[0], tensors[1:], 2**63 - 1), tensors)
    assert not kernels.take()
    assert again([1024, 2048, 4096])
    assert kernels.take() == [(960, (2080, 4128, 2**63 - 1), (1, 2), (2048,), 2**63 - 1, 7)]
    assert not again([1024, 2048, 4104])


def _arguments(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"query": torch.randn(16), "residuals": [torch.randn(4, 16), torch.randn(4, 16)], "rms_eps": 1.0, **changes}


def _source(**changes: Any) -> list[torch.Tensor]:
    return [_arguments()["residuals"][0], torch.randn(4, 16, **changes)]


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "a source's dtype": lambda: {"residuals": _source(dtype=BF16)},
    "all dtypes": lambda: {"residuals": [bf16(4, 16), bf16(4, 16)]},
    "a source's shape": lambda: {"residuals": [torch.randn(4, 16), torch.randn(3, 16)]},
    "the number of tokens": lambda: {"residuals": [torch.randn(3, 16), torch.randn(3, 16)]},
    "the number of sources": lambda: {"residuals": [torch.randn(4, 16)]},
    "no source": lambda: {"residuals": []},
    "a source's strides": lambda: {"residuals": [torch.randn(4, 16), torch.randn(16, 4).t()]},
    "row strides": lambda: {"residuals": [torch.randn(4, 32)[:, :16], torch.randn(4, 16)]},
    "a source's layout": lambda: {"residuals": [torch.randn(4, 16), torch.randn(4, 16).to_sparse()]},
    "a source's device": lambda: {"residuals": _source(device="meta")},
    "a source is None": lambda: {"residuals": [torch.randn(4, 16), None]},
    "a source is an array": lambda: {"residuals": [torch.randn(4, 16), torch.randn(4, 16).numpy()]},
    "one source twice": lambda: {"residuals": [torch.ones(4, 16)] * 2},
    "stacked": lambda: {"residuals": torch.randn(2, 4, 16)},
    "a stack of one": lambda: {"residuals": [torch.randn(2, 4, 16)]},
    "requires_grad": lambda: {"residuals": _source(requires_grad=True)},
    "the query's shape": lambda: {"query": torch.randn(17)},
    "the query [D, 1]": lambda: {"query": torch.randn(16, 1)},
    "a key weight": lambda: {"rms_weight": torch.randn(16)},
    "an output weight": lambda: {"output_rms_weight": torch.randn(16)},
    "eps is True": lambda: {"rms_eps": True},
    "eps is an int": lambda: {"rms_eps": 1},
    "eps is NaN": lambda: {"rms_eps": float("nan")},
    "eps is a list": lambda: {"rms_eps": [1.0]},
    "eps is a tensor": lambda: {"rms_eps": torch.ones(())},
    "scale": lambda: {"scale": 2.0},
    "weights wanted": lambda: {"return_weights": True},
    "out_dtype": lambda: {"out_dtype": BF16},
    "checkpoint_level": lambda: {"checkpoint_level": 2},
    "backend": lambda: {"backend": "cute"},
    "an unknown backend": lambda: {"backend": "fast"},
}


@pytest.mark.parametrize("weight", [None, "rms_weight", "output_rms_weight"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_call_does_what_it_does_alone(name: str, weight: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {} if weight is None else {weight: torch.randn(16)}
    changed = _arguments(**CHANGES[name]())
    repeated._slot.cache_clear()
    for _ in range(3):
        attnres.attn_res(**_arguments(**known))
    assert repeated._slot.cache_info().hits >= 2
    after = _outcome(changed)
    assert _outcome(changed) == after
    monkeypatch.setattr(repeated, "TensorGuards", None)
    assert _outcome(changed) == after


def _outcome(arguments: dict[str, Any]) -> Any:
    """The numbers, or the error."""
    try:
        found = attnres.attn_res(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)
    found = found if isinstance(found, tuple) else (found,)
    return [(t.dtype, t.requires_grad, t.tolist()) for t in found]


def test_the_environment_is_read_at_every_call(ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments()
    for name in ("torch", "torch", "torch", "triton", "torch"):
        monkeypatch.setenv("ATTNRES_BACKEND", name)
        attnres.attn_res(**arguments)
    with attnres.use_backend("triton"):
        attnres.attn_res(**arguments)
    assert [backend for _, backend in ran] == ["torch"] * 3 + ["triton", "torch", "triton"]
    monkeypatch.setenv("ATTNRES_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        attnres.attn_res(**arguments)


def test_checked_mode_judges_a_call_that_repeats(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, query = [torch.ones(T, D, dtype=BF16), bf16(T, D)], bf16(D)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.full_like(tensor, 9.0))  # the result
    for _ in range(3):
        attnres.attn_res(query, sources)
    monkeypatch.setenv("ATTNRES_CHECK", "full")
    with pytest.raises(attnres.NumericsError):
        attnres.attn_res(query, sources)
    monkeypatch.setenv("ATTNRES_CHECK", "off")
    with attnres.checked(), pytest.raises(attnres.NumericsError):
        attnres.attn_res(query, sources)


def test_few_signatures_are_kept_and_no_tensor() -> None:
    repeated._slot.cache_clear()
    arguments = _arguments()
    for i in range(repeated.MAX_SIGNATURES + 10):
        attnres.attn_res(**{**arguments, "rms_eps": i + 1.0})
    assert repeated._slot.cache_info().currsize == repeated.MAX_SIGNATURES
    gone = [weakref.ref(tensor) for tensor in (arguments["query"], *arguments["residuals"])]
    del arguments
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_a_seed_is_not_remembered() -> None:
    repeated._slot.cache_clear()
    sources, query = [torch.randn(4, 16).to(BF16) for _ in range(2)], torch.randn(2, 16)
    one, two, again = (attnres.phase_1(sources, query, 1e-6, stochastic_seed=seed)[0] for seed in (1, 2, 1))
    assert not torch.equal(one, two)
    assert torch.equal(one, again)
    assert repeated._slot.cache_info().currsize == 0
