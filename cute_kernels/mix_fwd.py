"""Direct mix, forward: out = sum_i softmax_i(scale * rstd_i * <query * key_weight, v_i>) v_i, optionally RMS-normalised.

Also builds and launches the row kernel (device/mix.py) for serve_step and phase2_fwd. Imports the DSL only to compile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from cute_kernels.compile import cached_kernel, compile_kernel
from cute_kernels.config import ALIGNMENT, DTYPES, PARAMETER_DTYPES, SCALED_FP16
from cute_kernels.config_rows import Operands, RegisterTile, RowConfig, row_config, token_class


@cached_kernel
def build(config: RowConfig) -> Any:
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream

    from cute_kernels.device.mix_registers import RegisterKernel
    from cute_kernels.device.mix_ring import RingKernel

    rows = [Int64(0)] * (config.rows_per_token + config.num_scales)
    operands = Operands(*[Int64(0)] * len(Operands._fields))
    numbers = (Int32(1), Float32(1.0), Float32(1.0), Float32(1.0), Int32(1))
    kernel = RegisterKernel if isinstance(config.tile, RegisterTile) else RingKernel
    return compile_kernel(kernel(config), rows, rows, operands, *numbers, make_fake_stream())


@functools.cache
def kernel_for(*shape: Any, **flags: int) -> Any:
    """The compiled kernel for `row_config(*shape, **flags)`."""
    return build(row_config(*shape, **flags))


@functools.cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_stream(device: torch.device) -> int:
    # What torch.cuda.current_stream(device).cuda_stream is, without the object around it: a microsecond of every call.
    return torch._C._cuda_getCurrentRawStream(device.index)


def launch(
    kernel: Any,
    rows: list[int],  # addresses of token 0 of [T, D] each: (merged row), sources, (delta); then scales [T]
    strides: list[int],  # elements from one token to the next
    operands: Operands,
    out: torch.Tensor,
    eps: float,
    output_eps: float,
    scale: float,
) -> None:
    kernel(
        rows,
        strides,
        operands,
        out.shape[0],
        eps,
        output_eps,
        scale,
        sm_count(out.device),
        current_stream(out.device),
    )


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dtype_of(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def format_of(row: torch.Tensor, scale: Any) -> str:
    return DTYPES[row.dtype] if scale is None else SCALED_FP16


def formats_beside(out: torch.Tensor, formats: list[str], sum: str | None = None) -> dict[str, Any]:
    """`row_config`'s formats of a token's rows and of the stored sum: those of out's dtype alone go without saying."""
    own = {PARAMETER_DTYPES[out.dtype]}
    if own.issuperset(formats) and sum in (None, *own):
        return {}
    return {"formats": tuple(formats), "sum": sum or ""}


def aligned(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter vector that 16-byte loads can read: itself, or a copy of a view that starts in between."""
    return parameter.clone() if parameter is not None and parameter.data_ptr() % ALIGNMENT else parameter


def mix_fwd(
    sources: list[torch.Tensor],  # L of [T, D]
    query: torch.Tensor,  # [D]
    key_weight: torch.Tensor | None,  # [D]
    output_weight: torch.Tensor | None,  # [D]
    eps: float,
    output_eps: float,
    scale: float,
    out: torch.Tensor,  # [T, D]
    mixed: torch.Tensor | None,  # [T, D] fp32: the mix before the output norm
    logits: torch.Tensor | None,  # [L, T] fp32
    rstd: torch.Tensor | None,  # [L, T] fp32
    lse: torch.Tensor | None,  # [T] fp32
    weights: torch.Tensor | None,  # [L, T] fp32
    *,
    source_scales: list[torch.Tensor] | None = None,  # L of [T] fp32: sources are scaled fp16
) -> None:
    """Fills out and the statistics that are wanted.

    Sources are bf16 or fp16, those with scales fp16, out and parameters bf16, fp16 or fp32; rows start at multiples of 16 bytes.
    logits, rstd and lse are what the backward needs. Moves (L + 1) T D elements. Deterministic.
    """
    query, key_weight, output_weight = aligned(query), aligned(key_weight), aligned(output_weight)
    kernel = kernel_for(
        "mix_fwd",
        out.dtype,
        out.shape[1],
        len(sources),
        query.dtype,
        dtype_of(key_weight),
        dtype_of(output_weight),
        tokens=token_class(out.shape[0]),
        mixed=mixed is not None,
        logits=logits is not None,
        rstd=rstd is not None,
        lse=lse is not None,
        weights=weights is not None,
        **formats_beside(out, [format_of(sources[0], source_scales)] * len(sources)),
    )
    operands = Operands(
        query=query.data_ptr(),
        key_weight=address(key_weight),
        output_weight=address(output_weight),
        out=out.data_ptr(),
        mixed=address(mixed),
        logits=address(logits),
        rstd=address(rstd),
        lse=address(lse),
        weights=address(weights),
    )
    given = [*sources, *(source_scales or ())]
    rows, strides = [tensor.data_ptr() for tensor in given], [tensor.stride(0) for tensor in given]
    launch(kernel, rows, strides, operands, out, eps, output_eps, scale)
