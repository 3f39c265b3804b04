"""Checked mode: recompute what a call returned by the float64 oracle and raise NumericsError where a budget is broken.

`ATTNRES_CHECK=off | sample | full`, or `with attnres.checked(...)`. `sample` takes 64 rows spread evenly over the tokens;
gradients of queries and weights are sums over all tokens, so beyond 64 tokens only `full` checks those. Works the same for every
backend, and costs a float64 evaluation per call: it is for bringing a kernel or a model up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from attnres.scaled import SCALED_FP16, ScaledTensor

ENVIRONMENT_VARIABLE = "ATTNRES_CHECK"
MODES = ("off", "sample", "full")
SAMPLED_ROWS = 64

in_use: ContextVar[str | None] = ContextVar("attnres_check", default=None)


@contextlib.contextmanager
def checked(mode: str = "sample") -> Iterator[None]:
    """Within it, every call and its gradient is checked: "sample" (64 rows), "full" (all rows) or "off"."""
    token = in_use.set(_known(mode, "checked(...)"))
    try:
        yield
    finally:
        in_use.reset(token)


def current() -> str:
    """The mode in force: checked(...), else ATTNRES_CHECK, else "off"."""
    mode = in_use.get()
    if mode is None:
        mode = _known(os.environ.get(ENVIRONMENT_VARIABLE) or "off", ENVIRONMENT_VARIABLE)
    return mode


def is_on() -> bool:
    """Whether calls are to be checked. Raises where they cannot be: while a CUDA graph is captured."""
    if current() == "off":
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"checked mode ({current()}) cannot run while a CUDA graph is captured: the check reads results back; capture under "
            "attnres.checked('off')"
        )
    return True


def verify(
    op: str,
    backend: str,
    arguments: Mapping[str, Any],
    results: Mapping[str, Tensor | ScaledTensor | Sequence[Tensor] | None],
    grad_outputs: Mapping[str, Tensor | None] | None = None,
    stochastic: Sequence[str] = (),
) -> None:
    """Judges the results that are given, by the names of oracle.reference, tokens flattened to one axis.

    stochastic: the names of those that were rounded so.
    """
    from attnres import numerics, oracle

    name, per_token = next((n, v) for n, v in results.items() if v is not None and oracle.token_axis(n) is not None)
    sample = per_token if isinstance(per_token, (Tensor, ScaledTensor)) else per_token[0]
    rows = _rows(sample.shape[oracle.token_axis(name) or 0], sample.device)
    given = {name: _pick(value, name, rows) for name, value in arguments.items()}
    grads = {name: _pick(value, name, rows) for name, value in (grad_outputs or {}).items() if value is not None}
    references = oracle.reference(op, given, grads)
    for name, value in results.items():
        if value is None or (rows is not None and oracle.token_axis(name) is None):
            continue
        reference = dataclasses.replace(references[name], stochastic=name in stochastic)
        found = _at_row(numerics.judge_reference(_pick(value, name, rows), reference), rows)
        verdict = numerics.Verdict(op, name, backend, _dtype(value), _shape(value), found)
        if not verdict.ok:
            raise numerics.NumericsError(verdict)


def verify_sum(
    op: str,
    name: str,
    backend: str,
    addend: Tensor | ScaledTensor,
    delta: Tensor,
    result: Tensor | ScaledTensor,
    stochastic: bool,
) -> None:
    """Judges a new partial sum [T, D], `addend + delta` as it is stored."""
    from attnres import numerics

    rows = _rows(result.shape[0], result.device)
    x, y, picked = (_pick_tokens(value, rows) for value in (addend, delta, result))
    exact = x.to(torch.float64) + y.double()
    found = numerics.judge(picked, exact, kind="output", plain32=exact.float(), stochastic=stochastic)
    if not found.ok:
        found = _at_row(found, rows)
        raise numerics.NumericsError(numerics.Verdict(op, name, backend, _dtype(result), _shape(result), found))


def verify_step(
    backend: str,
    arguments: Mapping[str, Any],
    out: Tensor,
    prefix: Tensor | ScaledTensor,
    blocks: Tensor | ScaledTensor,
    stochastic: bool,
) -> None:
    """Judges a serving step: `out` by its budget, what it updates in place to the bit. `arguments` are as before the call.

    A prefix that was rounded stochastically must be a neighbour of the sum; the rest follows from it.
    """
    from attnres import numerics, oracle

    rows = _rows(out.shape[0], out.device)
    given = {name: _pick_tokens(value, rows) if name in _STEP_STORAGE else value for name, value in arguments.items()}
    if stochastic:
        verify_sum("step", "prefix", backend, arguments["prefix"], arguments["delta"], prefix, True)
        given |= {"prefix": _pick_tokens(prefix, rows), "delta": None}
    expected = oracle.step(**given)._asdict()
    reference = oracle.reference("step", {**given, "prefix": expected["prefix"], "delta": None})["out"]
    for name, value in (("prefix", prefix), ("blocks", blocks), ("out", out)):
        picked = _pick_tokens(value, rows)
        if name == "out":
            found = numerics.judge_reference(picked, reference)
            ok = found.ok
        else:
            exact = expected[name].to(torch.float64)
            found = numerics.judge(picked, exact, kind="output", plain32=exact.float())
            ok = numerics.differing_elements(picked, expected[name]) == 0
        if not ok:
            raise numerics.NumericsError(
                numerics.Verdict("step", name, backend, _dtype(value), _shape(value), _at_row(found, rows))
            )


_STEP_STORAGE = ("prefix", "delta", "blocks")


def _pick_tokens(value: Any, rows: Tensor | None) -> Any:
    return value if rows is None or value is None else value[rows]


def _at_row(found: Any, rows: Tensor | None) -> Any:
    """The measurement with its worst row as a token of the call, not of the sample."""
    return found if rows is None else dataclasses.replace(found, worst_row=int(rows[found.worst_row % len(rows)]))


def _rows(tokens: int, device: torch.device) -> Tensor | None:
    """The rows to look at; None is all of them."""
    if current() == "full" or tokens <= SAMPLED_ROWS:
        return None
    return torch.linspace(0, tokens - 1, SAMPLED_ROWS, device=device, dtype=torch.float64).round().long()


def _pick(value: Any, name: str, rows: Tensor | None) -> Any:
    from attnres import oracle

    if isinstance(value, (list, tuple)):
        return [_pick(part, name, rows) for part in value]
    axis = oracle.token_axis(name)
    if rows is None or axis is None or not isinstance(value, (Tensor, ScaledTensor)):
        return value
    return value[(slice(None),) * (value.dim() + axis) + (rows,)]


def _known(mode: str, origin: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{origin}: unknown mode {mode!r}; allowed are {', '.join(MODES)}")
    return mode


def _dtype(value: Tensor | ScaledTensor | Sequence[Tensor]) -> str:
    if isinstance(value, ScaledTensor):
        return SCALED_FP16
    return str((value if isinstance(value, Tensor) else value[0]).dtype).removeprefix("torch.")


def _shape(value: Tensor | ScaledTensor | Sequence[Tensor]) -> str:
    return (
        str(list(value.shape))
        if isinstance(value, (Tensor, ScaledTensor))
        else f"{len(value)} x {list(value[0].shape)}"
    )
