"""What is measured: the table of cases, their inputs, the least bytes each must move, and the check of every provider's result.

A case is one operation in one direction on one shape; its inputs come from attnres.inputs (unit normals, bf16), so that the values
that are timed are the values that are checked, on a sample of tokens, against the float64 oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres import inputs, numerics, oracle
from attnres.inputs import EPS, Shape

SOURCES = ("residuals", "block_representations")
ITEMSIZE = 2  # bf16
CHECKED_TOKENS = 64
_PLAIN = {"output_norm": False, "delta": False}


@dataclass(frozen=True)
class Case:
    """One line of the suite."""

    op: str  # mix, phase1, phase2, step
    shape: Shape
    backward: bool = False
    stacked: bool = False  # sources as one tensor (only ours tells the difference), else as a list
    headline: bool = False  # also for the providers that take long to compile

    @property
    def decode(self) -> bool:
        """Timed as replays of a CUDA graph."""
        return self.op == "step" and self.shape.tokens <= 256

    @property
    def group(self) -> str:
        """The operation as tables and plots name it."""
        direction = "backward" if self.backward else "forward"
        if self.op == "mix":
            return f"direct {direction}" + ", norm" * self.shape.output_norm + ", stacked" * self.stacked
        if self.op == "step":
            return "decode step" if self.decode else "serving step"
        return f"phase {self.op[-1]} {direction}" + ", delta and norm" * self.shape.delta

    @property
    def sizes(self) -> str:
        s = self.shape
        depth = {"phase1": f" N{s.sources} S{s.queries}", "phase2": ""}.get(self.op, f" L{s.sources}")
        return f"T{s.tokens} D{s.hidden_size}{depth}"

    @property
    def name(self) -> str:
        return f"{self.group} {self.sizes}"

    @property
    def least_bytes(self) -> int:
        """The least that must cross device memory, small per-token statistics left out (DESIGN 2)."""
        s = self.shape
        rows = {
            "mix": (s.sources + 1, 2 * s.sources + 1),
            "phase1": (s.sources + s.queries, 2 * s.sources + s.queries),
            "phase2": (5, 6) if s.delta else (3, 5),
            "step": (s.sources + 3, 0),
        }[self.op][self.backward]
        return rows * s.tokens * s.hidden_size * ITEMSIZE

    def sets(self, l2_bytes: int) -> int:
        """How many input sets take turns, so that none is still in L2 when its turn comes."""
        return min(1024 if self.decode else 8, math.ceil(2 * l2_bytes / self.least_bytes))


def _mix(tokens: int, size: int, depth: int, norm: bool = False, **options: bool) -> Case:
    return Case("mix", Shape(tokens, size, depth, output_norm=norm, delta=False), **options)


def _phase1(tokens: int, size: int, blocks: int, queries: int, **options: bool) -> Case:
    return Case("phase1", Shape(tokens, size, blocks, queries, key_weight=False, **_PLAIN), **options)


def _phase2(size: int, fused: bool = False, **options: bool) -> Case:
    shape = Shape(16384, size, 3, key_weight=False, output_norm=fused, delta=fused)
    return Case("phase2", shape, **options)


def _step(tokens: int, size: int, depth: int, **options: bool) -> Case:
    return Case("step", Shape(tokens, size, depth), **options)


HEADLINE = ((8192, 7168, 9), (16384, 4096, 5), (16384, 2048, 17))
_GRID = [(8192, size, depth) for size in (7168, 2304, 2048, 4096) for depth in (2, 5, 9, 17)]

# Headline cases first: peers stop when the time budget is spent.
CASES: tuple[Case, ...] = (
    *(_mix(*sizes, headline=True) for sizes in HEADLINE),
    *(_mix(*sizes, norm=True, headline=True) for sizes in HEADLINE),
    *(_mix(*sizes, stacked=True, headline=True) for sizes in HEADLINE),
    *(_mix(*sizes, backward=True, headline=True) for sizes in HEADLINE),
    *(_step(*sizes, headline=True) for sizes in HEADLINE),
    *(_step(tokens, 7168, 9, headline=True) for tokens in (1, 16, 64, 256)),
    _phase1(16384, 2048, 4, 8, headline=True),
    _phase1(8192, 4096, 8, 16, headline=True),
    _phase1(8192, 2048, 8, 16, headline=True),
    _phase1(8192, 7168, 8, 16, headline=True),
    _phase1(8192, 2048, 8, 24),
    _phase1(8192, 7168, 8, 24),
    _phase1(16384, 2048, 4, 8, backward=True, headline=True),
    _phase1(8192, 4096, 8, 16, backward=True),
    _phase1(8192, 7168, 8, 16, backward=True),
    *(_phase2(size, headline=True) for size in (2048, 4096, 7168)),
    *(_phase2(size, fused=True, headline=True) for size in (2048, 4096, 7168)),
    *(_phase2(size, backward=True, headline=size == 2048) for size in (2048, 4096, 7168)),
    *(_phase2(size, fused=True, backward=True) for size in (2048, 4096, 7168)),
    *(_step(tokens, 7168, depth) for depth in (2, 5) for tokens in (1, 16, 64, 256, 8192)),
    _step(8192, 2304, 9),
    *(_mix(*sizes) for sizes in _GRID if sizes not in HEADLINE),
    _mix(8192, 7168, 9, norm=True, backward=True),
    _mix(8192, 7168, 2, backward=True),
    _mix(8192, 7168, 5, backward=True),
    _mix(8192, 2304, 9, backward=True),
)


@dataclass(frozen=True)
class Inputs:
    """The public arguments by name, sources as one stacked tensor [L, T, D]; gradients of the outputs by name."""

    arguments: dict[str, Any]
    grads: dict[str, Tensor]


def make_inputs(case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
    made = inputs.make_case(case.op, case.shape, "normal", "bf16", device, seed)
    arguments = dict(made.arguments)
    for name in SOURCES:
        if name in arguments:
            arguments[name] = torch.stack(arguments[name])
    if case.op == "step":  # one epsilon, because FLA's op has one; no block write, as at most sites
        arguments |= {"block_write_idx": -1, "output_norm_eps": EPS}
    if case.op == "phase2":
        arguments["output_rms_eps"] = EPS
    return Inputs(arguments, made.grad_outputs if case.backward else {})


@dataclass(frozen=True)
class Sample:
    """Exact results of some tokens."""

    tokens: Tensor  # indices, int64
    references: dict[str, numerics.Reference]


def sample(case: Case, made: Inputs) -> Sample:
    """What the oracle says of up to CHECKED_TOKENS tokens spread over all; gradients of queries and weights are not sampled."""
    device = next(value.device for value in made.arguments.values() if isinstance(value, Tensor))
    count = min(case.shape.tokens, CHECKED_TOKENS)
    tokens = torch.linspace(0, case.shape.tokens - 1, count, device=device).round().long()
    if case.op == "step":
        per_token = ("prefix", "delta", "blocks")
        arguments = {name: value[tokens] if name in per_token else value for name, value in made.arguments.items()}
        references = oracle.reference("step", arguments)
    else:
        arguments = {name: _rows(name, value, tokens) for name, value in made.arguments.items()}
        grads = {name: _rows(name, value, tokens) for name, value in made.grads.items()}
        references = oracle.reference(case.op, arguments, grads or None)
    kept = {name: found for name, found in references.items() if oracle.token_axis(name) is not None}
    return Sample(tokens, {name: found for name, found in kept.items() if name.startswith("d_") == case.backward})


def check(found: Mapping[str, Tensor | list[Tensor]], exact: Sample) -> tuple[str, numerics.Measurement]:
    """The result that uses most of its error budget, and its errors."""
    measured = {}
    for name, reference in exact.references.items():
        if name in found:
            measured[name] = numerics.judge_reference(_rows(name, found[name], exact.tokens), reference)
    worst = max(measured, key=lambda name: measured[name].severity)
    return worst, measured[worst]


def _rows(name: str, value: Any, tokens: Tensor) -> Any:
    if isinstance(value, list):
        return [_rows(name, each, tokens) for each in value]
    axis = oracle.token_axis(name)
    return value if axis is None or not isinstance(value, Tensor) else value.detach().index_select(axis, tokens)
