"""Launching again what a launcher has launched, for other tensors of the same metadata.

A launcher finds kernels, strides and numbers from its tensors' metadata, and asks a tensor for its address last. So it is run once
on placeholders, whose addresses are beyond all others, while the calls of kernels are noted in place of made: every address that a
kernel would be given then shows which tensor it is of, and how far into it. From then on a launch is those calls with addresses
filled in. What else a launcher looks at stays as it was: all addresses are multiples of 16 bytes, the stream is the same, and no
CUDA graph is captured; otherwise nothing is recorded or repeated. Neither is the launch of one that makes a tensor (a copy of a
parameter, say), whose address would not be there the next time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cute_kernels.compile import noted_calls
from cute_kernels.config import ALIGNMENT

_SPAN = 1 << 64  # the placeholder of tensor i is at (i + 1) _SPAN; what is nearer to 0 than to the first is no address


class Placeholder:
    """A tensor's metadata, at another address."""

    def __init__(self, tensor: torch.Tensor, address: int):
        self._tensor, self._address = tensor, address

    def data_ptr(self) -> int:
        return self._address

    def __getitem__(self, index: int) -> Placeholder:
        return Placeholder(self._tensor[index], self._address + index * self.stride(0) * self.element_size())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


class _MakesATensor(Exception):
    pass


class _NoNewTensors(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.select.int:  # a placeholder's row
            raise _MakesATensor
        return func(*args, **(kwargs or {}))


class KernelCall(NamedTuple):
    function: Callable[..., Any]
    arguments: list[Any]  # without the stream, which comes last
    picks: list[tuple[int, Callable[[list[int]], Any]]]  # positions of arguments with addresses, and these from a table


def record(
    launcher: Callable[..., None], arguments: Sequence[Any], tensors: Sequence[torch.Tensor]
) -> Callable[[list[int]], bool] | None:
    """What launches again, given the addresses of the tensors in order; it is False where it must not.

    arguments: the launcher's, which are the tensors or views of them from their first element on. None where they are not, and
    where the launch cannot be repeated.
    """
    given = [tensor for argument in arguments for tensor in (argument if isinstance(argument, list) else [argument])]
    addresses = [tensor.data_ptr() for tensor in given if isinstance(tensor, torch.Tensor)]
    if addresses != [tensor.data_ptr() for tensor in tensors]:
        return None
    replay = _Replay(tensors[0].device, len(addresses))
    if not replay.may_repeat(addresses):
        return None
    count = 0

    def placed(argument: Any) -> Any:
        nonlocal count
        if isinstance(argument, list):
            return [placed(part) for part in argument]
        if not isinstance(argument, torch.Tensor):
            return argument
        count += 1
        return Placeholder(argument, count * _SPAN)

    try:
        with noted_calls() as calls, _NoNewTensors():
            launcher(*map(placed, arguments))
    except _MakesATensor:
        return None
    for function, arguments in calls:
        replay.add(function, *arguments)
    return replay


class _Replay:
    def __init__(self, device: torch.device, count: int):
        self._device = device.index
        self._stream = torch._C._cuda_getCurrentRawStream(device.index)
        self._count = count
        # What the kernels get besides the addresses themselves: index of an address (-1: of 0) and bytes from there.
        self._derived: list[tuple[int, int]] = []
        self._calls: list[KernelCall] = []

    def may_repeat(self, addresses: list[int]) -> bool:
        return (
            _or(addresses) % ALIGNMENT == 0
            and torch.cuda.current_device() == self._device
            and torch._C._cuda_getCurrentRawStream(self._device) == self._stream
            and not torch.cuda.is_current_stream_capturing()
        )

    def __call__(self, addresses: list[int]) -> bool:
        if not self.may_repeat(addresses):
            return False
        addresses.append(0)
        addresses += [addresses[index] + offset for index, offset in self._derived]
        for function, arguments, picks in self._calls:
            filled = arguments.copy()
            for position, pick in picks:
                filled[position] = pick(addresses)
            function(*filled, self._stream)
        return True

    def add(self, function: Callable[..., Any], *arguments: Any) -> None:
        """A call as it was noted; its last argument is the stream."""
        picks: list[tuple[int, Callable[[list[int]], Any]]] = []
        for position, argument in enumerate(arguments[:-1]):
            if isinstance(argument, int) and _owner(argument) >= 0:
                picks.append((position, operator.itemgetter(self._index(argument))))
            elif isinstance(argument, (list, tuple)) and any(_owner(value) >= 0 for value in argument):
                indices = [self._index(value) for value in argument]
                picks.append((position, operator.itemgetter(*indices) if len(indices) > 1 else _only(*indices)))
        self._calls.append(KernelCall(function, list(arguments[:-1]), picks))

    def _index(self, value: int) -> int:
        """Where the value will be among the addresses, 0 and what is derived from them."""
        index = _owner(value)
        offset = value - (index + 1) * _SPAN
        if offset == 0:
            return index if index >= 0 else self._count
        if (index, offset) not in self._derived:
            self._derived.append((index, offset))
        return self._count + 1 + self._derived.index((index, offset))


def _owner(value: int) -> int:
    """The tensor at whose placeholder, or near it, the value points; -1 for a number."""
    return int((value + _SPAN // 2) // _SPAN) - 1


def _only(index: int) -> Callable[[list[int]], list[int]]:
    return lambda addresses: [addresses[index]]


_or = functools.partial(functools.reduce, operator.or_)
