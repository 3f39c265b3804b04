"""Which backend a call would get, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnres import backend as backends
from attnres import contracts, dtypes
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
    return _of_sources(("mix_fwd", "mix_bwd"), sources, contracts.is_stacked(arguments["residuals"]), arguments)


def _phase_1_specs(arguments: dict[str, Any]) -> list[backends.Spec]:
    sources = contracts.check_phase_1(**arguments)
    stacked, sites = contracts.is_stacked(arguments["block_representations"]), arguments["pseudo_queries"].shape[0]
    return _of_sources(("phase1_fwd", "phase1_bwd"), sources, stacked, arguments, sites)


def _of_sources(
    ops: tuple[str, ...], sources: list[contracts.Rows], stacked: bool, arguments: dict[str, Any], num_queries: int = 1
) -> list[backends.Spec]:
    stand_ins, values, scales = contracts.parts(sources)
    rows = contracts.unstack(values or stand_ins, stacked)
    scaled, seed = scales is not None, arguments.get("stochastic_seed")
    more = dtypes.scaled_sources(scaled)
    gradients = (arguments["out_dtype"] or stand_ins[0].dtype, stand_ins[0].dtype)
    forward, backward = ops
    stored, scaled_out = gradients[:1], arguments.get("storage") is not None
    common: dict[str, Any] = {"num_sources": len(rows), "num_queries": num_queries, "seed": seed}
    return [
        contracts.spec(
            forward,
            rows,
            stored=(torch.float16,) if scaled_out else stored,
            scaled=scaled or scaled_out,
            more=more,
            **common,
        ),
        contracts.spec(
            backward,
            rows,
            stored=gradients,
            scaled=scaled,
            more=more + dtypes.mixed_gradients(*gradients),
            **common,
        ),
    ]


def _phase_2_specs(arguments: dict[str, Any]) -> list[backends.Spec]:
    contracts.check_phase_2(**arguments)
    given = [arguments[name] for name in ("partial_sum", "inter_out", "delta") if arguments[name] is not None]
    rows = [contracts.rows(contracts.memory(tensor)[0]) for tensor in given]
    stored = (arguments["out_dtype"] or given[0].dtype,)
    delta = arguments["delta"]
    d_partial = given[0].dtype if delta is None else torch.promote_types(given[0].dtype, delta.dtype)
    gradients = (*stored, d_partial, given[1].dtype)
    scaled = arguments["storage"] is not None or any(isinstance(tensor, ScaledTensor) for tensor in given)
    return [
        contracts.spec("phase2_fwd", rows, stored=stored, scaled=scaled, seed=arguments["stochastic_seed"]),
        contracts.spec(
            "phase2_bwd", rows[:2], stored=gradients, scaled=scaled, more=dtypes.mixed_gradients(*gradients)
        ),
    ]


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
