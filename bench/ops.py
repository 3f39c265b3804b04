"""What is measured: the table of cases, their inputs, the least bytes each must move, and the check of every provider's result.

A case is one operation in one direction on one shape; its inputs come from attnres.inputs (unit normals, bf16), so that the values
that are timed are the values that are checked, on a sample of tokens, against the float64 oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnres import ScaledTensor, inputs, numerics, oracle
from attnres.inputs import EPS, Shape
from attnres.scaled import SCALED_FP16

SOURCES = ("residuals", "block_representations")
ITEMSIZE = 2  # bf16
CHECKED_TOKENS = 64
SEED = 20261124  # of stochastic rounding
_PLAIN = {"output_norm": False, "delta": False}

# How sources and sums are stored, where not in bf16.
FP16 = "fp16"
SCALED_RESULT = "scaled fp16"  # phase 1's out; phase 2's inter_out, and its new partial sum
SCALED_SOURCES = "scaled fp16 sources"
STOCHASTIC = "stochastic rounding"  # of phase 1's out or the blocks' gradients; of phase 2's new partial sum


@dataclass(frozen=True)
class Case:
    """One line of the suite."""

    op: str  # mix, phase1, phase2, step
    shape: Shape
    backward: bool = False
    stacked: bool = False  # sources as one tensor (only ours tells the difference), else as a list
    headline: bool = False  # also for the providers that take long to compile
    storage: str = ""  # "" is bf16; the other formats are ours alone

    @property
    def decode(self) -> bool:
        """Timed as replays of a CUDA graph."""
        return self.op == "step" and self.shape.tokens <= 256

    @property
    def group(self) -> str:
        """The operation as tables and plots name it."""
        direction = "backward" if self.backward else "forward"
        if self.op == "mix":
            name = f"direct {direction}" + ", norm" * self.shape.output_norm + ", stacked" * self.stacked
        elif self.op == "step":
            name = "decode step" if self.decode else "serving step"
        else:
            name = f"phase {self.op[-1]} {direction}" + ", delta and norm" * self.shape.delta
        return f"{name}, {self.storage}" if self.storage else name

    @property
    def sizes(self) -> str:
        s = self.shape
        depth = {"phase1": f" N{s.sources} S{s.queries}", "phase2": ""}.get(self.op, f" L{s.sources}")
        return f"T{s.tokens} D{s.hidden_size}{depth}"

    @property
    def name(self) -> str:
        return f"{self.group} {self.sizes}"

    @property
    def plain(self) -> Case:
        """The same in bf16."""
        return replace(self, storage="")

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


def _mix(tokens: int, size: int, depth: int, norm: bool = False, **options: Any) -> Case:
    return Case("mix", Shape(tokens, size, depth, output_norm=norm, delta=False), **options)


def _phase1(tokens: int, size: int, blocks: int, queries: int, **options: Any) -> Case:
    return Case("phase1", Shape(tokens, size, blocks, queries, key_weight=False, **_PLAIN), **options)


def _phase2(size: int, fused: bool = False, **options: Any) -> Case:
    shape = Shape(16384, size, 3, key_weight=False, output_norm=fused, delta=fused)
    return Case("phase2", shape, **options)


def _step(tokens: int, size: int, depth: int, **options: Any) -> Case:
    return Case("step", Shape(tokens, size, depth), **options)


# Of phase 1 forward: those of the least shares, and of the most queries
PHASE1_CORNERS = tuple((8192, 4096, *sizes) for sizes in ((1, 2), (3, 9), (5, 2), (9, 2), (12, 16), (16, 17), (16, 32)))
PHASE1_SIZES = ((16384, 2048, 4, 8), (8192, 4096, 8, 16), (8192, 2048, 8, 16), (8192, 7168, 8, 16))
BACKWARD_SIZES = tuple(PHASE1_SIZES[i] for i in (0, 1, 3))
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
    *(_phase1(*sizes, headline=True) for sizes in PHASE1_SIZES),
    _phase1(8192, 2048, 8, 24),
    _phase1(8192, 7168, 8, 24),
    *(_phase1(*sizes) for sizes in PHASE1_CORNERS),
    *(_phase1(*sizes, backward=True, headline=sizes == PHASE1_SIZES[0]) for sizes in BACKWARD_SIZES),
    _phase1(8192, 7168, 8, 24, backward=True),
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
    *(_mix(*sizes, storage=FP16) for sizes in HEADLINE),
    *(_mix(*sizes, backward=True, storage=FP16) for sizes in HEADLINE),
    _step(*HEADLINE[0], storage=FP16),
    *(_phase1(*sizes, storage=FP16) for sizes in PHASE1_SIZES),
    *(_phase1(*sizes, backward=True, storage=FP16) for sizes in BACKWARD_SIZES),
    _phase2(2048, fused=True, storage=FP16),
    _phase2(2048, backward=True, storage=FP16),
    *(_phase1(*sizes, storage=SCALED_RESULT) for sizes in (*PHASE1_SIZES, (8192, 2048, 8, 24), (8192, 7168, 8, 24))),
    *(_phase2(size, fused, storage=SCALED_RESULT) for fused in (False, True) for size in (2048, 4096, 7168)),
    *(_phase1(*sizes, storage=SCALED_SOURCES) for sizes in PHASE1_SIZES),
    *(_mix(*sizes, storage=SCALED_SOURCES) for sizes in HEADLINE),
    *(_step(*sizes, storage=SCALED_SOURCES) for sizes in HEADLINE),
    *(_phase2(size, fused=True, storage=STOCHASTIC) for size in (2048, 4096, 7168)),
    *(_phase1(*sizes, storage=STOCHASTIC) for sizes in (*PHASE1_SIZES, (8192, 7168, 8, 24))),
    *(_phase1(*sizes, backward=True, storage=STOCHASTIC) for sizes in BACKWARD_SIZES),
)


@dataclass(frozen=True)
class Inputs:
    """The public arguments by name, sources as one stacked [L, T, D]; gradients of the outputs by name."""

    arguments: dict[str, Any]
    grads: dict[str, Tensor]


def make_inputs(case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
    dtype = "fp16" if case.storage == FP16 else "bf16"
    made = inputs.make_case(case.op, case.shape, "normal", dtype, device, seed)
    arguments = dict(made.arguments)
    for name in SOURCES:
        if name in arguments:
            arguments[name] = torch.stack(arguments[name])
    if case.op == "step":  # one epsilon, because FLA's op has one; no block write, as at most sites
        arguments |= {"block_write_idx": -1, "output_norm_eps": EPS}
    if case.op == "phase2":
        arguments["output_rms_eps"] = EPS
    if case.storage == STOCHASTIC:
        arguments["stochastic_seed"] = SEED
    if case.storage == SCALED_RESULT:
        if case.op == "phase2":
            arguments["inter_out"] = ScaledTensor.from_tensor(arguments["inter_out"])
        if case.op == "phase1" or case.shape.delta:
            arguments["storage"] = SCALED_FP16
    if case.storage == SCALED_SOURCES:
        for name in (*SOURCES, "blocks", "prefix"):
            if name in arguments:
                arguments[name] = ScaledTensor.from_tensor(arguments[name])
    return Inputs(arguments, made.grad_outputs if case.backward else {})


@dataclass(frozen=True)
class Sample:
    """Exact results of some tokens."""

    tokens: Tensor  # indices, int64
    references: dict[str, numerics.Reference]


def sample(case: Case, made: Inputs) -> Sample:
    """What the oracle says of up to CHECKED_TOKENS tokens spread over all; gradients of queries and weights are not sampled."""
    device = next(value.device for value in made.arguments.values() if isinstance(value, (Tensor, ScaledTensor)))
    count = min(case.shape.tokens, CHECKED_TOKENS)
    tokens = torch.linspace(0, case.shape.tokens - 1, count, device=device).round().long()
    if case.op == "step":
        per_token = ("prefix", "delta", "blocks")
        arguments = {name: value[tokens] if name in per_token else value for name, value in made.arguments.items()}
        references = oracle.reference("step", arguments)
    else:
        arguments = {name: _rows(name, value, tokens) for name, value in made.arguments.items()}
        grads = {name: _rows(name, value, tokens) for name, value in made.grads.items()}
        if case.op == "phase2":
            arguments.pop("stochastic_seed", None)
        references = oracle.reference(case.op, arguments, grads or None)
    kept = {name: found for name, found in references.items() if oracle.token_axis(name) is not None}
    kept = {name: found for name, found in kept.items() if name.startswith("d_") == case.backward}
    if case.op == "phase2" and case.storage == STOCHASTIC:  # the sum; the mix follows from the sum as it was rounded
        exact = arguments["partial_sum"].double() + arguments["delta"].double()
        kept = {"new_partial": replace(kept["new_partial"], exact=exact, plain32=(exact.float(),), stochastic=True)}
    return Sample(tokens, kept)


def check(found: Mapping[str, Tensor | ScaledTensor | list[Tensor]], exact: Sample) -> tuple[str, numerics.Measurement]:
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
    if axis is None or not isinstance(value, (Tensor, ScaledTensor)):
        return value
    return value.detach()[(slice(None),) * (axis % value.dim()) + (tokens,)]
