"""The interface layer: which backend runs, what is refused, what is checked, and how torch's machinery meets the operators."""

import contextlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnres
from attnres import backend as backends
from attnres import checked_mode, contracts, dtypes, inputs, numerics, oracle, report
from attnres.inputs import Shape

OPS = ("mix", "phase1", "phase2", "step")
SMALL = Shape(5, 72, 3, 2)
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # of float32 arithmetic on numbers of order one


def mix(**options: Any) -> torch.Tensor:
    query, sources = torch.randn(16), [torch.randn(4, 16) for _ in range(3)]
    return attnres.attn_res(query, sources, **options)


def ask_for(name: str, how: str) -> None:
    with attnres.use_backend(name) if how == "context" else contextlib.nullcontext():
        mix(**({"backend": name} if how == "argument" else {}))


# --- which backend runs ---


def test_the_narrowest_choice_wins(ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNRES_BACKEND", raising=False)
    mix()
    monkeypatch.setenv("ATTNRES_BACKEND", "triton")
    mix()
    with attnres.use_backend("torch"):
        mix()
        mix(backend="triton")
        with attnres.use_backend("triton"):
            mix()
        mix()
    mix()
    assert [name for _, name in ran] == ["torch", "triton", "torch", "triton", "triton", "torch", "triton"]


def test_gradient_runs_on_the_backend_of_the_forward(ran: list[tuple[str, str]]) -> None:
    source = torch.randn(4, 16, requires_grad=True)
    out = attnres.attn_res(torch.randn(16), [source], backend="triton")
    with attnres.use_backend("torch"):
        out.sum().backward()
    assert ran == [("mix_fwd", "triton"), ("mix_bwd", "triton")]


@pytest.mark.parametrize("ask", ["argument", "context", "environment"])
def test_an_unknown_name_is_refused(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRES_BACKEND", "cuda" if ask == "environment" else "auto")
    with pytest.raises(ValueError, match="unknown backend 'cuda'; allowed are auto, cute, triton, torch"):
        ask_for("cuda", ask)


@pytest.mark.parametrize("ask", ["argument", "context", "environment"])
def test_cute_on_the_cpu_says_why_not(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = {"argument": "backend='cute'", "context": r"use_backend\('cute'\)", "environment": "ATTNRES_BACKEND=cute"}[
        ask
    ]
    monkeypatch.setenv("ATTNRES_BACKEND", "cute" if ask == "environment" else "torch")
    with pytest.raises(
        attnres.BackendError, match=f"{origin} cannot take mix_fwd: the tensors are on cpu.*capability 9.0"
    ):
        ask_for("cute", ask)


def test_triton_without_gpu_or_interpreter_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends.unavailable.cache_clear()
    backends.refusal.cache_clear()
    try:
        with pytest.raises(attnres.BackendError, match="TRITON_INTERPRET=1"):
            mix(backend="triton")
    finally:
        backends.unavailable.cache_clear()
        backends.refusal.cache_clear()


def test_triton_limits_are_a_refusal_with_the_reason() -> None:
    with pytest.raises(attnres.BackendError, match=r"mix_fwd: .*40000"):
        attnres.attn_res(torch.randn(40000), [torch.randn(1, 40000)], backend="triton")


def test_explain(ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNRES_BACKEND", raising=False)
    arguments = torch.randn(16), [torch.randn(4, 16)]
    found = attnres.explain(attnres.attn_res, *arguments)
    assert (found.requested, found.origin, found.forward, found.backward) == ("auto", "default", "torch", "torch")
    assert found.refusals["mix_fwd"]["torch"] is None
    assert "capability 9.0" in (found.refusals["mix_bwd"]["cute"] or "")
    refused = attnres.explain(attnres.attn_res, *arguments, backend="cute")
    assert (refused.forward, refused.backward) == (None, None)
    assert "no backend" in str(refused)
    assert not ran
    with pytest.raises(ValueError, match="allowed are attn_res, phase_1, phase_2, attn_res_step"):
        attnres.explain(torch.softmax)


def test_explain_covers_every_function() -> None:
    functions = {"phase1": attnres.phase_1, "phase2": attnres.phase_2, "step": attnres.attn_res_step}
    for op, function in functions.items():
        found = attnres.explain(function, **inputs.make_case(op, SMALL).arguments, backend="triton")
        assert found.forward == "triton"
        assert found.backward == (None if op == "step" else "triton")


LAUNCHERS = ("mix_fwd", "mix_bwd", "phase1_fwd", "phase1_bwd", "phase2_fwd", "phase2_bwd", "serve_step")
CUTE_LAUNCHERS = ("mix_fwd", "phase1_fwd", "phase1_bwd", "phase2_fwd", "phase2_bwd", "serve_step")


@pytest.mark.parametrize(
    ("op", "backend"), [(op, "triton") for op in LAUNCHERS] + [(op, "cute") for op in CUTE_LAUNCHERS]
)
def test_launchers_have_one_signature(op: str, backend: str) -> None:
    expected, found = (inspect.signature(backends.launcher(op, name)).parameters for name in ("torch", backend))
    wanted = list(expected)
    if backend == "cute":  # what it refuses as a feature it need not take
        wanted = [
            name for name in expected if name in found or expected[name].kind is not inspect.Parameter.KEYWORD_ONLY
        ]
    assert list(found) == wanted


def test_importing_brings_neither_triton_nor_the_dsl() -> None:
    code = "import sys, torch; had = set(sys.modules); import attnres; print(*{m.split('.')[0] for m in set(sys.modules) - had})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "attnres" in loaded.split()
    assert not {"cutlass", "triton", "tvm_ffi", "matplotlib", "rich"} & set(loaded.split())


# --- numerics of the public path ---


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "bf16/fp32"])
@pytest.mark.parametrize("op", OPS)
def test_within_budget(op: str, dtype: str, backend: str) -> None:
    case = inputs.make_case(op, SMALL, dtype=dtype, seed=3)
    measured = numerics.judge_all(report.call(case, backend), oracle.reference(op, case.arguments, case.grad_outputs))
    assert {name: found for name, found in measured.items() if not found.ok} == {}


def test_leading_dimensions_and_stacked_sources() -> None:
    stacked = torch.randn(3, 2, 5, 24, requires_grad=True)
    separate = [source.detach().clone().requires_grad_() for source in stacked]
    query, upstream = torch.randn(24, 1), torch.randn(2, 5, 24)
    first, weights = attnres.attn_res(query, stacked, return_weights=True)
    second = attnres.attn_res(query.view(-1), separate)
    assert first.shape == (2, 5, 24)
    assert weights.shape == (3, 2, 5)
    assert not weights.requires_grad
    first.backward(upstream)
    second.backward(upstream)
    assert torch.equal(first, second)
    assert torch.equal(stacked.grad, torch.stack([source.grad for source in separate]))


def test_phases_one_and_two_make_the_direct_mix() -> None:
    blocks, partial, query, weight = torch.randn(3, 7, 40), torch.randn(7, 40), torch.randn(40), torch.rand(40)
    out, lse = attnres.phase_1(blocks, query[None], 1e-6, weight, 0.7)
    merged = attnres.phase_2(partial, query, out[0], lse[0], 1e-6, weight, 0.7)
    direct = attnres.attn_res(query, [*blocks, partial], weight, scale=0.7)
    torch.testing.assert_close(merged, direct, **FLOAT32)


def test_weight_per_site_is_the_sites_one_by_one() -> None:
    blocks, queries = torch.randn(3, 6, 24), torch.randn(4, 24)
    weights = torch.rand(4, 24, requires_grad=True)
    out, lse = attnres.phase_1(blocks, queries, 1e-6, weights)
    (out.sum() + lse.sum()).backward()
    for s in range(4):
        one = weights.detach()[s].clone().requires_grad_()
        alone, alone_lse = attnres.phase_1(blocks, queries[s : s + 1], 1e-6, one)
        (alone.sum() + alone_lse.sum()).backward()
        assert torch.equal(alone[0], out[s])
        torch.testing.assert_close(one.grad, weights.grad[s])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens(backend: str) -> None:
    with attnres.use_backend(backend):
        query = torch.randn(16, requires_grad=True)
        empty = torch.randn(2, 0, 16, requires_grad=True)
        out = attnres.attn_res(query, [empty, empty])
        assert out.shape == (2, 0, 16)
        out.sum().backward()
        assert torch.equal(query.grad, torch.zeros(16))
        out, lse = attnres.phase_1([empty], torch.randn(3, 16), 1e-6)
        assert (out.shape, lse.shape) == ((3, 2, 0, 16), (3, 2, 0))
        assert attnres.phase_2(empty, query, empty, torch.zeros(2, 0), 1e-6).shape == (2, 0, 16)
        none = torch.randn(0, 16)
        with torch.no_grad():
            out = attnres.attn_res_step(none, none, torch.randn(0, 2, 16), query, query, None, 2, -1, 0.0, 0.0)
        assert out.shape == (0, 16)


def test_same_inputs_same_bits() -> None:
    case = inputs.make_case("mix", Shape(37, 130, 5, checkpoint_level=0), dtype="bf16")
    for backend in ("torch", "triton"):
        first, second = report.call(case, backend), report.call(case, backend)
        for name, value in first.items():
            pairs = zip(value, second[name], strict=True) if isinstance(value, list) else [(value, second[name])]
            assert all(torch.equal(a, b) for a, b in pairs), name


# --- drop-in argument lists ---


def test_the_argument_list_of_fla() -> None:
    query, weight = torch.randn(24), torch.rand(24)
    residuals = [torch.randn(2, 3, 24) for _ in range(3)]
    out, weights = attnres.attn_res(query, residuals, weight, weight, 1e-5, 0.5, True, 1)
    named = attnres.attn_res(
        query=query,
        residuals=residuals,
        rms_weight=weight,
        output_rms_weight=weight,
        rms_eps=1e-5,
        scale=0.5,
        return_weights=True,
        checkpoint_level=0,
    )
    exact = oracle.mix(query, residuals, weight, weight, 1e-5, 0.5)
    for found in ((out, weights), named):
        torch.testing.assert_close(found[0].double(), exact.out, **FLOAT32)
        torch.testing.assert_close(found[1].double(), exact.weights, **FLOAT32)


def test_the_argument_lists_of_flash_attn_res() -> None:
    blocks, queries, partial = torch.randn(3, 2, 5, 24), torch.randn(4, 24), torch.randn(2, 5, 24)
    eps = torch.finfo(torch.float32).eps
    out, lse = attnres.phase_1(blocks, queries, eps)
    merged = attnres.phase_2(partial, queries[1], out[1], lse[1], eps)
    exact = oracle.phase1(blocks.view(3, 10, 24), queries, eps)
    torch.testing.assert_close(out.double().view(4, 10, 24), exact.out, **FLOAT32)
    torch.testing.assert_close(lse.double().view(4, 10), exact.lse, **FLOAT32)
    expected = oracle.mix(queries[1], [*blocks, partial], rms_eps=eps)
    torch.testing.assert_close(merged.double(), expected.out, **FLOAT32)


def test_the_argument_list_of_vllm() -> None:
    prefix, delta, blocks = torch.randn(6, 24), torch.randn(6, 24), torch.randn(6, 4, 24)
    norm, query, output_norm = torch.rand(24), torch.randn(24), torch.rand(24)
    before = blocks.clone()
    expected = oracle.step(prefix.clone(), delta, blocks.clone(), norm, query, output_norm, 2, 3, 1e-6, 1e-5)
    out = attnres.attn_res_step(prefix, delta, blocks, norm, query, output_norm, 2, 3, 1e-6, 1e-5)
    torch.testing.assert_close(out.double(), expected.out, **FLOAT32)
    assert torch.equal(prefix, expected.prefix)
    assert torch.equal(blocks[:, 3], prefix)
    assert torch.equal(blocks[:, :3], before[:, :3])


# --- bad input ---

S = torch.randn(4, 16)
BAD_MIX: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0] * 16}, TypeError, "query is a list; allowed is a torch.Tensor"),
    ({"query": torch.randn(15)}, ValueError, r"query has shape \[15\]; allowed are \[16\] and \[16, 1\]"),
    ({"query": torch.randn(16).long()}, ValueError, "query has dtype int64; allowed are bfloat16, float16, float32"),
    ({"query": torch.randn(32)[::2]}, ValueError, "query has stride 2"),
    ({"query": torch.randn(16, device="meta")}, ValueError, "query is on meta; allowed is cpu"),
    ({"residuals": []}, ValueError, "residuals has 0 sources; allowed are 1 to 64"),
    ({"residuals": [S] * 65}, ValueError, "residuals has 65 sources; allowed are 1 to 64"),
    ({"residuals": {S}}, TypeError, "residuals is a set"),
    ({"residuals": [S, None]}, TypeError, r"residuals\[1\] is a NoneType"),
    ({"residuals": [S, S.double()]}, ValueError, r"residuals\[1\] has dtype float64"),
    ({"residuals": [S, S.half()]}, ValueError, r"residuals\[1\] is float16 \[4, 16\]; allowed is float32 \[4, 16\]"),
    ({"residuals": [S, S[:3]]}, ValueError, r"residuals\[1\] is float32 \[3, 16\]"),
    ({"residuals": [torch.randn(16, 4).t()]}, ValueError, r"residuals\[0\] has stride 4 in its last dimension"),
    ({"residuals": [torch.randn(3, 4, 16).transpose(0, 1)]}, ValueError, "not one run of rows; call .*contiguous"),
    ({"residuals": torch.randn(16)}, ValueError, r"one stacked tensor must be \[L, ..., D\]"),
    ({"residuals": [S.to_sparse()]}, ValueError, "layout torch.sparse_coo"),
    ({"rms_weight": torch.randn(1, 16)}, ValueError, r"rms_weight has shape \[1, 16\]; allowed is \[16\]"),
    ({"output_rms_weight": 1.0}, TypeError, "output_rms_weight is a float"),
    ({"rms_eps": -1e-6}, ValueError, "rms_eps is -1e-06; allowed are numbers >= 0"),
    ({"scale": float("nan")}, ValueError, "scale is nan; allowed are finite numbers"),
    ({"scale": "1"}, TypeError, "scale is a str"),
    ({"checkpoint_level": 2}, ValueError, "checkpoint_level is 2; allowed are 0"),
]


UNLIKE: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (torch.zeros(4, 16, dtype=torch.float16), ValueError, "is float16"),
    "tokens": (torch.zeros(5, 16), ValueError, r"is float32 \[5, 16\]"),
    "size": (torch.zeros(4, 17), ValueError, r"is float32 \[4, 17\]"),
    "rank": (torch.zeros(2, 2, 16), ValueError, r"is float32 \[2, 2, 16\]"),
    "strides": (torch.zeros(16, 4).t(), ValueError, "has stride 4 in its last dimension"),
    "device": (torch.zeros(4, 16, device="meta"), ValueError, "is on meta"),
    "layout": (torch.zeros(4, 16).to_sparse(), ValueError, "has layout torch.sparse_coo"),
    "type": (torch.zeros(4, 16).numpy(), TypeError, "is a ndarray"),
}


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("unlike", list(UNLIKE))
def test_one_source_that_differs_after_a_good_call(unlike: str, place: int, ran: list[Any]) -> None:
    query, sources = torch.randn(16), [torch.randn(4, 16) for _ in range(3)]
    attnres.attn_res(query, sources)
    attnres.phase_1(sources, query[None], 1e-6)
    ran.clear()
    sources[place], error, message = UNLIKE[unlike]
    with pytest.raises(error, match=rf"residuals\[{place}\] {message}"):
        attnres.attn_res(query, sources)
    with pytest.raises(error, match=rf"block_representations\[{place}\] {message}"):
        attnres.phase_1(sources, query[None], 1e-6)
    assert not ran


def test_sources_may_have_row_strides_of_their_own() -> None:
    query, sources = torch.randn(16), [torch.randn(4, 16) for _ in range(3)]
    padded = [sources[0], torch.randn(4, 24)[:, :16].copy_(sources[1]), sources[2]]
    assert attnres.attn_res(query, padded).equal(attnres.attn_res(query, sources))


@pytest.mark.parametrize(
    ("offset", "pad", "blocks", "found"),
    [(0, 0, 2, 16), (0, 1, 2, 2), (0, 4, 2, 8), (1, 0, 2, 2), (4, 0, 1, 8), (0, 0, 0, 16)],
)
def test_alignment_of_a_step(offset: int, pad: int, blocks: int, found: int) -> None:
    memory = torch.zeros(1024, dtype=torch.bfloat16)
    stored = memory.as_strided((4, blocks, 16), (128, 16 + pad, 1), offset)
    spec = contracts.step_spec(memory[:64].view(4, 16), None, stored, 0)
    assert spec.byte_alignment == found


@pytest.mark.parametrize(("change", "error", "message"), BAD_MIX, ids=[str(i) for i in range(len(BAD_MIX))])
def test_bad_mix_arguments(change: dict[str, Any], error: type[Exception], message: str, ran: list[Any]) -> None:
    with pytest.raises(error, match=message):
        attnres.attn_res(**{"query": torch.randn(16), "residuals": [S, S], **change})
    assert not ran


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pseudo_queries": torch.randn(16)},
            r"pseudo_queries has shape \[16\]; allowed is \[S, D\] with S >= 1 and D = 16",
        ),
        ({"pseudo_queries": torch.randn(0, 16)}, "pseudo_queries has shape"),
        ({"rms_weight": torch.randn(2, 16)}, r"rms_weight has shape \[2, 16\]; allowed are \[16\] and \[3, 16\]"),
        ({"eps": float("inf")}, "eps is inf"),
    ],
)
def test_bad_phase_1_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attnres.phase_1(**{"block_representations": [S], "pseudo_queries": torch.randn(3, 16), "eps": 1e-6, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_sum": S.bfloat16(), "inter_out": S.half()}, "inter_out is float16; allowed with bfloat16 storage"),
        ({"inter_lse": torch.randn(3)}, r"inter_lse is float32 \[3\]; allowed is float32 \[4\]"),
        ({"inter_lse": torch.randn(4).half()}, "inter_lse is float16"),
        ({"delta": S[:2]}, "delta is float32"),
        ({"output_rms_eps": -1.0}, "output_rms_eps is -1.0"),
    ],
)
def test_bad_phase_2_arguments(change: dict[str, Any], message: str) -> None:
    given = {
        "partial_sum": S,
        "pseudo_query": torch.randn(16),
        "inter_out": S,
        "inter_lse": torch.randn(4),
        "eps": 1e-6,
    }
    with pytest.raises(ValueError, match=message):
        attnres.phase_2(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 4}, "num_blocks is 4; allowed are 0 to 3"),
        ({"block_write_idx": 1}, "block_write_idx is 1; allowed are -1 .* and 2 to 2"),
        ({"block_write_idx": 3}, "block_write_idx is 3"),
        ({"prefix": torch.randn(1, 16).expand(4, 16)}, "prefix is expanded"),
        ({"prefix": torch.randn(2, 2, 16)}, r"prefix has shape \[2, 2, 16\]; allowed is \[T, D\]"),
        ({"blocks": torch.randn(4, 3, 16).half()}, "blocks is float16"),
        ({"qk_weight": torch.randn(16, requires_grad=True)}, "has no gradient"),
    ],
)
def test_bad_step_arguments(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"prefix": S.clone(), "delta": S, "blocks": torch.randn(4, 3, 16), "norm_weight": None}
    given |= {"qk_weight": torch.randn(16), "output_norm_weight": None, "num_blocks": 2, "block_write_idx": -1}
    with pytest.raises(ValueError, match=message):
        attnres.attn_res_step(**{**given, "eps": 1e-6, "output_norm_eps": 1e-6, **change})


# --- checked mode ---


@pytest.mark.parametrize("mode", ["sample", "full"])
@pytest.mark.parametrize("op", OPS)
def test_checked_mode_passes_correct_results(op: str, mode: str) -> None:
    case = inputs.make_case(op, Shape(100, 40, 3, 2), dtype="bf16")
    with attnres.checked(mode):
        report.call(case, "torch")


@pytest.mark.parametrize(
    ("op", "launch", "position", "tensor"),
    [
        ("mix", "mix_fwd", 7, "out"),
        ("mix", "mix_fwd", 12, "weights"),
        ("mix", "mix_bwd", 12, "d_residuals"),
        ("mix", "mix_bwd", 13, "d_query"),
        ("phase1", "phase1_fwd", 5, "out"),
        ("phase1", "phase1_fwd", 6, "lse"),
        ("phase1", "phase1_bwd", 10, "d_block_representations"),
        ("phase2", "phase2_fwd", 10, "out"),
        ("phase2", "phase2_fwd", 11, "new_partial"),
        ("phase2", "phase2_bwd", 13, "d_partial_sum"),
        ("phase2", "phase2_bwd", 15, "d_inter_lse"),
        ("step", "serve_step", 0, "prefix"),
        ("step", "serve_step", 2, "blocks"),
        ("step", "serve_step", 10, "out"),
    ],
)
def test_checked_mode_catches_a_broken_backend(
    op: str, launch: str, position: int, tensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = backends.launcher

    def broken(wanted: str, backend: str) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            original(wanted, backend)(*arguments)
            if wanted == launch:
                target = arguments[position]
                (target[0] if isinstance(target, list) else target).mul_(1.05)

        return run

    monkeypatch.setattr(backends, "launcher", broken)
    case = inputs.make_case(op, Shape(9, 40, 3, 2), dtype="bf16")
    report.call(case, "torch")
    with attnres.checked("sample"), pytest.raises(attnres.NumericsError, match="on backend 'torch'") as caught:
        report.call(case, "torch")
    assert caught.value.verdict.tensor == tensor
    assert caught.value.verdict.measurement.error > caught.value.verdict.measurement.budget


def test_full_finds_the_row_that_sampling_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    original = backends.launcher

    def broken(op: str, backend: str) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            original(op, backend)(*arguments)
            arguments[7][501] += 1.0

        return run

    monkeypatch.setattr(backends, "launcher", broken)
    query, source = torch.randn(16), torch.randn(1000, 16)
    with attnres.checked("sample"):
        attnres.attn_res(query, [source])
    with attnres.checked("full"), pytest.raises(attnres.NumericsError, match="in row 501"):
        attnres.attn_res(query, [source])


def test_check_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRES_CHECK", "full")
    assert checked_mode.current() == "full"
    with attnres.checked("off"):
        assert checked_mode.current() == "off"
    monkeypatch.setenv("ATTNRES_CHECK", "yes")
    with pytest.raises(ValueError, match="ATTNRES_CHECK: unknown mode 'yes'; allowed are off, sample, full"):
        mix()


# --- torch's machinery ---


def _differentiable_calls() -> dict[str, tuple[Callable[..., Any], list[torch.Tensor]]]:
    query, weight = torch.randn(24), torch.rand(24)
    a, b, lse = torch.randn(4, 24), torch.randn(4, 24), torch.randn(4)
    return {
        "mix": (lambda q, w, x, y: attnres.attn_res(q, [x, y], w, w), [query, weight, a, b]),
        "mix stacked": (lambda q, w, x: attnres.attn_res(q, x, w), [query, weight, torch.stack([a, b])]),
        "phase 1": (lambda q, x, y: attnres.phase_1([x, y], q, 1e-6), [torch.randn(3, 24), a, b]),
        "phase 2": (
            lambda q, w, x, y, o, s: attnres.phase_2(x, q, o, s, 1e-6, w, delta=y, output_rms_weight=w),
            [query, weight, a, b, torch.randn(4, 24), lse],
        ),
    }


@pytest.mark.parametrize("name", list(_differentiable_calls()))
def test_compiled_graphs_are_whole_and_right(name: str) -> None:
    function, tensors = _differentiable_calls()[name]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.square().sum() for output in outputs).backward()
        results.append([*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_compiled_graph_reads_the_choice_when_it_runs(ran: list[tuple[str, str]]) -> None:
    compiled = torch.compile(lambda q, x: attnres.attn_res(q, [x]), fullgraph=True, backend="aot_eager")
    query, source = torch.randn(16), torch.randn(4, 16)
    for name in ("torch", "triton", "torch"):
        with attnres.use_backend(name):
            compiled(query, source)
    assert [name for _, name in ran] == ["torch", "triton", "torch"]


def test_compiled_step_updates_in_place() -> None:
    case = inputs.make_case("step", SMALL, dtype="fp32")
    eager = report.call(case, "torch")
    given = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.arguments.items()
    }
    out = torch.compile(attnres.attn_res_step, fullgraph=True, backend="aot_eager")(**given)
    assert torch.equal(out, eager["out"])
    assert torch.equal(given["prefix"], eager["prefix"])
    blocks = given["blocks"].nan_to_num(nan=0.5)
    assert torch.equal(blocks, eager["blocks"].nan_to_num(nan=0.5))


def test_operators_pass_opcheck() -> None:
    query, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((24,), (4, 24), (4, 24)))
    lse = torch.randn(4, requires_grad=True)
    nothing = (None, None, None)  # neither values and scales nor another dtype of the output
    mix_arguments = ([a, b], query, None, None, 1e-6, 1.0, False, True, False, True, "torch", "", *nothing)
    torch.library.opcheck(torch.ops.attnres.mix.default, mix_arguments)
    torch.library.opcheck(
        torch.ops.attnres.phase_1.default,
        ([a, b], query[None], None, 1e-6, 1.0, False, True, "torch", "", None, None, False, None, None),
    )
    torch.library.opcheck(
        torch.ops.attnres.phase_2.default,
        (a, None, query, None, b, lse, None, 1e-6, 1e-6, 1.0, True, "torch", "", None, *nothing, False, None, None),
    )
    plain = [tensor.detach().clone() for tensor in (a, b, query)]
    torch.library.opcheck(
        torch.ops.attnres.step.default,
        (
            plain[0],
            plain[1],
            torch.randn(4, 3, 24),
            None,
            plain[2],
            None,
            2,
            -1,
            1e-6,
            1e-6,
            "torch",
            "",
            *nothing,
            None,
        ),
    )


def test_autocast_changes_nothing() -> None:
    query, source = torch.randn(24), torch.randn(4, 24)
    plain = attnres.attn_res(query, [source, source + 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attnres.attn_res(query, [source, source + 1])
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    function, tensors = _differentiable_calls()["mix"]
    grads = []
    for checkpointed in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        call = (
            (lambda *x: torch.utils.checkpoint.checkpoint(function, *x, use_reentrant=reentrant))
            if checkpointed
            else function
        )
        call(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_expanded_and_strided_upstream_gradients() -> None:
    query, source = torch.randn(24), torch.randn(4, 24, requires_grad=True)
    attnres.attn_res(query, [source, source.detach() + 1]).sum().backward()
    expanded, source.grad = source.grad, None
    attnres.attn_res(query, [source, source.detach() + 1]).backward(torch.ones(24, 4).t())
    assert torch.equal(expanded, source.grad)


def test_the_gradient_of_the_mix_fills_no_zeros() -> None:
    """autograd makes zeros for the statistics, a launch each, unless it is told not to."""
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    sources = [torch.randn(4, 16, requires_grad=True) for _ in range(3)]
    out = attnres.attn_res(torch.randn(16), sources, backend="triton")
    with Record():
        torch.autograd.grad(out, sources, torch.ones_like(out))
    assert "aten::empty_like" in seen
    assert not {"aten::zeros", "aten::zero_", "aten::new_zeros"} & set(seen)


def test_a_mix_without_upstream_gradient_has_none() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> None:
            return None

    source = torch.randn(4, 16, requires_grad=True)
    Stop.apply(attnres.attn_res(torch.randn(16), [source, source.detach()])).sum().backward()
    assert source.grad is None


@pytest.mark.parametrize("keep", ["out", "lse"])
def test_phase_1_with_one_unused_output(keep: str) -> None:
    blocks = torch.randn(2, 5, 24, requires_grad=True)
    queries = torch.randn(3, 24, requires_grad=True)
    out, lse = attnres.phase_1(blocks, queries, 1e-6)
    {"out": out, "lse": lse}[keep].sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (blocks, queries)]
    getattr(oracle.phase1(*exact, 1e-6), keep).sum().backward()
    for found, expected in zip((blocks, queries), exact, strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


def test_the_readme_shows_the_table_of_dtypes() -> None:
    readme = Path(__file__).parent.parent / "README.md"
    assert dtypes.markdown() in readme.read_text()
