"""Calls that repeat: what was found of a call holds for the next one with the same metadata.

The checks of a call, its options and its backend follow from the metadata of its tensors (type, shape, strides, dtype, device,
requires_grad), its other arguments, and the settings in force. One comparison in C++ recognises a call like an earlier one, which
then is not checked again; and where its kernels take nothing from the call but addresses (cute_kernels.replay), only these are
read before they are launched. A call that differs in anything, or fails a check, goes the long way.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from attnres import backend as backends
from attnres import checked_mode

TensorGuards: Any = None  # without it every call goes the long way
with contextlib.suppress(ImportError, TypeError):  # it is not public: another version may not have it, or not like this
    from torch._C._dynamo import guards

    _guards: Any = functools.partial(guards.TensorGuards, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    if _guards(torch.empty(1)).check(torch.empty(1)):
        TensorGuards = _guards

MAX_SIGNATURES = 1024

# What os.environ looks into: a name that is not set costs .7 us there.
_ENVIRONMENT: Any = os.environ._data  # type: ignore[attr-defined]
_BACKEND, _CHECK = map(os.environ.encodekey, (backends.ENVIRONMENT_VARIABLE, checked_mode.ENVIRONMENT_VARIABLE))

_PLAIN = {Tensor, torch.nn.Parameter}

Key = tuple[Any, ...]


class Call:
    """What is known of a call, and of those like it."""

    __slots__ = ("_launch", "_replay", "differentiable", "options", "repeats")

    def __init__(self, differentiable: bool, options: Any):
        self.differentiable, self.options = differentiable, options
        self.repeats = False
        self._launch: tuple[str, str, Callable[..., None]] | None = None
        self._replay: Callable[[list[int]], bool] | None = None

    def replay(self, tensors: Sequence[Tensor | None]) -> bool:
        """Launches as the call that was recorded did; False where this call has to go the long way.

        tensors: as `record` had them.
        """
        if self._replay is None or self._launch is None:
            return False
        op, backend, launcher = self._launch
        if backends.launcher(op, backend) is not launcher:  # someone watches or replaces launchers
            return False
        return self._replay([tensor.data_ptr() for tensor in tensors if tensor is not None])

    def record(
        self,
        op: str,
        backend: str,
        launcher: Callable[..., None],
        tensors: Sequence[Tensor | None],
        arguments: tuple[Any, ...],
    ) -> None:
        """After a launch. tensors: those of the call, where the launcher's arguments have them or views of them, in this order.

        The first call of a signature is not recorded: it may be the only one.
        """
        if self._launch is not None or not self.repeats:
            return
        self._launch = op, backend, launcher
        if backend == "cute":
            from cute_kernels.replay import record

            self._replay = record(launcher, arguments, [tensor for tensor in tensors if tensor is not None])


def recall(tensors: Sequence[Any], key: Key | None) -> Call | None:
    """What is known of a call, from an earlier one that its checks let pass.

    key: the operation and the arguments that are no tensors; None for a call that is unlike all others.
    """
    if key is None or TensorGuards is None or torch.compiler.is_compiling():
        return None
    try:
        slot = _slot_of(tensors, key)
    except (AttributeError, TypeError):  # not a tensor, or cannot be hashed: the checks will say so
        return None
    known, call = slot.last
    if known is None or not known.check(*_present(tensors)):
        return None
    call.repeats = True
    return call


def remember(call: Call, tensors: Sequence[Any], key: Key | None) -> Call:
    """Of a call that all checks let pass. One of scaled tensors or subclasses is not remembered."""
    if key is None or TensorGuards is None or torch.compiler.is_compiling():
        return call
    present = _present(tensors)
    if {*map(type, present)} <= _PLAIN and not any(map(is_functorch_wrapped_tensor, present)):
        _slot_of(tensors, key).last = TensorGuards(*present), call
    return call


class _Slot:
    """The guards of the last call with one key, which take no call that has a tensor twice, and what is known of it."""

    last: Any = (None, None)


@functools.lru_cache(maxsize=MAX_SIGNATURES, typed=True)  # typed: True is no number
def _slot(*key: Any) -> _Slot:
    return _Slot()


def _slot_of(tensors: Sequence[Any], key: Key) -> _Slot:
    first, look = tensors[0], _ENVIRONMENT.get
    settings = (backends.in_use.get(), look(_BACKEND), checked_mode.in_use.get(), look(_CHECK), torch.is_grad_enabled())
    absent = tuple([tensor is None for tensor in tensors])
    return _slot(first.shape, first.device, absent, *settings, *key)


def _present(tensors: Sequence[Any]) -> list[Any]:
    return [tensor for tensor in tensors if tensor is not None]
