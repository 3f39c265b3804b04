"""One operator, two ways in: directly (eager, a few microseconds) and through torch.library (torch.compile, export).

Both share the operator's implementation and its gradient. The direct way exists because the torch.library boundary costs tens of
microseconds of Python per call, more than a small launch takes on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnres.repeated import Call
from attnres.scaled import ScaledTensor

Outputs = tuple[Any, ...]  # tensors; None where one is not wanted

_library = torch.library.Library("attnres", "FRAGMENT")


class Operator:
    """A differentiable operator of tensors that may have gradients, and of options that have none.

    forward(*tensors, options, call=None) -> tuple of new tensors and backward(*gradients and saved tensors, options) -> list of
    new tensors do the work; allocate_forward and allocate_backward make their outputs' metadata alone (the fake implementations).
    An output that is not wanted is None, which torch.library has as an empty tensor. The first `results` outputs have gradients;
    the `statistics` that follow are for the backward alone, and the direct way does not return them. save(ctx, tensors, options,
    outputs) keeps what the gradient needs; gradient(ctx, backward, *grads) returns one gradient per tensor. `options` is a
    NamedTuple, whose fields end both schemas. Where the forward's schema begins with a Tensor[], the gradient's first element is
    a list.
    """

    def __init__(
        self,
        name: str,
        options: Any,
        schema: str,
        backward_schema: str,
        *,
        forward: Callable[..., Outputs],
        backward: Callable[..., list[Tensor]],
        allocate_forward: Callable[..., Outputs],
        allocate_backward: Callable[..., list[Tensor]],
        save: Callable[[Any, tuple[Any, ...], Any, Outputs], None],
        gradient: Callable[..., tuple[Any, ...]],
        results: int,
        statistics: int,
    ):
        count = len(options._fields)

        runs = [with_options(options, run) for run in (_none_is_empty(forward), _none_is_empty(allocate_forward))]
        backward_runs = [with_options(options, run) for run in (backward, allocate_backward)]
        register(name, schema, *runs)
        register(f"{name}_backward", backward_schema, *backward_runs)
        self._forward, self._takes_list = forward, schema.startswith("(Tensor[]")
        self._operator = getattr(torch.ops.attnres, name)
        backward_operator = getattr(torch.ops.attnres, f"{name}_backward")

        def keep(ctx: Any, tensors: tuple[Any, ...], given: Any, outputs: Outputs, auxiliary: Outputs) -> None:
            save(ctx, tensors, given, outputs)
            ctx.set_materialize_grads(False)  # else a launch fills zeros for each gradient that is missing
            ctx.mark_non_differentiable(*[output for output in auxiliary if output is not None])

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
            given = options(*inputs[-count:])
            keep(ctx, inputs[:-count], given, output, output[results:])
            ctx.none_of_options = [[None] * len(value) if isinstance(value, list) else None for value in given]

        def run_backward(*arguments: Any) -> list[Tensor]:
            return backward_operator(*arguments[:-1], *arguments[-1])

        torch.library.register_autograd(
            f"attnres::{name}",
            lambda ctx, *grads: (*gradient(ctx, run_backward, *grads), *ctx.none_of_options),
            setup_context=setup_context,
            lib=_library,
        )
        takes_list, unseen, after = self._takes_list, (None,) * statistics, results + statistics

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, call: Call, others: int, *flat: Any) -> Outputs:
                tensors = (list(flat[:-others]), *flat[-others:]) if takes_list else flat
                outputs = forward(*tensors, call.options, call)
                keep(ctx, tensors, call.options, outputs, outputs[after:])
                return (*outputs[:results], *unseen, *outputs[after:])

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
                found = gradient(ctx, backward, *grads)
                return (None, None, *found[0], *found[1:]) if takes_list else (None, None, *found)

        self._apply = Eager.apply
        # Without a look for functorch's wrappers, half of the time of apply: a call that repeats has none.
        self._apply_repeated = super(torch.autograd.Function, Eager).apply

    def __call__(self, call: Call, *tensors: Any) -> tuple[Any, ...]:
        """The forward's outputs, part of the autograd graph where the call is differentiable (see needs_grad)."""
        if torch.compiler.is_compiling():
            return self._operator(*tensors, *call.options)
        if not call.differentiable:
            return self._forward(*tensors, call.options, call)
        # autograd.Function does not look into lists: tensors of a list are arguments of their own
        flat = (*tensors[0], *tensors[1:]) if self._takes_list else tensors
        apply = self._apply_repeated if call.repeats else self._apply
        return apply(call, len(tensors) - 1, *flat)


def _none_is_empty(run: Callable[..., Outputs]) -> Callable[..., tuple[Tensor, ...]]:
    def filled(*arguments: Any) -> tuple[Tensor, ...]:
        outputs = run(*arguments)
        first = next(output for output in outputs if output is not None)
        return tuple(first.new_empty(0) if output is None else output for output in outputs)

    return filled


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines attnres::name with one implementation for every device and one for fake tensors."""
    _library.define(name + schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnres::{name}", fake, lib=_library)


def with_options(options: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, called with the fields of its last argument, `options`, in its place."""
    count = len(options._fields)
    return lambda *arguments: run(*arguments[:-count], options(*arguments[-count:]))


def empty_as(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of its shape and device, in 1.1 us where new_empty takes 1.7."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def needs_grad(*tensors: Tensor | ScaledTensor | None) -> bool:
    """Whether autograd will want a gradient of any of them."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
