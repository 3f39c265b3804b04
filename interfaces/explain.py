"""Which backend a call would get, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres import backend as backends
from attnres import contracts
from attnres.mix import attn_res
from attnres.phase1 import phase_1
from attnres.phase2 import phase_2
from attnres.scaled import ScaledTensor
from attnres.serve import attn_res_step


@dataclass(frozen=True)
class Explanation:
    """The backend of a call's forward and of its gradient, and what every backend says to each."""

    function: str
    requested: str
    origin: str  # what asked for it: backend=, use_backend, ATTNRES_BACKEND or the default
    forward: str | None  # None: the call would be refused
    backward: str | None  # None: refused, or the function has no gradient
    refusals: dict[str, dict[str, str | None]]  # launch -> backend -> why not, None where it takes the launch

    def __str__(self) -> str:
        lines = [f"{self.function}: {self.requested} ({self.origin}) -> forward on {self.forward or 'no backend'}"]
        if len(self.refusals) > 1:
            lines[0] += f", gradient on {self.backward or 'no backend'}"
        for launch, answers in self.refusals.items():
            lines += [f"  {launch} on {name}: {reason or 'yes'}" for name, reason in answers.items()]
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `function(*args, **kwargs)` would run on: attn_res, phase_1, phase_2 or attn_res_step, with the arguments of the call.

    Nothing is launched. Raises what the call would raise for arguments that no backend can use.
    """
    if function not in _SPECS:
        allowed = ", ".join(known.__name__ for known in _SPECS)
        raise ValueError(f"function is {getattr(function, '__name__', function)!r}; allowed are {allowed}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    request = backends.requested(arguments.pop("backend"))
    specs = _SPECS[function](arguments)
    refusals = {spec.op: {name: backends.refusal(name, spec) for name in backends.BACKENDS} for spec in specs}
    forward = _choice(backends.choose, specs[0], request)
    backward = _choice(backends.choose_backward, specs[1], request[0]) if forward and len(specs) > 1 else None
    return Explanation(function.__name__, *request, forward, backward, refusals)


def _choice(choose: Callable[..., str], *arguments: Any) -> str | None:
    try:
        return choose(*arguments)
    except backends.BackendError:
        return None


def _mix_specs(arguments: dict[str, Any]) -> list[backends.Spec]:
    sources = contracts.check_mix(**arguments)
    rows, gradients, scaled = _of_sources(sources, arguments["residuals"], arguments["out_dtype"])
    return [
        contracts.spec("mix_fwd", rows, len(rows), stored=(gradients[0].dtype,), scaled=scaled),
        contracts.spec("mix_bwd", rows, len(rows), gradients=gradients, scaled=scaled),
    ]


def _phase_1_specs(arguments: dict[str, Any]) -> list[backends.Spec]:
    sources = contracts.check_phase_1(**arguments)
    rows, gradients, scaled = _of_sources(sources, arguments["block_representations"], arguments["out_dtype"])
    counts = len(rows), arguments["pseudo_queries"].shape[0]
    d_out, d_source = (gradient.dtype for gradient in gradients)
    scaled_out, seed = arguments["storage"] is not None, arguments["stochastic_seed"]
    out, gradient_seed = torch.float16 if scaled_out else d_out, None if d_source == torch.float32 else seed
    return [
        contracts.spec("phase1_fwd", rows, *counts, stored=(out,), scaled=scaled or scaled_out, seed=seed),
        contracts.spec("phase1_bwd", rows, *counts, gradients=gradients, scaled=scaled, seed=gradient_seed),
    ]


def _of_sources(
    sources: list[contracts.Rows], given: Any, out_dtype: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor], bool]:
    """Rows, gradients of out and of one source, whether scaled."""
    stand_ins, values, _ = contracts.parts(sources)
    rows, dtype = contracts.unstack(values or stand_ins, contracts.is_stacked(given)), stand_ins[0].dtype
    return rows, [_made(rows, out_dtype or dtype), _made(rows, dtype)], values is not None


def _phase_2_specs(arguments: dict[str, Any]) -> list[backends.Spec]:
    contracts.check_phase_2(**arguments)
    partial, inter, delta, storage = (arguments[name] for name in ("partial_sum", "inter_out", "delta", "storage"))
    rows = [contracts.rows(contracts.memory(tensor)[0]) for tensor in (partial, inter, delta) if tensor is not None]
    x, out = rows[0], arguments["out_dtype"] or partial.dtype
    stored, gradients = [out], [out, partial.dtype, inter.dtype]
    if delta is not None:
        x = _made(rows, x.dtype if storage is None else torch.float16)
        stored.append(x.dtype)
        gradients.append(torch.promote_types(partial.dtype, delta.dtype))
    scaled = storage is not None or any(isinstance(tensor, ScaledTensor) for tensor in (partial, inter))
    made = [_made(rows, dtype) for dtype in gradients]
    return [
        contracts.spec("phase2_fwd", rows, stored=stored, scaled=scaled, seed=arguments["stochastic_seed"]),
        contracts.spec("phase2_bwd", [x, rows[1]], gradients=made, scaled=scaled),
    ]


def _made(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What a call makes of rows [T, D], contiguous; here without memory, [0, D]."""
    return rows[0].new_empty((0, rows[0].shape[-1]), dtype=dtype)


def _step_specs(arguments: dict[str, Any]) -> list[backends.Spec]:
    contracts.check_step(**arguments)
    prefix, blocks = arguments["prefix"], contracts.memory(arguments["blocks"])[0]
    rows, scaled = contracts.memory(prefix)[0], isinstance(prefix, ScaledTensor)
    options = {
        "stored": (arguments["out_dtype"] or prefix.dtype,),
        "scaled": scaled,
        "seed": arguments["stochastic_seed"],
    }
    return [contracts.step_spec(rows, arguments["delta"], blocks, arguments["num_blocks"], **options)]


_SPECS: dict[Callable[..., Any], Callable[[dict[str, Any]], list[backends.Spec]]] = {
    attn_res: _mix_specs,
    phase_1: _phase_1_specs,
    phase_2: _phase_2_specs,
    attn_res_step: _step_specs,
}
