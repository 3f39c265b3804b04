"""Which backend runs a call: `ATTNRES_BACKEND`, `use_backend(...)`, `backend=`; the narrowest wins.

`auto` takes cute where the device, operation, dtype and shape qualify, else triton on a GPU, else torch. A backend asked for by
name is never replaced: a call it cannot take raises BackendError with the reason. The one exception is stated by `explain`: where
a backend has no backward kernel yet, the gradient of its forward runs on triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from attnres import triton_interpreter

BACKENDS = ("cute", "triton", "torch")  # in the order in which `auto` asks them
CHOICES = ("auto", *BACKENDS)
ENVIRONMENT_VARIABLE = "ATTNRES_BACKEND"
MAX_SOURCES = 64

# Stands for the choice in a compiled graph: use_backend and the environment are read each time the graph runs.
_AT_RUN_TIME = "at run time"

in_use: ContextVar[str | None] = ContextVar("attnres_backend", default=None)


class BackendError(RuntimeError):
    """The backend that was asked for cannot take this call; the message says why."""


@dataclass(frozen=True)
class Spec:
    """What a backend needs to know to say whether it takes a launch."""

    op: str  # a launcher's name: "mix_fwd", "phase1_bwd", ...
    device: torch.device
    dtype: torch.dtype  # of the storage: sources, partial sums, outputs
    hidden_size: int
    num_sources: int = 1
    num_queries: int = 1
    byte_alignment: int = 16  # largest power of two <= 16 that divides every storage tensor's address and row stride
    features: tuple[str, ...] = ()  # beyond one dtype of all storage tensors: dtypes.features


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, calls without `backend=` use this backend ("auto", "cute", "triton" or "torch"), in this thread or task."""
    token = in_use.set(_known(name, "use_backend(...)"))
    try:
        yield
    finally:
        in_use.reset(token)


def requested(backend: str | None) -> tuple[str, str]:
    """The backend asked for and who asks: the argument, else use_backend, else the environment, else the default."""
    if backend is not None:
        return _known(backend, "backend="), f"backend={backend!r}"
    if torch.compiler.is_compiling():
        return _AT_RUN_TIME, ""
    used = in_use.get()
    if used is not None:
        return used, f"use_backend({used!r})"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if value:
        return _known(value, ENVIRONMENT_VARIABLE), f"{ENVIRONMENT_VARIABLE}={value}"
    return "auto", "default"


def choose(spec: Spec, request: tuple[str, str]) -> str:
    """The backend that runs a launch. Raises BackendError where a named backend refuses it."""
    name, origin = requested(None) if request[0] == _AT_RUN_TIME else request
    if name == "auto":
        return next(candidate for candidate in BACKENDS if _auto_refusal(candidate, spec) is None)
    reason = refusal(name, spec)
    if reason is not None:
        raise BackendError(f"{origin} cannot take {spec.op}: {reason}")
    return name


def choose_backward(spec: Spec, name: str) -> str:
    """The backend of a gradient whose forward was asked of `name`: the same, or triton where that has no kernel for it."""
    if name == _AT_RUN_TIME:
        name, _ = requested(None)
    if name == "auto":
        return choose(spec, (name, "default"))
    if refusal(name, spec) is None:
        return name
    reason = refusal("triton", spec)
    if reason is not None:
        raise BackendError(f"{spec.op} after a forward on {name}: {refusal(name, spec)}; triton: {reason}")
    return "triton"


@functools.lru_cache(maxsize=4096)
def refusal(name: str, spec: Spec) -> str | None:
    """Why the backend cannot take this launch, or None."""
    reason = unavailable(name, spec.device)
    if reason is not None or name == "torch":
        return reason
    config = importlib.import_module(f"{_TREES[name]}.config")
    return config.refusal(
        op=spec.op,
        dtype=spec.dtype,
        hidden_size=spec.hidden_size,
        num_sources=spec.num_sources,
        num_queries=spec.num_queries,
        byte_alignment=spec.byte_alignment,
        features=spec.features,
    )


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend with None where it is available on the device (default: the GPU if there is one), else the reason."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: unavailable(name, torch.device(device)) for name in BACKENDS}


@functools.lru_cache(maxsize=64)
def unavailable(name: str, device: torch.device) -> str | None:
    """Why the backend cannot run on the device at all, or None."""
    if name == "torch":
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the tensors are on {device.type}, and Triton kernels need a GPU (or its interpreter: TRITON_INTERPRET=1)"
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the CuTe kernels need a CUDA device of compute capability 9.0 (Hopper)"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and the CuTe "
            "kernels are built for 9.0 (Hopper)"
        )
    missing = [package for package, module in _CUTE_PACKAGES.items() if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def launcher(op: str, backend: str) -> Callable[..., None]:
    """The backend's function for an operation; the module is imported when it is first wanted."""
    return _import_launcher(op, backend)


def launch(op: str, backend: str, device: torch.device, *arguments: Any, **precision: Any) -> Callable[..., None]:
    """Runs a launcher with the tensors' device current, and returns it.

    precision: scales and seed; those that are None are not passed.
    """
    run = launcher(op, backend)
    if precision:
        precision = {name: value for name, value in precision.items() if value is not None}
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        run(*arguments, **precision)
    else:
        with torch.cuda.device(device):
            run(*arguments, **precision)
    return run


_TREES = {"triton": "triton_ref", "cute": "cute_kernels"}
_CUTE_PACKAGES = {"nvidia-cutlass-dsl": "nvidia_cutlass_dsl", "apache-tvm-ffi": "tvm_ffi"}


@functools.cache
def _import_launcher(op: str, backend: str) -> Callable[..., None]:
    if backend == "triton":
        triton_interpreter.patch_if_interpreting()
    module = "attnres.torch_ref" if backend == "torch" else f"{_TREES[backend]}.{op}"
    return getattr(importlib.import_module(module), op)


def _auto_refusal(name: str, spec: Spec) -> str | None:
    if name == "triton" and spec.device.type != "cuda":
        return "auto keeps Triton's interpreter, a debugging aid, for explicit requests"
    return refusal(name, spec)


def _known(name: str, origin: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{origin}: unknown backend {name!r}; allowed are {', '.join(CHOICES)}")
    return name
