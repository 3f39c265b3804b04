"""Triton's interpreter (TRITON_INTERPRET=1), made to round float32 to bfloat16 to nearest even, as the GPU does.

Triton 3.6 to 3.9 truncate there: every bf16 store has up to one ulp of error instead of half an ulp, twice the
rounding floor.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def use_without_gpu() -> None:
    """Turns the interpreter on where there is no CUDA device. Triton decides when a kernel's module is imported: call
    before."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_if_interpreting()


def patch_if_interpreting() -> None:
    """Makes a TRITON_INTERPRET=1 run round as the GPU does."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        round_to_nearest()


def round_to_nearest() -> None:
    """Replaces the interpreter's cast from float32 to bfloat16; without Triton, or a second time, it does nothing."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    builder: Any = interpreter.InterpreterBuilder
    original = builder.cast_impl
    if getattr(original, "rounds_to_nearest", False):
        return

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == interpreter.tl.float32 and dst_type.scalar == interpreter.tl.bfloat16:
            bits = torch.as_tensor(src.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(bits, dst_type.scalar)
        return original(self, src, dst_type)

    cast_impl.rounds_to_nearest = True  # type: ignore[attr-defined]
    builder.cast_impl = builder.create_fp_trunc = builder.create_fp_ext = cast_impl
