"""The Triton launchers against the float64 oracle, on the GPU where there is one, else under TRITON_INTERPRET=1.

Outputs are poisoned with NaN; budgets are those of attnres.numerics; every gradient is judged.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from attnres import numerics, oracle
from triton_ref import config
from triton_ref.mix_bwd import mix_bwd
from triton_ref.mix_fwd import mix_fwd
from triton_ref.phase1_bwd import phase1_bwd
from triton_ref.phase1_fwd import phase1_fwd
from triton_ref.phase2_bwd import phase2_bwd
from triton_ref.phase2_fwd import phase2_fwd
from triton_ref.query_grad import query_grad
from triton_ref.serve_step import serve_step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS, OUTPUT_EPS = 1e-6, 1e-5


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    tokens: int = 3
    hidden: int = 40
    sources: int = 2
    queries: int = 1
    dtype: torch.dtype = BF16
    query_dtype: torch.dtype = FP32
    weight_dtype: torch.dtype | None = BF16  # None: no key weight
    output_dtype: torch.dtype | None = None  # None: no output norm
    kind: str = "normal"
    scale: float = 0.5

    def __str__(self) -> str:
        name = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
        return (
            f"T{self.tokens}-D{self.hidden}-L{self.sources}-S{self.queries}-{name(self.dtype)}-q_{name(self.query_dtype)}"
            f"-w_{name(self.weight_dtype)}-o_{name(self.output_dtype)}-{self.kind}-scale{self.scale}"
        )


def generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.tokens * 1000003 + case.hidden * 1009 + case.sources * 31 + case.queries)


def rows(case: Case, count: int, device: str, g: torch.Generator) -> list[Tensor]:
    """count tensors [T, D] of the case's value kind and memory layout."""
    shape = (case.tokens, case.hidden)
    values = [torch.randn(shape, generator=g) for _ in range(count)]
    if case.kind == "dominant":
        values[count // 2] *= 1000.0
    if case.kind == "tied":
        values = [values[0].clone() for _ in values]
    if case.kind == "large":
        values = [v.clamp(-2, 2) * 30000.0 for v in values]
    if case.kind == "offset":
        values = [v + 30.0 for v in values]
    if case.kind == "zero_rows":
        values[0][::2] = 0.0
        values[-1][-1] = 0.0
    values = [v.to(case.dtype).to(device) for v in values]
    if case.kind == "strided":
        # [T, B, D] with the sources as columns, and rows longer than D
        table = torch.full((case.tokens, count, case.hidden + 8), torch.nan, dtype=case.dtype, device=device)
        for i, v in enumerate(values):
            table[:, i, : case.hidden] = v
        values = [table[:, i, : case.hidden] for i in range(count)]
    if case.kind == "broadcast":
        values[0] = values[0][:1].expand(shape)
    return values


def parameters(case: Case, count: int, device: str, g: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """queries [S, D], key_weights [S, D] or None, output_weight [D] or None."""
    shape = (count, case.hidden)
    size = 40.0 if case.kind == "peaked" else 1.0
    queries = (torch.randn(shape, generator=g) * size / case.hidden**0.5 / case.scale).to(case.query_dtype)
    weights = None
    if case.weight_dtype is not None:
        weights = (1 + 0.3 * torch.randn(shape, generator=g)).to(case.weight_dtype).to(device)
    output_weight = None
    if case.output_dtype is not None:
        output_weight = (1 + 0.3 * torch.randn(case.hidden, generator=g)).to(case.output_dtype).to(device)
    return queries.to(device), weights, output_weight


def poison(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def poison_like(x: Tensor | None) -> Tensor | None:
    return None if x is None else poison(*x.shape, dtype=x.dtype, device=str(x.device))


def statistics(sources: list[Tensor], query: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """logits and rstd [L, T] in float64."""
    v = torch.stack(sources).double()
    u = query.double() if weight is None else query.double() * weight.double()
    rstd = (v.square().mean(-1) + EPS).rsqrt()
    return scale * rstd * (v @ u), rstd


def check(op: str, actual: dict[str, Tensor | list[Tensor] | None], references: dict[str, numerics.Reference]) -> None:
    """Every tensor within its budget, and every result of the oracle judged."""
    wanted = {name: value for name, value in actual.items() if value is not None}
    missing = set(references) - set(wanted)
    assert not missing, f"{op}: {missing} not judged"
    for name, value in wanted.items():
        found = numerics.judge_reference(value, references[name])
        assert found.ok, f"{op} {name}: {found}"


def close(actual: Tensor, exact: Tensor, relative: float = 2e-6) -> None:
    assert (actual.double() - exact).norm() <= relative * exact.norm() + 1e-12


MIX_CASES = [
    Case(),
    Case(tokens=1, hidden=8, sources=1, dtype=FP32, query_dtype=BF16, weight_dtype=None, output_dtype=FP32),
    Case(tokens=5, hidden=384, sources=9, query_dtype=BF16, output_dtype=BF16),
    Case(tokens=3, hidden=40, sources=29, dtype=FP16, weight_dtype=FP32, output_dtype=FP16, kind="strided"),
    Case(tokens=2, hidden=8, sources=64, dtype=FP32),
    Case(tokens=2, hidden=7186, sources=2, output_dtype=FP32),
    Case(tokens=1, hidden=7168, sources=3, dtype=FP32, weight_dtype=None, output_dtype=FP32),
    Case(tokens=5, hidden=40, sources=3, kind="broadcast", output_dtype=BF16),
    Case(tokens=5, hidden=384, sources=9, dtype=FP32, output_dtype=FP32, kind="peaked"),
    Case(tokens=5, hidden=384, sources=9, kind="peaked", scale=0.05),
    Case(tokens=3, hidden=384, sources=9, dtype=FP16, output_dtype=FP16, kind="large"),
    Case(tokens=3, hidden=384, sources=5, kind="tied"),
    Case(tokens=3, hidden=384, sources=5, kind="dominant", output_dtype=BF16),
    Case(tokens=3, hidden=384, sources=5, kind="offset", dtype=FP32),
    Case(tokens=5, hidden=384, sources=5, kind="zero_rows", output_dtype=BF16),
]


def run_mix(case: Case, device: str, keep_mixed: bool) -> tuple[dict, dict]:
    g = generator(case)
    sources = rows(case, case.sources, device, g)
    (query,), weights, output_weight = parameters(case, 1, device, g)
    key_weight = None if weights is None else weights[0]
    d_out = torch.randn(case.tokens, case.hidden, generator=g).to(case.dtype).to(device)
    stats = [poison(case.sources, case.tokens, dtype=FP32, device=device) for _ in range(3)]
    logits, rstd, p = stats
    lse = poison(case.tokens, dtype=FP32, device=device)
    out = poison_like(d_out)
    mixed = poison_like(d_out) if keep_mixed else None
    mix_fwd(
        sources, query, key_weight, output_weight, EPS, OUTPUT_EPS, case.scale, out, mixed, logits, rstd, lse, p
    )  # fmt: skip
    exact_logits, exact_rstd = statistics(sources, query, key_weight, case.scale)
    close(rstd, exact_rstd)
    assert (logits.double() - exact_logits).abs().max() <= 2e-6 * (1 + exact_logits.abs().max())
    assert (lse.double() - exact_logits.logsumexp(0)).abs().max() <= 4e-6 * (1 + exact_logits.abs().max())

    d_sources = [poison_like(d_out) for _ in sources]
    d_query, d_key_weight, d_output_weight = poison_like(query), poison_like(key_weight), poison_like(output_weight)
    mix_bwd(
        d_out, sources, query, key_weight, output_weight, EPS, OUTPUT_EPS, case.scale, mixed, logits, rstd, lse,
        d_sources, d_query, d_key_weight, d_output_weight,
    )  # fmt: skip
    actual = {
        "out": out,
        "weights": p,
        "d_residuals": d_sources,
        "d_query": d_query,
        "d_rms_weight": d_key_weight,
        "d_output_rms_weight": d_output_weight,
    }
    arguments = {
        "query": query,
        "residuals": sources,
        "rms_weight": key_weight,
        "output_rms_weight": output_weight,
        "rms_eps": EPS,
        "output_rms_eps": OUTPUT_EPS,
        "scale": case.scale,
    }
    return actual, oracle.reference("mix", arguments, {"out": d_out})


@pytest.mark.parametrize("case", MIX_CASES, ids=str)
def test_mix(case: Case, device: str) -> None:
    check("mix", *run_mix(case, device, keep_mixed=False))


def test_mix_from_kept_mixed(device: str) -> None:
    check(
        "mix", *run_mix(Case(tokens=5, hidden=384, sources=4, dtype=FP32, output_dtype=FP32), device, keep_mixed=True)
    )


def test_mixed_is_the_mix_before_the_norm(device: str) -> None:
    case = Case(tokens=3, sources=3)
    g = generator(case)
    sources = rows(case, 3, device, g)
    (query,), _, _ = parameters(case, 1, device, g)
    weight = torch.rand(case.hidden, generator=g).to(device)
    normed, mixed, plain = (poison(3, 40, dtype=BF16, device=device) for _ in range(3))
    none = [None] * 4
    mix_fwd(sources, query, None, weight, EPS, EPS, 1.0, normed, mixed, *none)
    mix_fwd(sources, query, None, None, EPS, EPS, 1.0, plain, None, *none)
    torch.testing.assert_close(mixed, plain)
    assert not torch.allclose(mixed, normed)


PHASE1_CASES = [
    Case(queries=1),
    Case(tokens=1, hidden=8, sources=1, queries=3, dtype=FP32, query_dtype=BF16, weight_dtype=None),
    Case(tokens=5, hidden=384, sources=9, queries=5, query_dtype=BF16),
    Case(tokens=3, hidden=384, sources=4, queries=50, dtype=FP32),
    Case(tokens=3, hidden=40, sources=29, queries=2, dtype=FP16, weight_dtype=FP32, kind="strided"),
    Case(tokens=2, hidden=8, sources=64, queries=2),
    Case(tokens=2, hidden=7186, sources=2, queries=3),
    Case(tokens=5, hidden=40, sources=3, queries=4, kind="broadcast"),
    Case(tokens=3, hidden=384, sources=5, queries=3, dtype=FP32, kind="peaked"),
    Case(tokens=3, hidden=384, sources=5, queries=3, dtype=FP16, kind="large"),
    Case(tokens=3, hidden=384, sources=5, queries=3, kind="tied"),
    Case(tokens=3, hidden=384, sources=5, queries=3, kind="zero_rows", scale=2.0),
]


def run_phase1(case: Case, device: str, with_d_lse: bool = True, shared_weight: bool = False) -> tuple[dict, dict]:
    g = generator(case)
    sources = rows(case, case.sources, device, g)
    queries, key_weights, _ = parameters(case, case.queries, device, g)
    if shared_weight:
        key_weights = key_weights[:1].expand(queries.shape)
    d_out = torch.randn(case.queries, case.tokens, case.hidden, generator=g).to(case.dtype).to(device)
    d_lse = torch.randn(case.queries, case.tokens, generator=g).to(device) if with_d_lse else None
    out = poison_like(d_out)
    lse = poison(case.queries, case.tokens, dtype=FP32, device=device)
    logits = poison(case.queries, case.sources, case.tokens, dtype=FP32, device=device)
    rstd = poison(case.sources, case.tokens, dtype=FP32, device=device)
    phase1_fwd(sources, queries, key_weights, EPS, case.scale, out, lse, logits, rstd)
    for s, query in enumerate(queries):
        exact_logits, exact_rstd = statistics(
            sources, query, None if key_weights is None else key_weights[s], case.scale
        )
        assert (logits[s].double() - exact_logits).abs().max() <= 2e-6 * (1 + exact_logits.abs().max())
        close(rstd, exact_rstd)

    d_sources = [poison(case.tokens, case.hidden, dtype=case.dtype, device=device) for _ in sources]
    d_queries = poison_like(queries)
    d_key_weights = poison_like(key_weights)
    phase1_bwd(
        d_out, d_lse, sources, queries, key_weights, EPS, case.scale, lse, logits, rstd, d_sources, False, d_queries,
        d_key_weights,
    )  # fmt: skip
    actual = {
        "out": out,
        "lse": lse,
        "d_block_representations": d_sources,
        "d_pseudo_queries": d_queries,
        "d_rms_weight": d_key_weights,
    }
    arguments = {
        "block_representations": sources,
        "pseudo_queries": queries,
        "eps": EPS,
        "rms_weight": key_weights,
        "scale": case.scale,
    }
    return actual, oracle.reference("phase1", arguments, {"out": d_out, "lse": d_lse})


@pytest.mark.parametrize("case", PHASE1_CASES, ids=str)
def test_phase1(case: Case, device: str) -> None:
    check("phase1", *run_phase1(case, device))


def test_phase1_without_d_lse_and_with_a_shared_weight(device: str) -> None:
    check("phase1", *run_phase1(Case(queries=5), device, with_d_lse=False, shared_weight=True))


def test_phase1_without_statistics(device: str) -> None:
    case = Case(tokens=5, sources=3, queries=3)
    actual, _ = run_phase1(case, device)
    g = generator(case)
    sources = rows(case, case.sources, device, g)
    queries, key_weights, _ = parameters(case, case.queries, device, g)
    out, lse = poison_like(actual["out"]), poison_like(actual["lse"])
    phase1_fwd(sources, queries, key_weights, EPS, case.scale, out, lse, None, None)
    torch.testing.assert_close(out, actual["out"])
    torch.testing.assert_close(lse, actual["lse"])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_phase1_accumulates_in_float32(dtype: torch.dtype, device: str) -> None:
    case = Case(tokens=5, hidden=384, sources=3, queries=3, dtype=dtype)
    g = generator(case)
    sources = rows(case, case.sources, device, g)
    queries, _, _ = parameters(case, case.queries, device, g)
    d_out = torch.randn(3, 5, 384, generator=g).to(dtype).to(device)
    before = [torch.randn(5, 384, generator=g).to(dtype).to(device) for _ in sources]
    lse = poison(3, 5, dtype=FP32, device=device)
    logits, rstd = poison(3, 3, 5, dtype=FP32, device=device), poison(3, 5, dtype=FP32, device=device)
    phase1_fwd(sources, queries, None, EPS, 1.0, poison_like(d_out), lse, logits, rstd)
    d_sources = [x.clone() for x in before]
    phase1_bwd(
        d_out, None, sources, queries, None, EPS, 1.0, lse, logits, rstd, d_sources, True, poison_like(queries), None
    )  # fmt: skip
    arguments = {"block_representations": sources, "pseudo_queries": queries, "eps": EPS}
    reference = oracle.reference("phase1", arguments, {"out": d_out})["d_block_representations"]
    for i, d_source in enumerate(d_sources):
        exact = reference.exact[i] + before[i].double()
        plain = tuple(value[i] + before[i].float() for value in reference.plain32)
        assert numerics.judge(d_source, exact, kind="gradient", plain32=plain).ok


class Phase2Case(NamedTuple):
    base: Case
    delta: bool = True
    alias: bool = False  # d_new_partial is d_partial's memory
    d_new_partial: bool = True

    def __str__(self) -> str:
        return f"{self.base}-delta{self.delta:d}-alias{self.alias:d}-d_new_partial{self.d_new_partial:d}"


PHASE2_CASES = [
    Phase2Case(Case()),
    Phase2Case(Case(tokens=1, hidden=8, dtype=FP32, weight_dtype=None), delta=False, d_new_partial=False),
    Phase2Case(Case(tokens=5, hidden=384, query_dtype=BF16, output_dtype=BF16), alias=True),
    Phase2Case(Case(tokens=5, hidden=384, dtype=FP32, output_dtype=BF16), d_new_partial=False),
    Phase2Case(Case(tokens=3, hidden=40, dtype=FP16, output_dtype=FP32, kind="strided"), alias=True),
    Phase2Case(Case(tokens=2, hidden=7186, output_dtype=FP32)),
    Phase2Case(Case(tokens=5, hidden=40, kind="broadcast"), delta=False),
    Phase2Case(Case(tokens=5, hidden=384, dtype=FP32, output_dtype=FP32, kind="peaked")),
    Phase2Case(Case(tokens=5, hidden=384, kind="peaked", scale=0.05), delta=False),
    Phase2Case(Case(tokens=3, hidden=384, dtype=FP16, output_dtype=FP16, kind="large"), delta=False),
    Phase2Case(Case(tokens=5, hidden=384, output_dtype=BF16, kind="zero_rows")),
]


@pytest.mark.parametrize("case", PHASE2_CASES, ids=str)
def test_phase2(case: Phase2Case, device: str) -> None:
    base, shape = case.base, (case.base.tokens, case.base.hidden)
    g = generator(base)
    partial, inter_out, delta = rows(base, 3, device, g)
    delta = delta if case.delta else None
    (query,), weights, output_weight = parameters(base, 1, device, g)
    key_weight = None if weights is None else weights[0]
    inter_lse = torch.randn(base.tokens, generator=g).to(device)
    d_out, d_new_partial = (torch.randn(shape, generator=g).to(base.dtype).to(device) for _ in range(2))
    if not case.d_new_partial:
        d_new_partial = None

    out = poison(*shape, dtype=base.dtype, device=device)
    new_partial = poison_like(out) if case.delta else None
    logit, rstd = (poison(base.tokens, dtype=FP32, device=device) for _ in range(2))
    phase2_fwd(
        partial, delta, query, key_weight, inter_out, inter_lse, output_weight, EPS, OUTPUT_EPS, base.scale, out,
        new_partial, logit, rstd,
    )  # fmt: skip
    x = partial if delta is None else (partial.float() + delta.float()).to(base.dtype)
    if new_partial is not None:
        assert torch.equal(new_partial, x)
    exact_logit, exact_rstd = statistics([x], query, key_weight, base.scale)
    close(rstd, exact_rstd[0])
    assert (logit.double() - exact_logit[0]).abs().max() <= 2e-6 * (1 + exact_logit.abs().max())

    reference_grads = {"out": d_out, "new_partial": d_new_partial if d_new_partial is None else d_new_partial.clone()}
    d_partial = d_new_partial if case.alias else poison_like(out)
    d_inter_out, d_inter_lse, d_query = poison_like(out), poison_like(inter_lse), poison_like(query)
    d_key_weight, d_output_weight = poison_like(key_weight), poison_like(output_weight)
    phase2_bwd(
        d_out, d_new_partial, x, query, key_weight, inter_out, inter_lse, output_weight, EPS, OUTPUT_EPS, base.scale,
        logit, rstd, d_partial, d_inter_out, d_inter_lse, d_query, d_key_weight, d_output_weight,
    )  # fmt: skip
    actual = {
        "out": out,
        "new_partial": new_partial,
        "d_partial_sum": d_partial,
        "d_delta": d_partial if case.delta else None,
        "d_pseudo_query": d_query,
        "d_inter_out": d_inter_out,
        "d_inter_lse": d_inter_lse,
        "d_rms_weight": d_key_weight,
        "d_output_rms_weight": d_output_weight,
    }
    arguments = {
        "partial_sum": partial,
        "pseudo_query": query,
        "inter_out": inter_out,
        "inter_lse": inter_lse,
        "eps": EPS,
        "rms_weight": key_weight,
        "scale": base.scale,
        "delta": delta,
        "output_rms_weight": output_weight,
        "output_rms_eps": OUTPUT_EPS,
    }
    check("phase2", actual, oracle.reference("phase2", arguments, reference_grads))


class StepCase(NamedTuple):
    base: Case
    num_blocks: int
    write: int = -1
    delta: bool = True

    def __str__(self) -> str:
        return f"{self.base}-blocks{self.num_blocks}-write{self.write}-delta{self.delta:d}"


STEP_CASES = [
    StepCase(Case(), num_blocks=2),
    StepCase(Case(tokens=1, hidden=8, dtype=FP32, weight_dtype=None, output_dtype=FP32), num_blocks=0),
    StepCase(Case(tokens=5, hidden=384, output_dtype=BF16), num_blocks=3, write=3),
    StepCase(Case(tokens=5, hidden=384, output_dtype=BF16), num_blocks=0, write=0),
    StepCase(
        Case(tokens=3, hidden=384, dtype=FP16, output_dtype=FP16, kind="strided"), num_blocks=1, write=2, delta=False
    ),
    StepCase(Case(tokens=2, hidden=7186, dtype=BF16, output_dtype=FP32), num_blocks=2, write=3),
    StepCase(Case(tokens=3, hidden=384, kind="peaked"), num_blocks=4),
    StepCase(Case(tokens=3, hidden=384, dtype=FP16, kind="large"), num_blocks=3, delta=False),
]


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_serve_step(case: StepCase, device: str) -> None:
    base, num_columns = case.base, 4
    g = generator(base)
    prefix, delta, *columns = rows(base, 2 + num_columns, device, g)
    padded = torch.full((base.tokens, num_columns + 1, base.hidden + 8), torch.nan, dtype=base.dtype, device=device)
    blocks = padded[:, :num_columns, : base.hidden]
    for i, column in enumerate(columns):
        # blocks past num_blocks hold garbage that must not matter
        blocks[:, i] = column if i < case.num_blocks else torch.nan
    delta = delta if case.delta else None
    (query,), weights, output_weight = parameters(base, 1, device, g)
    key_weight = None if weights is None else weights[0]
    prefix, padded_before = prefix.clone() if base.kind != "strided" else prefix, padded.clone()
    arguments = {
        "prefix": prefix.clone(),
        "delta": delta,
        "blocks": blocks.clone(),
        "norm_weight": key_weight,
        "qk_weight": query,
        "output_norm_weight": output_weight,
        "num_blocks": case.num_blocks,
        "block_write_idx": case.write,
        "eps": EPS,
        "output_norm_eps": OUTPUT_EPS,
    }
    out = poison(base.tokens, base.hidden, dtype=base.dtype, device=device)
    serve_step(
        prefix, delta, blocks, query, key_weight, output_weight, case.num_blocks, case.write, EPS, OUTPUT_EPS, out
    )  # fmt: skip
    exact = oracle.step(**arguments)
    check("step", {"out": out}, oracle.reference("step", arguments))
    assert torch.equal(prefix, exact.prefix)
    # nothing but the one block is touched, the padding round it included
    if case.write >= 0:
        padded_before[:, case.write, : base.hidden] = exact.prefix
    assert torch.equal(padded.nan_to_num(nan=7.0), padded_before.nan_to_num(nan=7.0))


@pytest.mark.parametrize(("num_partials", "num_queries", "hidden"), [(1, 1, 8), (33, 3, 130), (70, 2, 64)])
def test_query_grad(num_partials: int, num_queries: int, hidden: int, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    partials = torch.randn(num_partials, num_queries, hidden, generator=g).to(device)
    queries = torch.randn(num_queries, hidden, generator=g).to(device).to(BF16)
    weights = torch.randn(1, hidden, generator=g).to(device).expand(num_queries, hidden)
    du = partials.double().sum(0)
    d_queries, d_weights = poison_like(queries), poison(num_queries, hidden, dtype=FP32, device=device)
    query_grad(partials, queries, weights, d_queries, d_weights)
    assert numerics.judge(d_queries, du * weights.double(), kind="gradient").ok
    assert numerics.judge(
        d_weights, du * queries.double(), kind="gradient", plain32=partials.sum(0) * queries.float()
    ).ok
    plain = poison(num_queries, hidden, dtype=FP32, device=device)
    query_grad(partials, None, None, plain, None)
    close(plain, du, 1e-6)


@pytest.mark.parametrize("programs", [1, 4])
def test_gradients_do_not_depend_on_how_tokens_are_dealt_out(
    programs: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than programs: each takes several, and the last ones fewer."""
    monkeypatch.setattr(config, "num_programs", lambda num_tokens, hidden_size: min(num_tokens, programs))
    monkeypatch.setattr(config, "tile_programs", lambda num_tokens, tiles: min(num_tokens, programs))
    check("mix", *run_mix(Case(tokens=9, sources=3, output_dtype=BF16), device, keep_mixed=False))
    check("phase1", *run_phase1(Case(tokens=9, sources=3, queries=3), device))


def test_same_input_same_bits(device: str) -> None:
    for run in (lambda: run_mix(MIX_CASES[2], device, False)[0], lambda: run_phase1(PHASE1_CASES[2], device)[0]):
        first, second = run(), run()
        for name, value in first.items():
            pairs = zip(value, second[name], strict=True) if isinstance(value, list) else [(value, second[name])]
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs), name


def test_refusal() -> None:
    call = {
        "op": "mix_fwd",
        "dtype": BF16,
        "hidden_size": 7186,
        "num_sources": 64,
        "num_queries": 1,
        "byte_alignment": 2,
    }
    assert config.refusal(**call) is None
    assert "up to 64 sources" in config.refusal(**{**call, "num_sources": 65})
    assert "float64" in config.refusal(**{**call, "dtype": torch.float64})
    assert "hidden size" in config.refusal(**{**call, "hidden_size": 10**6})
    assert "queries" in config.refusal(**{**call, "op": "phase1_fwd", "num_queries": 1000})


@pytest.mark.parametrize("hidden", [1, 40, 2304, 7168, 16384, config.MAX_HIDDEN_SIZE])
def test_config_is_a_constant_of_the_shape(hidden: int) -> None:
    for light in (True, False):
        block = config.row_config(hidden, light=light)
        assert block.block_d >= hidden
        assert 1 <= block.num_warps <= config.MAX_WARPS
    assert config.num_programs(1, hidden) == 1
    assert config.num_programs(10**6, hidden) <= config.MAX_PROGRAMS
    for queries in (1, 5, 24, config.MAX_QUERIES):
        queries_block = config.queries_config(hidden, queries, live_tiles=2)
        assert queries_block.block_d >= hidden
        assert queries_block.tile_s >= queries
