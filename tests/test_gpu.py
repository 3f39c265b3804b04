"""On a GPU: every operation on every backend against the oracle, with poisoned outputs; what only a real device shows."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnres
from attnres import inputs, numerics, oracle, report
from attnres.inputs import Shape

pytestmark = pytest.mark.gpu

OPS = ("mix", "phase1", "phase2", "step")
SHAPES = (
    Shape(1, 384, 1, 1, key_weight=False, output_norm=False, delta=False),
    Shape(257, 384, 13, 12),
    Shape(3, 2304, 29, 5, output_norm=False),
    Shape(133, 2304, 4, 8, key_weight=False, scale=0.5),
    Shape(1000, 2048, 17, 24),
    Shape(131, 7168, 9, 16),
    Shape(40, 7168, 9, 2),
    Shape(7, 7186, 5, 3),
    Shape(2, 8, 2, 2),
    Shape(61, 72, 32, 32, checkpoint_level=0),
    Shape(77, 2048, 1, 3),
)


@pytest.fixture
def poison() -> Iterator[None]:
    """Every new tensor is born full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def call_or_skip(case: inputs.Case, backend: str) -> report.Results:
    try:
        return report.call(case, backend)
    except attnres.BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.for_op("mix"))
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "bf16/fp32"])
@pytest.mark.parametrize("backend", ["torch", "triton", "cute"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poison")
def test_within_budget(op: str, backend: str, dtype: str, shape: Shape, ran: list[tuple[str, str]]) -> None:
    case = inputs.make_case(op, shape, dtype=dtype, device="cuda", seed=11)
    results = call_or_skip(case, backend)
    references = oracle.reference(op, case.arguments, case.grad_outputs)
    measured = numerics.judge_all(results, references)
    assert {name: found for name, found in measured.items() if not found.ok} == {}
    assert ran[0][1] == backend
    if op == "phase2":
        assert ran == [("phase2_fwd", backend), ("phase2_bwd", backend)]
    if op == "step":
        expected = oracle.step(**case.arguments)
        assert torch.equal(results["prefix"], expected.prefix)
        assert torch.equal(results["blocks"].nan_to_num(nan=0.5), expected.blocks.nan_to_num(nan=0.5))


@pytest.mark.parametrize("backend", ["triton", "cute"])
@pytest.mark.parametrize("op", OPS)
def test_same_inputs_same_bits(op: str, backend: str) -> None:
    case = inputs.make_case(op, Shape(1000, 2048, 9, 16), dtype="bf16/fp32", device="cuda")
    assert_same_bits(call_or_skip(case, backend), call_or_skip(case, backend))


# Two CTAs share these rows in the gradient: slots of a ring are given back, and filled again, while sums are sent to other CTAs.
@pytest.mark.parametrize(("size", "depth"), [(7168, 9), (7168, 17), (8192, 17)])
def test_mixes_of_clusters_have_the_same_bits_again_and_again(size: int, depth: int) -> None:
    case = inputs.make_case("mix", Shape(2001, size, depth), dtype="bf16", device="cuda")
    first = call_or_skip(case, "cute")
    for _ in range(30):
        assert_same_bits(first, call_or_skip(case, "cute"))


def assert_same_bits(first: report.Results, second: report.Results) -> None:
    for name, value in first.items():
        pairs = zip(value, second[name], strict=True) if isinstance(value, list) else [(value, second[name])]
        assert all(torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5)) for a, b in pairs), name


# What decides how the gradient's kernel works: vectors a thread, padding, parts of 16 sources, clusters that share a row.
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 8, 1),
        Shape(300, 1000, 17),
        Shape(1000, 4104, 3, output_norm=False),
        Shape(300, 7168, 17),
        Shape(5, 8192, 9),
    ],
    ids=lambda shape: shape.for_op("mix"),
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "bf16/fp32"])
@pytest.mark.usefixtures("poison")
def test_mix_gradients_on_cute(dtype: str, shape: Shape, ran: list[tuple[str, str]]) -> None:
    case = inputs.make_case("mix", shape, dtype=dtype, device="cuda", seed=12)
    measured = numerics.judge_all(
        call_or_skip(case, "cute"), oracle.reference("mix", case.arguments, case.grad_outputs)
    )
    assert {name: found for name, found in measured.items() if not found.ok} == {}
    assert ran == [("mix_fwd", "cute"), ("mix_bwd", "cute")]


@pytest.mark.parametrize("op", OPS)
def test_small_case(op: str) -> None:
    """What `make sanitize` runs: one small call of each CuTe kernel, with every optional part, and its gradient."""
    case = inputs.make_case(op, Shape(300, 384, 5, 8), dtype="bf16/fp32", device="cuda")
    for name, value in report.call(case, "cute").items():
        for tensor in value if isinstance(value, list) else [value]:
            assert name == "blocks" or tensor.isfinite().all(), name


@pytest.mark.parametrize(("size", "queries"), [(384, 12), (1024, 8), (512, 24)])
def test_small_case_of_phase_1_backward(size: int, queries: int) -> None:
    """What `make sanitize` runs: one item a token and two. One CTA a cluster: racecheck itself fails on larger ones."""
    case = inputs.make_case("phase1", Shape(40, size, 5, queries), dtype="bf16", device="cuda")
    results = report.call(case, "cute")
    torch.cuda.synchronize()
    assert results["d_pseudo_queries"].isfinite().all()


@pytest.mark.parametrize(("tokens", "size", "depth", "queries"), [(257, 2048, 4, 8), (7, 384, 5, 3), (33, 7168, 8, 24)])
@pytest.mark.parametrize("query", [torch.bfloat16, torch.float32])
def test_phase_1_backward_adds_to_gradients(
    tokens: int, size: int, depth: int, queries: int, query: torch.dtype
) -> None:
    """One rounding of the sum: what the sources' gradients held before enters it in float32."""
    from cute_kernels.phase1_bwd import phase1_bwd
    from cute_kernels.phase1_fwd import phase1_fwd

    shape = Shape(tokens, size, depth, queries, key_weight=False)
    case = inputs.make_case("phase1", shape, dtype="bf16", device="cuda", seed=5)
    sources, given = case.arguments["block_representations"], case.arguments["pseudo_queries"].to(query)
    d_out, d_lse = case.grad_outputs["out"], case.grad_outputs["lse"]
    lse, logits = d_lse.new_empty(queries, tokens), d_lse.new_empty(queries, depth, tokens)
    rstd = d_lse.new_empty(depth, tokens)
    phase1_fwd(sources, given, None, inputs.EPS, 1.0, torch.empty_like(d_out), lse, logits, rstd)
    arguments = case.arguments | {"pseudo_queries": given}
    exact = oracle.reference("phase1", arguments, case.grad_outputs)["d_block_representations"].exact
    before = [torch.randn_like(source) for source in sources]
    added = [value.clone() for value in before]
    d_queries = torch.full_like(given, torch.nan)
    phase1_bwd(d_out, d_lse, sources, given, None, inputs.EPS, 1.0, lse, logits, rstd, added, True, d_queries, None)
    for found, old, gradient in zip(added, before, exact, strict=True):
        assert numerics.judge(found, gradient + old.double(), kind="gradient").ok
    assert d_queries.isfinite().all()


# One to four octets of queries, in clusters of 1, 4 and 8; of three and more, slots are given back before anything is staged.
@pytest.mark.parametrize(
    ("size", "depth", "queries"), [(2048, 4, 8), (4096, 8, 16), (7168, 8, 16), (7168, 8, 24), (4096, 8, 32)]
)
@pytest.mark.parametrize("seed", [None, 2**41 + 3])
def test_phase_1_backward_gives_the_same_bits_again_and_again(
    seed: int | None, size: int, depth: int, queries: int
) -> None:
    from cute_kernels.phase1_bwd import phase1_bwd

    tokens, device = 2001, {"device": "cuda"}
    case = inputs.make_case("phase1", Shape(tokens, size, depth, queries, key_weight=False), dtype="bf16", **device)
    sources, given = case.arguments["block_representations"], case.arguments["pseudo_queries"]
    rstd = torch.stack([(source.float().square().mean(-1) + inputs.EPS).rsqrt() for source in sources])
    logits = torch.stack([given.float() @ source.float().T for source in sources], 1) * rstd
    lse = logits.logsumexp(1)
    d_out, d_lse = case.grad_outputs["out"], case.grad_outputs["lse"]

    def gradients() -> list[torch.Tensor]:
        found = [torch.full_like(value, torch.nan) for value in (*sources, given)]
        arguments = (d_out, d_lse, sources, given, None, inputs.EPS, 1.0, lse, logits, rstd)
        phase1_bwd(*arguments, found[:-1], False, found[-1], None, seed=seed)
        return found

    first = gradients()
    for _ in range(30):
        assert all(torch.equal(value, again) for value, again in zip(first, gradients(), strict=True))


def test_most_of_the_device_holds_clusters() -> None:
    from cute_kernels.clusters import cluster_count

    device = torch.device("cuda", torch.cuda.current_device())
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    for cluster in (1, 2, 4, 8):
        assert sms * 3 // 4 <= cluster_count(cluster, 384, 230_000, device) * cluster <= sms


@pytest.mark.parametrize("backend", ["triton", "cute"])
def test_offsets_past_two_to_the_31(backend: str) -> None:
    tokens, size = 2**31 // 7168 + 300, 7168
    source = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(size, device="cuda") / size**0.5
    with attnres.checked("sample"), attnres.use_backend(backend):
        out = attnres.attn_res(query, [source, source])
        out, lse = attnres.phase_1([source], query[None], 1e-6)
        attnres.phase_2(source, query, out[0], lse[0], 1e-6)
        prefix = source.clone()
        attnres.attn_res_step(prefix, source, source[:, None], None, query, None, 1, -1, 1e-6, 1e-6)
    del out, lse, prefix
    source.requires_grad_()
    with attnres.checked("sample"):
        attnres.attn_res(query, [source], backend=backend).backward(torch.ones_like(source))


@pytest.mark.parametrize("backend", ["triton", "cute"])
def test_sources_with_strides_of_their_own(backend: str) -> None:
    cache = torch.randn(100, 5, 2048, device="cuda", dtype=torch.bfloat16)
    expanded = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16).expand(100, 2048)
    query = torch.randn(2048, device="cuda") / 45
    with attnres.checked("full"), attnres.use_backend(backend):
        attnres.attn_res(query, [*cache.unbind(1), expanded])
        attnres.phase_1([*cache.unbind(1), expanded], query[None], 1e-6)
        attnres.attn_res_step(cache[:, 3].clone(), expanded, cache, None, query, query, 3, 4, 1e-6, 1e-6)


@pytest.mark.parametrize("backend", ["triton", "cute"])
def test_cuda_graph_replays_the_step(backend: str) -> None:
    case = inputs.make_case("step", Shape(16, 2048, 9), dtype="bf16", device="cuda")
    given = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.arguments.items()
    }
    start = {name: given[name].clone() for name in ("prefix", "blocks")}
    expected = call_or_skip(case, backend)
    attnres.attn_res_step(**given, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attnres.attn_res_step(**given, backend=backend)
    for name, value in start.items():
        given[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected["out"])
    assert torch.equal(given["prefix"], expected["prefix"])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 66, 132, 300])
def test_steps_in_a_row_see_each_other(tokens: int, scaled: bool) -> None:
    """In a graph, a step may start while the one before it ends, whose result it reads and whose prefix it updates."""
    case = inputs.make_case("step", Shape(tokens, 7168, 4), dtype="bf16", device="cuda")
    given = {**case.arguments, "block_write_idx": -1}
    if scaled:
        given |= {name: attnres.ScaledTensor.from_tensor(given[name]) for name in ("prefix", "blocks")}
    prefixes = [given["prefix"].clone() for _ in range(2)]

    def steps(prefix: torch.Tensor | attnres.ScaledTensor, wait: bool) -> torch.Tensor:
        delta = given["delta"]
        for _ in range(50):
            delta = attnres.attn_res_step(**given | {"prefix": prefix, "delta": delta}, backend="cute")
            if wait:
                torch.cuda.synchronize()
        return delta

    expected = steps(prefixes[0], wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = steps(prefixes[1], wait=False)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    assert torch.equal(*(prefix.to(torch.float32) for prefix in prefixes))


def test_phase_1_draws_every_item_once() -> None:
    """Each launch leaves the counter of its stream at zero; launches follow each other closely, on two streams and in graphs."""
    cases = [
        inputs.make_case("phase1", Shape(tokens, size, 5, 9), dtype="bf16", device="cuda")
        for tokens, size in ((1, 2048), (3000, 2048), (67, 7168), (5000, 384), (2000, 4096))
    ]

    def call(case: inputs.Case) -> torch.Tensor:
        out, _ = attnres.phase_1(**case.arguments, backend="cute")
        return out

    expected = []
    for case in cases:
        expected.append(call(case))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call(case) for case in cases]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # outputs full of NaN
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append([[call(case) for case in cases] for _ in range(5)])
            graph.replay()
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(False)
    for outputs in (captured, *found[0], *found[1]):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_checked_mode_is_refused_under_capture() -> None:
    query, source = torch.randn(64, device="cuda"), torch.randn(4, 64, device="cuda")
    attnres.attn_res(query, [source], backend="triton")
    capture = torch.cuda.graph(torch.cuda.CUDAGraph())
    with attnres.checked("sample"), pytest.raises(RuntimeError, match="while a CUDA graph is captured"), capture:
        attnres.attn_res(query, [source], backend="triton")


@pytest.mark.parametrize("backend", ["triton", "cute"])
def test_runs_on_the_current_stream(backend: str) -> None:
    query = torch.randn(2048, device="cuda") / 45
    source = torch.zeros(4096, 2048, device="cuda", dtype=torch.bfloat16)
    attnres.attn_res(query, [source], backend=backend)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        source.fill_(2.0)
        out = attnres.attn_res(query, [source], backend=backend)
    stream.synchronize()
    assert torch.equal(out, source)


def test_auto_takes_the_first_backend_that_can(ran: list[tuple[str, str]]) -> None:
    def auto(dtype: torch.dtype, size: int) -> Any:
        source = torch.randn(4, size, device="cuda", dtype=dtype, requires_grad=True)
        attnres.attn_res(torch.randn(size, device="cuda"), [source], backend="auto").sum().backward()

    auto(torch.bfloat16, 64)
    auto(torch.bfloat16, 7186)
    auto(torch.float32, 64)
    first = "cute" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    assert ran == [("mix_fwd", first), ("mix_bwd", first), *[("mix_fwd", "triton"), ("mix_bwd", "triton")] * 2]


def test_cute_refuses_with_the_reason() -> None:
    query, source = torch.randn(7186, device="cuda"), torch.randn(4, 7186, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(attnres.BackendError, match="multiple of 8"):
        attnres.attn_res(query, [source], backend="cute")
    misaligned = torch.randn(4 * 64 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(4, 64)
    with pytest.raises(attnres.BackendError, match="16"):
        attnres.attn_res(query[:64], [misaligned], backend="cute")
