"""Running a network's layers once without and once with gradient: the same call twice, and its gradient by hand.

What `torch.utils.checkpoint` does around a function, for a chain of layers whose inputs are made by kernels in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from attnres import contracts

Layer = Callable[[Tensor], Tensor]


def call_layer(layer: Layer, index: int, hidden: Tensor) -> Tensor:
    """The layer's output [..., D], checked, in the storage dtype and as one run of rows (nothing is copied where it is so)."""
    update = layer(hidden)
    contracts.check_update(index, update, hidden)
    update = update.to(hidden.dtype)
    return update if contracts.one_run(update) else update.contiguous()


class Surroundings:
    """What a layer's forward depends on besides its arguments: autocast and the generators' states."""

    def __init__(self, device: torch.device, preserve_rng_state: bool):
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in {"cpu", device.type}
        ]
        self._device, self._preserve_rng_state = device, preserve_rng_state

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """As it was. Its cache of cast weights is off: a cast made without gradient must never be found where one is wanted."""
        with contextlib.ExitStack() as stack:
            for state in self._autocast:
                stack.enter_context(torch.autocast(*state, cache_enabled=False))
            yield

    def rng_state(self) -> tuple[Tensor, ...]:
        """Of the CPU and, where the tensors are on one, of their GPU."""
        if not self._preserve_rng_state:
            return ()
        cpu = torch.get_rng_state()
        return (cpu, torch.cuda.get_rng_state(self._device)) if self._device.type == "cuda" else (cpu,)

    @contextlib.contextmanager
    def with_rng_state(self, state: tuple[Tensor, ...]) -> Iterator[None]:
        """Within it, random numbers come as they came after `state`; then as if nothing had happened."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self._preserve_rng_state):
            if state:
                torch.set_rng_state(state[0])
            if len(state) > 1:
                torch.cuda.set_rng_state(state[1], self._device)
            yield


class LayerParameters:
    """The parameters of all layers that want a gradient, each once, and which of them each layer has.

    A layer that is no Module has none. The gradients of a parameter that several layers share are added in the order in which they
    come, last layer first.
    """

    def __init__(self, layers: Sequence[Layer]):
        places: dict[Tensor, int] = {}
        self._of_layer = [
            tuple(places.setdefault(parameter, len(places)) for parameter in trainable(layer)) for layer in layers
        ]
        self.tensors = tuple(places)
        self._versions = [parameter._version for parameter in self.tensors]

    def of(self, index: int) -> list[Tensor]:
        return [self.tensors[place] for place in self._of_layer[index]]

    def add(self, gradients: list[Tensor | None], index: int, found: Sequence[Tensor | None]) -> None:
        """Adds a layer's gradients to the network's. Out of place: a gradient may be memory that the layer still uses."""
        for place, gradient in zip(self._of_layer[index], found, strict=True):
            before = gradients[place]
            gradients[place] = before if gradient is None else gradient if before is None else before + gradient

    def check_unmodified(self) -> None:
        for parameter, version in zip(self.tensors, self._versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(
                    f"a parameter of the layers ({contracts.describe(parameter)}) was modified in place after the forward, and the "
                    "backward recomputes with it; run the backward first, or use memory_saving=False"
                )


def trainable(layer: Layer) -> list[Tensor]:
    """The layer's parameters that want a gradient."""
    if not isinstance(layer, torch.nn.Module):
        return []
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


class LayerRun(NamedTuple):
    """A layer's call with gradient. The output itself is not kept: its place in the graph is enough."""

    hidden: Tensor  # [..., D], a leaf
    output: GradientEdge | None  # None: no gradient reaches the layer's input or parameters

    def gradients(self, d_update: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """d_hidden [..., D] and the parameters' gradients. Frees the graph."""
        if self.output is None:
            return torch.zeros_like(self.hidden), [None] * len(parameters)
        with _without_hooks(parameters):
            found = torch.autograd.grad([self.output], [self.hidden, *parameters], [d_update], allow_unused=True)
        d_hidden = torch.zeros_like(self.hidden) if found[0] is None else found[0].contiguous()
        return d_hidden, list(found[1:])


def run_layer(layer: Layer, index: int, hidden: Tensor, surroundings: Surroundings) -> tuple[LayerRun, Tensor]:
    """The layer's call with gradient, and its output [..., D] without."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad(), surroundings.autocast():
        update = call_layer(layer, index, leaf)
    if not update.requires_grad:
        return LayerRun(leaf, None), update
    edge = get_gradient_edge(update)
    if not isinstance(layer, torch.nn.Module):
        _refuse_hidden_leaves(edge, leaf, index)
    return LayerRun(leaf, edge), update.detach()


@contextlib.contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Tensor hooks run when the parameters' own gradients come, from the network's node; not for the parts as well."""
    suspended: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for parameter in parameters:
        hooks = parameter._backward_hooks
        if hooks:
            suspended.append((hooks, dict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in suspended:
            hooks.update(kept)


def _refuse_hidden_leaves(edge: GradientEdge, leaf: Tensor, index: int) -> None:
    """A callable that is no Module cannot say which parameters it uses, and their gradients would be lost without a word."""
    seen, waiting = set(), [edge.node]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", leaf)
        if variable is not leaf:
            raise ValueError(
                f"layers[{index}] is no torch.nn.Module and uses a tensor that requires grad ({contracts.describe(variable)}): "
                "pass a Module that has it as a parameter, or use memory_saving=False"
            )
        waiting += [following for following, _ in node.next_functions if following is not None]
