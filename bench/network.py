"""Whole networks and the serving block: `python -m bench.network --out bench/results`. Needs a GPU.

Time and peak memory of a chain of layers with Block AttnRes, forward (without gradient) and forward with backward, and of one block
of sites as a serving model's prefill runs it. Writes network_<device>.json after every case (`--resume` goes on with it),
then a Markdown table. Exit code 1 if a result of ours failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import attnres
from attnres import numerics, oracle
from attnres.scaled import SCALED_FP16
from attnres.sites import direct_elements, two_phase_elements
from bench import autotune, providers, results, timing, warm
from bench.ops import ITEMSIZE
from bench.timing import COPY, OutOfTime

ROUNDS = 5
BURST_SECONDS = 0.02
FIRST_CALL_SECONDS = 150.0  # of one provider in one case; flash-attn-res autotunes its backward for longer than 60 s
FIRST_CALL_MEMORY = 32 * 2**30
CHECKED_TOKENS = 64
EPS = 1e-6


@dataclass(frozen=True)
class NetworkCase:
    """One line of the table."""

    group: str  # forward, forward and backward, serving block
    tokens: int
    hidden_size: int
    layers: int
    block_size: int
    kind: str = "identity"  # what the layers are: identity or swiglu
    num_blocks: int = 1  # finished blocks before the first layer

    @property
    def sizes(self) -> str:
        blocks = f" N{self.num_blocks}" if self.num_blocks > 1 else ""
        return f"T{self.tokens} D{self.hidden_size} L{self.layers} S{self.block_size}{blocks} {self.kind}"

    @property
    def name(self) -> str:
        return f"network {self.group} {self.sizes}"

    @property
    def backward(self) -> bool:
        return self.group == "forward and backward"

    @property
    def serving(self) -> bool:
        return self.group == "serving block"

    @property
    def providers(self) -> Mapping[str, Any]:
        if self.serving:
            return SERVING
        return NETWORKS | KEEPING if self.backward else NETWORKS

    @property
    def least_bytes(self) -> int:
        """What the schedule's mixes and sums must move, layers apart: see attnres.sites and attnres.memory_saving."""
        elements, last = 0, self.layers - self.block_size
        for start in range(0, self.layers, self.block_size):
            blocks, sites = self.num_blocks + start // self.block_size, min(self.block_size, self.layers - start)
            mixes, last_sum = two_phase_elements(blocks, sites), 3 if sites > 1 else 0
            if self.serving:
                return mixes * self._row_bytes
            if self.backward:  # run twice but for the last block; then phase 2, the first site's copy, and phase 1
                elements += mixes * (1 if start >= last else 2) + 6 * (sites - 1) + 2 + 3 * blocks + sites
            else:
                elements += min(mixes, direct_elements(blocks, sites))
            elements += last_sum
        finished = self.num_blocks + -(-self.layers // self.block_size)
        return (elements + finished + 1 + (2 * finished + 1) * self.backward) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self.tokens * self.hidden_size * ITEMSIZE


def _networks(*sizes: int, **options: str) -> list[NetworkCase]:
    return [NetworkCase(group, *sizes, **options) for group in ("forward", "forward and backward")]


CASES: tuple[NetworkCase, ...] = (
    *_networks(4 * 16384, 2048, 32, 8),  # flash-attn-res's own benchmark
    NetworkCase("serving block", 8192, 7168, 24, 24, num_blocks=8),
    *_networks(16384, 4096, 48, 16),
    *_networks(8192, 2048, 32, 8, kind="swiglu"),
)


class SwiGLU(nn.Module):
    """A transformer's feed-forward sublayer with its PreNorm."""

    def __init__(self, dim: int, **options: Any):
        super().__init__()
        width = -(-8 * dim // 3 // 256) * 256
        self.norm = nn.Parameter(torch.ones(dim, **options))
        self.gate_up = nn.Linear(dim, 2 * width, bias=False, **options)
        self.down = nn.Linear(width, dim, bias=False, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(F.rms_norm(hidden, hidden.shape[-1:], self.norm, EPS)).chunk(2, -1)
        return self.down(F.silu(gate) * up)


@dataclass(frozen=True)
class Made:
    """A case's tensors."""

    inputs: Tensor  # [B, T, D]; of a serving block [T, N, D]
    queries: Tensor  # [L + 1, D]
    layers: list[nn.Module]
    d_out: Tensor | None  # [B, T, D]
    deltas: list[Tensor]  # of a serving block: what the layers return in turn


def make(case: NetworkCase, device: torch.device | str) -> Made:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, **options)

    size = case.hidden_size
    shape = (case.tokens, case.num_blocks, size) if case.serving else (1, case.tokens, size)
    torch.manual_seed(0)
    layers = [SwiGLU(size, **options) if case.kind == "swiglu" else nn.Identity() for _ in range(case.layers)]
    queries = normal(case.layers + 1, size) * size**-0.5
    deltas = [normal(case.tokens, size) for _ in range(4)] if case.serving else []
    return Made(normal(*shape), queries, layers, normal(*shape) if case.backward else None, deltas)


Run = Callable[[], dict[str, Tensor]]
Network = Callable[[Tensor, Tensor, Sequence[nn.Module]], Tensor]  # inputs, queries, layers -> out


def ours(backend: str, case: NetworkCase, memory_saving: bool = True) -> Network:
    return lambda inputs, queries, layers: attnres.block_attn_res(
        inputs, queries, layers, case.block_size, EPS, memory_saving=memory_saving, backend=backend
    )


def flash_attn_res(case: NetworkCase) -> Network:
    peer = importlib.import_module("flash_attn_res.experimental.autograd").BlockAttentionResiduals

    def run(inputs: Tensor, queries: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        return peer.apply(inputs, queries, layers, case.block_size, EPS, *parameters)

    return run


def site_by_site(mix: Callable[[list[Tensor], Tensor], Tensor], case: NetworkCase) -> Network:
    """A mix of all sources at every site, every operation through autograd."""

    def run(inputs: Tensor, queries: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        blocks, partial = [inputs], None
        for index, layer in enumerate(layers):
            if index % case.block_size == 0 and partial is not None:
                blocks, partial = [*blocks, partial], None
            update = layer(mix(blocks if partial is None else [*blocks, partial], queries[index]))
            partial = update if partial is None else partial + update
        return mix(blocks if partial is None else [*blocks, partial], queries[-1])

    return run


def liger(case: NetworkCase) -> Network:
    function = importlib.import_module("liger_kernel.ops.attn_res").LigerAttnResFunction
    ones = torch.ones(case.hidden_size, device="cuda", dtype=torch.bfloat16)
    return site_by_site(lambda sources, query: function.apply(torch.stack(sources), query, ones, EPS), case)


def compiled(case: NetworkCase) -> Network:
    torch._dynamo.reset()  # graphs of earlier cases do not count against its limit
    ones = torch.ones(case.hidden_size, device="cuda", dtype=torch.bfloat16)

    @functools.partial(torch.compile, dynamic=False)
    def mix(sources: list[Tensor], query: Tensor) -> Tensor:
        return providers.plain_mix(torch.stack(sources), query, ones, EPS)

    return site_by_site(mix, case)


def two_phases(backend: str, case: NetworkCase, made: Made, storage: str | None = None) -> Run:
    """Prefill through a block of sites: the add and the norm of each in phase 2's launch."""
    blocks = [block.contiguous() for block in made.inputs.unbind(1)]
    norms = torch.ones_like(made.queries)

    def run() -> dict[str, Tensor]:
        sites = attnres.BlockSites(
            blocks, made.queries[:-1], EPS, output_rms_weight=norms[:-1], storage=storage, backend=backend
        )
        out = sites.mix()
        for index in range(1, case.layers):
            out = sites.mix(made.deltas[index % len(made.deltas)])
        return {"out": out}

    return run


def direct_sites(backend: str, case: NetworkCase, made: Made) -> Run:
    """The same by one fused step a site, in place, as serving models run it."""
    norm = torch.ones_like(made.queries[0])
    prefix = torch.empty_like(made.deltas[0])

    def run() -> dict[str, Tensor]:
        # the block's first site mixes its blocks alone, and the second one starts the sum
        out = attnres.attn_res(made.queries[0], list(made.inputs.unbind(1)), None, norm, EPS, backend=backend)
        prefix.copy_(made.deltas[1 % len(made.deltas)])
        for index in range(1, case.layers):
            delta = None if index == 1 else made.deltas[index % len(made.deltas)]
            out = attnres.attn_res_step(
                prefix,
                delta,
                made.inputs,
                None,
                made.queries[index],
                norm,
                case.num_blocks,
                -1,
                EPS,
                EPS,
                backend=backend,
            )
        return {"out": out}

    return run


def fla_sites(case: NetworkCase, made: Made) -> Run:
    fused = importlib.import_module("fla.ops.attnres").fused_attnres
    ones = torch.ones_like(made.queries[0])  # of key and of output norm
    blocks = [block.contiguous() for block in made.inputs.unbind(1)]

    def run() -> dict[str, Tensor]:
        out, prefix = fused(made.queries[0], blocks, ones, ones, EPS), made.deltas[1 % len(made.deltas)].clone()
        for index in range(1, case.layers):
            if index > 1:
                prefix.add_(made.deltas[index % len(made.deltas)])
            out = fused(made.queries[index], [*blocks, prefix], ones, ones, EPS)
        return {"out": out}

    return run


NETWORKS: dict[str, Callable[[NetworkCase], Network]] = {
    "ours-cute": functools.partial(ours, "cute"),
    "ours-triton": functools.partial(ours, "triton"),
    "flash-attn-res": flash_attn_res,
    "liger": liger,
    "torch.compile": compiled,
}
# With gradient; autograd keeps all activations, as it does of the peers that mix site by site.
KEEPING: dict[str, Callable[[NetworkCase], Network]] = {
    "ours-cute, memory_saving=False": functools.partial(ours, "cute", memory_saving=False),
}
SERVING: dict[str, Callable[[NetworkCase, Made], Run]] = {
    "ours-cute": functools.partial(two_phases, "cute"),
    "ours-triton": functools.partial(two_phases, "triton"),
    "ours-cute, scaled fp16": functools.partial(two_phases, "cute", storage=SCALED_FP16),
    "ours-cute, direct": functools.partial(direct_sites, "cute"),
    "ours-triton, direct": functools.partial(direct_sites, "triton"),
    "fla-triton": fla_sites,
}
PROVIDERS = tuple(dict.fromkeys([*NETWORKS, *KEEPING, *SERVING]))


def bind(case: NetworkCase, provider: str, made: Made) -> Run:
    """The call to be timed; gradients are made anew by each call."""
    if case.serving:
        run = case.providers[provider](case, made)
        return torch.no_grad()(run)
    network: Network = case.providers[provider](case)
    if not case.backward:
        return torch.no_grad()(lambda: {"out": network(made.inputs, made.queries, made.layers)})
    inputs, queries = (tensor.detach().requires_grad_() for tensor in (made.inputs, made.queries))
    parameters = [parameter for layer in made.layers for parameter in layer.parameters()]

    def run() -> dict[str, Tensor]:
        out = network(inputs, queries, made.layers)
        found = torch.autograd.grad(out, [inputs, queries, *parameters], made.d_out)
        return {"out": out.detach(), "d_inputs": found[0]}

    return run


def first_call(case_name: str, provider_name: str) -> None:
    case = next(case for case in CASES if case.name == case_name)
    bind(case, provider_name, make(case, "cuda"))()
    torch.cuda.synchronize()


def check(case: NetworkCase, made: Made, found: dict[str, Tensor]) -> dict[str, float]:
    """Relative error and rounding floor of the output and of d_inputs, for tokens spread over all: layers work token by token."""
    tokens = (
        torch.linspace(0, case.tokens - 1, min(case.tokens, CHECKED_TOKENS), device=made.inputs.device).round().long()
    )
    if case.serving:
        exact = {"out": _serving_reference(case, made, tokens)}
    else:
        layers = [copy.deepcopy(layer).double() for layer in made.layers]
        inputs = made.inputs[:, tokens].double().requires_grad_(case.backward)
        out = oracle.network(inputs, made.queries.double(), layers, case.block_size, EPS)
        exact = {"out": out.detach()}
        if case.backward:
            exact["d_inputs"] = torch.autograd.grad(out, inputs, made.d_out[:, tokens].double())[0]
    measured = {}
    for name, value in exact.items():
        m = numerics.judge(found[name].index_select(-2, tokens), value, kind="output")
        measured |= {f"{name} error": m.error, f"{name} floor": m.floor}
    return measured


def _serving_reference(case: NetworkCase, made: Made, tokens: Tensor) -> Tensor:
    partial = made.deltas[1 % len(made.deltas)][tokens].double()
    for index in range(2, case.layers):
        partial = partial + made.deltas[index % len(made.deltas)][tokens].double()
    sources = [*made.inputs[tokens].unbind(1), partial]
    return oracle.mix(made.queries[case.layers - 1], sources, None, torch.ones_like(made.queries[0]), EPS).out


def peak_gib(run: Run) -> float:
    """Of one call, tensors of the case included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(
    case: NetworkCase,
    names: Sequence[str],
    stopped: dict[warm.Job, str],
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": case.name,
        "group": f"network {case.group}",
        "sizes": case.sizes,
        "tokens": case.tokens,
        "least_bytes": case.least_bytes,
        "results": {},
    }
    made = make(case, device)
    timed: dict[str, timing.Timed] = {}
    for name in names:
        if name not in case.providers:
            continue
        if (case.name, name) in stopped:
            entry["results"][name] = {"status": stopped[case.name, name]}
            continue
        begun = time.monotonic()
        try:
            with timing.limit(options.first_call_seconds):
                run = bind(case, name, made)
                found = check(case, made, run())
                gc.collect()
                torch.cuda.empty_cache()
                found["peak_gib"] = peak_gib(run)
                found["first_seconds"] = round(time.monotonic() - begun, 1)
                timed[name] = timing.eager([run], BURST_SECONDS)
            entry["results"][name] = found
        except (Exception, OutOfTime) as error:
            kind = "" if isinstance(error, OutOfTime) else f"{type(error).__name__}: "
            entry["results"][name] = {"status": f"failed: {kind}{error}".splitlines()[0][:300]}
        gc.collect()
        torch.cuda.empty_cache()
    # the copy comes last: its tensors would count as peak memory above
    samples, failed = timing.measure({COPY: timing.copy(device), **timed}, options.rounds)
    for name, reason in failed.items():
        entry["results"].setdefault(name, {})["status"] = reason
    for name, values in samples.items():
        (entry if name == COPY else entry["results"])[name] = {
            **entry["results"].get(name, {}),
            **timing.summary(values),
        }
    return entry


def left(data: results.Results) -> list[NetworkCase]:
    """Cases that the results lack, or in which a provider failed."""
    return results.left(data, CASES, lambda each: all("us" in found for found in each["results"].values()))


def table(case: dict[str, Any]) -> Table:
    grid = Table(title=case["name"], title_justify="left", pad_edge=False)
    for column in COLUMNS:
        grid.add_column(column, no_wrap=True)
    for row in rows(case):
        grid.add_row(*row)
    return grid


COLUMNS = ("provider", "ms", "p20 to p80", "share of copy", "peak GiB", "error / floor")


def rows(case: dict[str, Any]) -> list[list[str]]:
    found = []
    for name, result in case["results"].items():
        if "us" not in result:
            found.append([name, result["status"], *[""] * (len(COLUMNS) - 2)])
            continue
        errors = ", ".join(
            f"{key.removesuffix(' error')} {value:.2e} / {result[key.replace('error', 'floor')]:.2e}"
            for key, value in result.items()
            if key.endswith(" error")
        )
        span = f"{result['p20'] / 1e3:.2f} to {result['p80'] / 1e3:.2f}"
        share = f"{results.share(case, name) or 0:.3f}"
        found.append([name, f"{result['us'] / 1e3:.2f}", span, share, f"{result['peak_gib']:.2f}", errors])
    return found


def to_markdown(data: dict[str, Any]) -> str:
    parts = []
    for case in data["cases"]:
        lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows(case)]
        parts.append("\n".join([f"**{case['name']}**", "", *("| " + " | ".join(line) + " |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.network", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--cases", default="", metavar="SUBSTRING", help="only cases whose name contains it")
    parser.add_argument(
        "--providers",
        metavar="A;B",
        help=f"only these of {'; '.join(PROVIDERS)}, all of which must be there (default: those that are)",
    )
    parser.add_argument(
        "--first-call-seconds", type=float, default=FIRST_CALL_SECONDS, help="limit of a provider's first call"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--resume", action="store_true", help="only cases that the results in --out lack, or in which a provider failed"
    )
    options = parser.parse_args(arguments)
    names = options.providers.split(";") if options.providers else list(PROVIDERS)
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise SystemExit(f"unknown provider {'; '.join(unknown)}; known are {'; '.join(PROVIDERS)}")
    if not torch.cuda.is_available():
        print("the benchmarks need a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    logging.getLogger("fla").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 180)
    missing = providers.missing(names)
    providers.tell_missing(missing, options.providers is not None, console)
    names = [name for name in names if name not in missing]
    device = torch.device("cuda", torch.cuda.current_device())
    path = results.path_in(options.out, torch.cuda.get_device_name(), "network")
    data = results.begun(path, results.metadata(device), options.resume)
    cases = [case for case in left(data) if options.cases in case.name]
    jobs = [(case.name, name) for case in cases for name in names if name in case.providers]
    jobs.sort(key=lambda job: job[1].startswith("ours"))  # the others take longer
    stopped = warm.first_calls(first_call, jobs, options.first_call_seconds, FIRST_CALL_MEMORY, console)
    autotune.speed_up()
    status = 0
    for case in cases:
        entry = measure(case, names, stopped, device, options)
        results.put(data, entry, CASES)
        results.save(data, path)
        console.print(table(entry))
        ours_failed = [
            name for name, found in entry["results"].items() if name.startswith("ours") and "us" not in found
        ]
        status = 1 if ours_failed else status
        gc.collect()
        torch.cuda.empty_cache()
    path.with_suffix(".md").write_text(to_markdown(data))
    return status


if __name__ == "__main__":
    sys.exit(main())
