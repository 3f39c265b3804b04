"""What a storage format costs in accuracy: phase 1's result, the merge that reads it, and a partial sum of many addends.

The report's section on storage formats. Blocks are given activations in bf16. Errors are relative L2 errors against float64 on the
same blocks, before the final rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres import oracle
from attnres.backend import BackendError
from attnres.phase1 import phase_1
from attnres.phase2 import phase_2
from attnres.scaled import SCALED_FP16, ScaledTensor

MOST_BLOCKS = 6
QUERIES = 4
EPS = 1e-6
HUGE = 1e30  # what the largest activation is made to be: squares leave float32's range
ADDENDS = 200
BETTER = 0.25  # scaled fp16's error may be at most this much of bf16's

OUT, MERGE, SUM = "phase 1", "phase 1 and 2", f"sum of {ADDENDS}"


@dataclass(frozen=True)
class StorageError:
    """One format on one backend."""

    result: str  # OUT, MERGE or SUM
    blocks: str
    storage: str
    backend: str
    error: float
    ratio: float | None  # to bf16's on this backend
    verdict: str  # ok, broken; "" where nothing is promised


def measure(sources: Tensor, backends: Sequence[str], device: torch.device) -> list[StorageError]:
    """Of sources [L, T, D], L >= 3: the last two make up the partial sum, up to MOST_BLOCKS before them are the blocks."""
    given = sources[: MOST_BLOCKS + 2].to(device, torch.bfloat16)
    found: list[StorageError] = []
    for backend in backends:
        errors: dict[str, float] = {}
        for storage, result, error in _two_phases(given, backend):
            errors.setdefault(result, error)  # bf16's comes first
            found.append(_judged(result, "activations", storage, backend, error, errors[result]))
        for storage, result, error in _huge(given, backend):
            found.append(_judged(result, f"activations up to {HUGE:.0e}", storage, backend, error, errors.get(result)))
        # of the interpreter, hundreds of calls would take minutes
        for storage, error in _drift(backend, device) if backend == "torch" or device.type == "cuda" else ():
            errors.setdefault(SUM, error)
            found.append(
                StorageError(SUM, "a quarter of bf16's step each", storage, backend, error, error / errors[SUM], "")
            )
    return found


def _judged(result: str, blocks: str, storage: str, backend: str, error: float, bf16: float | None) -> StorageError:
    ratio = error / bf16 if bf16 else None
    verdict = "" if storage != SCALED_FP16 or ratio is None else "ok" if ratio <= BETTER else "broken"
    return StorageError(result, blocks, storage, backend, error, ratio, verdict)


def _two_phases(given: Tensor, backend: str) -> Iterator[tuple[str, str, float]]:
    """(storage, result, error) of what the backend takes."""
    *blocks, partial, delta = given
    queries, key = _queries(given)
    inter = oracle.phase1(blocks, queries, EPS)
    exact = oracle.phase2(partial.double(), key, inter.out[0], inter.lse[0], EPS, delta=delta.double()).out
    formats: tuple[tuple[str, dict[str, Any]], ...] = (
        ("bf16", {}),
        (SCALED_FP16, {"storage": SCALED_FP16}),
        ("fp32", {"out_dtype": torch.float32}),
    )
    for storage, options in formats:
        made = _taken(phase_1, blocks, queries, EPS, backend=backend, **options)
        if made is None:
            continue
        out, lse = made
        yield storage, OUT, _error(out.to(torch.float64), inter.out)
        # both the partial sum and phase 1's result are stored in the format
        x = partial.float() if storage == "fp32" else partial
        more: dict[str, Any] = {"storage": SCALED_FP16} if storage == SCALED_FP16 else {}
        more.update(delta=delta, out_dtype=torch.float32, backend=backend)
        merged = _taken(phase_2, x, key, out[0], lse[0], EPS, **more)
        if merged is not None:
            yield storage, MERGE, _error(merged[0].double(), exact)


def _huge(given: Tensor, backend: str) -> Iterator[tuple[str, str, float]]:
    """Where only scaled fp16 can be stored and read: blocks beyond the square root of float32's largest number."""
    # by a power of two, so that the blocks are the same numbers
    larger = given.float() * 2.0 ** math.floor(math.log2(HUGE / float(given.abs().amax())))
    *values, partial, delta = (ScaledTensor.from_tensor(source) for source in larger)
    queries, key = _queries(given)
    inter = oracle.phase1(values, queries, EPS)
    addend = delta.to(torch.float32)
    exact = oracle.phase2(partial, key, inter.out[0], inter.lse[0], EPS, delta=addend).out
    made = _taken(phase_1, values, queries, EPS, storage=SCALED_FP16, backend=backend)
    if made is not None:
        out, lse = made
        yield SCALED_FP16, OUT, _error(out.to(torch.float64), inter.out)
        merged = _taken(phase_2, partial, key, out[0], lse[0], EPS, delta=addend, backend=backend)
        if merged is not None:
            yield SCALED_FP16, MERGE, _error(merged[0].double(), exact)


def _drift(backend: str, device: torch.device) -> Iterator[tuple[str, float]]:
    """(storage, error) of a partial sum to which addends are added that rounding to nearest loses in bf16."""
    generator = torch.Generator().manual_seed(0)
    start = (1 + torch.randn(16, 64, generator=generator).abs() / 4).bfloat16().to(device)
    addends = (0.002 + 0.001 * torch.randn(ADDENDS, 16, 64, generator=generator)).bfloat16().to(device)
    exact = start.double() + addends.double().sum(0)
    given = torch.zeros(64, device=device), start, torch.zeros(16, device=device), EPS
    formats: tuple[tuple[str, Any, bool], ...] = (
        ("bf16", start, False),
        ("bf16, stochastic", start, True),
        (SCALED_FP16, ScaledTensor.from_tensor(start), False),
        ("fp32", start.float(), False),
    )
    for storage, total, stochastic in formats:
        for index, addend in enumerate(addends):
            options = {"delta": addend, "stochastic_seed": index if stochastic else None, "backend": backend}
            made = _taken(phase_2, total, *given, **options)
            if made is None:
                break
            total = made[1]
        else:
            yield storage, _error(total.to(torch.float64), exact)


def _queries(given: Tensor) -> tuple[Tensor, Tensor]:
    """[S, D] and the first of them."""
    size = given.shape[-1]
    queries = torch.randn(QUERIES, size, generator=torch.Generator().manual_seed(0)) * (1.5 / size**0.5)
    return queries.to(given.device), queries[0].to(given.device)


def _taken(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The call's result; None where the backend refuses it."""
    try:
        return function(*arguments, **options)
    except BackendError:
        return None


def _error(found: Tensor, exact: Tensor) -> float:
    """Of rows that may be of any magnitude."""
    largest = exact.abs().amax()
    return float(((found - exact) / largest).norm() / (exact / largest).norm())
