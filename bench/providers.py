"""Who is measured: our backends and the peers, each with a binding per operation.

A binding takes an operation's public arguments (bench.ops) and returns a call without arguments that gives outputs by name.
Packages are imported when first wanted; one that cannot be imported is reported, with the error, as not installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import attnres
from attnres import backend as backends
from bench.ops import SOURCES, Case, Inputs

# Autotuning results of a concurrent warm-up must not be kept for the timed run.
os.environ.setdefault("FLA_CACHE_RESULTS", "0")

Arguments = dict[str, Any]
Results = dict[str, Any]
Call = Callable[[], Results]
Binding = Callable[[Arguments], Call]


class Unsupported(Exception):
    """The provider has no such operation; the message says what is missing."""


@dataclass(frozen=True)
class Provider:
    name: str
    load: Callable[[], dict[str, Binding]]  # bindings by operation; imports the package
    package: str = ""  # whose version is recorded
    ours: bool = False
    stacked: bool = False  # takes the sources as one tensor, else as a list
    fuses: bool = True  # can fuse the output norm and the add
    headline_only: bool = False  # slow to compile
    environment: dict[str, str] = field(default_factory=dict)

    def bindings(self) -> dict[str, Binding]:
        return _load(self.name)

    def missing(self) -> str | None:
        """Why the provider cannot be used here at all, or None."""
        try:
            self.bindings()
        except Exception as error:  # whatever an import of a peer raises
            return f"not installed: {type(error).__name__}: {error}".splitlines()[0]
        return backends.available_backends()[self.name.removeprefix("ours-")] if self.ours else None

    def version(self) -> str:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return ""

    def wants(self, case: Case) -> bool:
        """Whether the suite runs it on the case; all but ours take stacked sources as they take a list."""
        if case.storage:  # what a format costs is asked of the CuTe kernels alone
            return self.name == "ours-cute"
        return (case.headline or not self.headline_only) and (self.ours or not case.stacked)

    @contextlib.contextmanager
    def _switched_on(self) -> Iterator[None]:
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

    def binding(self, case: Case) -> Binding:
        """Raises Unsupported where it has none, whatever the inputs."""
        binding = self.bindings().get(case.op)
        if binding is None or (case.shape.output_norm and not self.fuses):
            raise Unsupported(f"no {case.group}")
        if self.ours:
            _refuse_other_backend(self.name.removeprefix("ours-"), case)
        return binding

    def bind(self, case: Case, made: Inputs) -> Call:
        """The call to be timed: the forward, or the backward of a forward that is run here, once."""
        binding = self.binding(case)
        arguments = dict(made.arguments)
        for name in SOURCES:
            if name in arguments and not (self.stacked or case.stacked):
                arguments[name] = list(arguments[name].unbind(0))
        if case.op == "step":  # updated in place: each provider has its own
            arguments["prefix"] = arguments["prefix"].clone()
        with self._switched_on():
            call = _backward(binding, arguments, made.grads) if case.backward else binding(arguments)
        return self._switched(call) if self.environment and not case.backward else call

    def _switched(self, call: Call) -> Call:
        def run() -> Results:
            with self._switched_on():
                return call()

        return run


def _backward(binding: Binding, arguments: Arguments, grads: dict[str, Tensor]) -> Call:
    """autograd.grad over a kept graph: no accumulation into .grad, no forward in the timing."""
    leaves: Arguments = {}
    for name, value in arguments.items():
        if isinstance(value, list):
            leaves[name] = [each.detach().requires_grad_() for each in value]
        else:
            leaves[name] = value.detach().requires_grad_() if isinstance(value, Tensor) else value
    outputs = binding(leaves)()
    wanted = {name: value for name, value in leaves.items() if isinstance(value, (Tensor, list))}
    flat = [each for value in wanted.values() for each in (value if isinstance(value, list) else [value])]
    ends, given = [outputs[name] for name in grads], list(grads.values())

    def run() -> Results:
        found = iter(torch.autograd.grad(ends, flat, given, retain_graph=True))
        return {
            f"d_{name}": [next(found) for _ in value] if isinstance(value, list) else next(found)
            for name, value in wanted.items()
        }

    return run


def _refuse_other_backend(backend: str, case: Case) -> None:
    """A backend without a kernel of its own for a gradient borrows Triton's; that is not a result of this backend."""
    op = "serve_step" if case.op == "step" else f"{case.op}_{'bwd' if case.backward else 'fwd'}"
    s = case.shape
    spec = backends.Spec(op, torch.device("cuda", 0), torch.bfloat16, s.hidden_size, s.sources, s.queries)
    reason = backends.refusal(backend, spec)
    if reason is not None:
        raise Unsupported(reason)


def _ours(backend: str) -> dict[str, Binding]:
    def mix(a: Arguments) -> Call:
        return lambda: {"out": attnres.attn_res(**a, backend=backend)}

    def phase1(a: Arguments) -> Call:
        return lambda: dict(zip(("out", "lse"), attnres.phase_1(**a, backend=backend), strict=True))

    def phase2(a: Arguments) -> Call:
        if a["delta"] is None:
            return lambda: {"out": attnres.phase_2(**a, backend=backend)}
        return lambda: dict(zip(("out", "new_partial"), attnres.phase_2(**a, backend=backend), strict=True))

    def step(a: Arguments) -> Call:
        return lambda: {"out": attnres.attn_res_step(**a, backend=backend)}

    return {"mix": mix, "phase1": phase1, "phase2": phase2, "step": step}


def plain_mix(sources: Tensor, query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
    """The formula as one writes it in torch: sources [L, T, D] -> [T, D], arithmetic in float32."""
    v = sources.float()
    logits = (v.square().mean(-1) + eps).rsqrt() * (v * (query.float() * key_weight.float())).sum(-1)
    return (logits.softmax(0).unsqueeze(-1) * v).sum(0).to(sources.dtype)


def _compiled() -> dict[str, Binding]:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # else a kept graph cannot run its backward twice

    def mix(a: Arguments) -> Call:
        torch._dynamo.reset()  # shapes of earlier cases do not count against its limit of recompilations
        run = torch.compile(plain_mix, dynamic=False)
        return lambda: {"out": run(a["residuals"], a["query"], a["rms_weight"], a["rms_eps"])}

    return {"mix": mix}


def _flash_attn_res() -> dict[str, Binding]:
    peer = importlib.import_module("flash_attn_res")

    def phase1(a: Arguments) -> Call:
        blocks = a["block_representations"].unsqueeze(1)  # [N, 1, T, D]: it wants a batch
        queries, eps = a["pseudo_queries"], a["eps"]

        def run() -> Results:
            out, lse = peer.phase_1_batched_attention_triton_op(blocks, queries, eps)
            return {"out": out[:, 0], "lse": lse[:, 0]}

        return run

    def phase2(a: Arguments) -> Call:
        x, inter, lse = (a[name].unsqueeze(0) for name in ("partial_sum", "inter_out", "inter_lse"))
        query, eps = a["pseudo_query"], a["eps"]
        return lambda: {"out": peer.phase_2_online_softmax_merge_triton_op(x, query, inter, lse, eps)[0]}

    return {"phase1": phase1, "phase2": phase2}


def _fla() -> dict[str, Binding]:
    fused_attnres = importlib.import_module("fla.ops.attnres").fused_attnres

    def mix(a: Arguments) -> Call:
        names = ("query", "residuals", "rms_weight", "output_rms_weight", "rms_eps", "scale")
        given = {name: a[name] for name in names}
        return lambda: {"out": fused_attnres(**given)}

    def step(a: Arguments) -> Call:
        prefix, delta, eps = a["prefix"], a["delta"], a["eps"]
        blocks = a["blocks"][:, : a["num_blocks"]]  # [T, B, D]: as separate tensors, so that it need not copy
        sources = [*(block.contiguous() for block in blocks.unbind(1)), prefix]

        def run() -> Results:
            prefix.add_(delta)
            return {"out": fused_attnres(a["qk_weight"], sources, a["norm_weight"], a["output_norm_weight"], eps)}

        return run

    return {"mix": mix, "step": step}


def _fla_gluon() -> dict[str, Binding]:
    gluon = importlib.import_module("fla.ops.attnres.backends.gluon")
    if not gluon.AttnResGluonBackend.is_available():  # FLA would run its Triton kernels without a word
        raise ImportError("FLA finds no triton.experimental.gluon")
    return _fla()


def _liger() -> dict[str, Binding]:
    function = importlib.import_module("liger_kernel.ops.attn_res").LigerAttnResFunction

    def mix(a: Arguments) -> Call:
        return lambda: {"out": function.apply(a["residuals"], a["query"], a["rms_weight"], a["rms_eps"])}

    return {"mix": mix}


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("ours-cute", lambda: _ours("cute"), "attnres", ours=True),
        Provider("ours-triton", lambda: _ours("triton"), "attnres", ours=True),
        Provider("torch.compile", _compiled, "torch", stacked=True, fuses=False, headline_only=True),
        Provider("flash-attn-res", _flash_attn_res, "flash-attn-res", stacked=True, fuses=False),
        Provider("fla-triton", _fla, "fla-core"),
        Provider("fla-gluon", _fla_gluon, "fla-core", headline_only=True, environment={"FLA_ATTNRES_GLUON": "1"}),
        Provider("liger", _liger, "liger-kernel", stacked=True, fuses=False),
    )
}


def missing(names: Iterable[str]) -> dict[str, str]:
    """Those that cannot be used here, and why. What follows a comma names a variant."""
    reasons = {name: PROVIDERS[name.split(",")[0]].missing() for name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def tell_missing(found: dict[str, str], named: bool, console: Console) -> None:
    """Exits if they were asked for by name."""
    lines = [f"{name}: {reason}" for name, reason in found.items()]
    if lines and named:
        raise SystemExit("\n".join(lines))
    for line in lines:
        console.print(line, markup=False)


@functools.cache
def _load(name: str) -> dict[str, Binding]:
    return PROVIDERS[name].load()
