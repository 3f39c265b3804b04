"""One operator, two ways in: directly (eager, a few microseconds) and through torch.library (torch.compile, export).

Both share the operator's implementation and its gradient. The direct way exists because the torch.library boundary costs tens of
microseconds of Python per call, more than a small launch takes on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnres.scaled import ScaledTensor

Outputs = tuple[Any, ...]  # tensors; None where one is not wanted

_library = torch.library.Library("attnres", "FRAGMENT")


class Operator:
    """A differentiable operator.

    forward(*arguments) -> tuple of new tensors and backward(*arguments) -> list of new tensors do the work; allocate_forward and
    allocate_backward make their outputs' metadata alone (the fake implementations). An output that is not wanted is None, which
    torch.library has as an empty tensor. save(ctx, arguments, outputs) keeps what the gradient needs; gradient(ctx, backward,
    *grads) returns one gradient per argument. Where the schema's first argument is a Tensor[], the gradient's first element is a
    list. Other Tensor[] arguments have no gradient, which is said by no_gradients.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        backward_schema: str,
        *,
        forward: Callable[..., Outputs],
        backward: Callable[..., list[Tensor]],
        allocate_forward: Callable[..., Outputs],
        allocate_backward: Callable[..., list[Tensor]],
        save: Callable[[Any, tuple[Any, ...], Outputs], None],
        gradient: Callable[..., tuple[Any, ...]],
    ):
        self._forward = forward
        self._takes_list = schema.startswith("(Tensor[]")
        register(name, schema, _none_is_empty(forward), _none_is_empty(allocate_forward))
        register(f"{name}_backward", backward_schema, backward, allocate_backward)
        self._operator = getattr(torch.ops.attnres, name)
        backward_operator = getattr(torch.ops.attnres, f"{name}_backward")
        torch.library.register_autograd(
            f"attnres::{name}",
            lambda ctx, *grads: gradient(ctx, backward_operator, *grads),
            setup_context=lambda ctx, inputs, output: save(ctx, inputs, output),
            lib=_library,
        )
        self._function = self._autograd_function(forward, backward, save, gradient)

    def __call__(self, differentiable: bool, *arguments: Any) -> tuple[Any, ...]:
        """The forward's outputs, part of the autograd graph when `differentiable` (see needs_grad)."""
        if torch.compiler.is_compiling():
            return self._operator(*arguments)
        if differentiable:
            return self._function.apply(*self._flat(arguments))
        return self._forward(*arguments)

    def _flat(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Tensors of a list as arguments of their own: autograd.Function does not look into lists."""
        return (len(arguments[0]), *arguments[0], *arguments[1:]) if self._takes_list else arguments

    def _nested(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        return (list(flat[1 : 1 + flat[0]]), *flat[1 + flat[0] :]) if self._takes_list else flat

    def _autograd_function(
        self,
        forward: Callable[..., Outputs],
        backward: Callable[..., list[Tensor]],
        save: Callable[[Any, tuple[Any, ...], Outputs], None],
        gradient: Callable[..., tuple[Any, ...]],
    ) -> Any:
        nested, takes_list = self._nested, self._takes_list

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *flat: Any) -> Outputs:
                arguments = nested(flat)
                outputs = forward(*arguments)
                save(ctx, arguments, outputs)
                return outputs

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
                found = gradient(ctx, backward, *grads)
                if takes_list:
                    found = (None, *found[0], *found[1:])
                return tuple(None if isinstance(part, list) else part for part in found)

        return Eager


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


def empty_as(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of its shape and device: new_empty in half the host time."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def no_gradients(tensors: list[Tensor] | None) -> list[None] | None:
    return None if tensors is None else [None] * len(tensors)


def needs_grad(*tensors: Tensor | ScaledTensor | None) -> bool:
    """Whether autograd will want a gradient of any of them."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() of a generator would take twice as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False
