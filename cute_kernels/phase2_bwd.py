"""Phase 2, backward: the gradients of the merge, and with d_new_partial those that reach the partial sum past the merge."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cute_kernels.compile import cached_kernel, compile_kernel
from cute_kernels.config_phase2_bwd import Phase2BwdConfig, Phase2BwdOperands, phase2_bwd_config
from cute_kernels.mix_fwd import address, aligned, current_stream, dtype_of, sm_count
from cute_kernels.query_grad import vector_grad


@cached_kernel
def build(config: Phase2BwdConfig) -> Any:
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream

    from cute_kernels.device.phase2_bwd import Phase2BwdKernel

    operands = Phase2BwdOperands(*[Int64(0)] * len(Phase2BwdOperands._fields))
    return compile_kernel(
        Phase2BwdKernel(config), operands, Int32(1), Float32(1.0), Float32(1.0), Int32(1), make_fake_stream()
    )


@functools.cache
def kernel_for(*shape: Any, **flags: Any) -> Any:
    """The compiled kernel for `phase2_bwd_config(*shape, **flags)`."""
    return build(phase2_bwd_config(*shape, **flags))


def phase2_bwd(
    d_out: torch.Tensor,  # [T, D]
    d_new_partial: torch.Tensor | None,  # [T, D]
    partial: torch.Tensor,  # [T, D]
    query: torch.Tensor,  # [D]
    key_weight: torch.Tensor | None,  # [D]
    inter_out: torch.Tensor,  # [T, D]
    inter_lse: torch.Tensor,  # [T] fp32
    output_weight: torch.Tensor | None,  # [D]
    eps: float,
    output_eps: float,
    scale: float,
    logit: torch.Tensor,  # [T] fp32
    rstd: torch.Tensor,  # [T] fp32
    d_partial: torch.Tensor,  # [T, D]
    d_inter_out: torch.Tensor,  # [T, D]
    d_inter_lse: torch.Tensor,  # [T] fp32
    d_query: torch.Tensor,  # [D]
    d_key_weight: torch.Tensor | None,  # [D]
    d_output_weight: torch.Tensor | None,  # [D]
    *,
    partial_scale: torch.Tensor | None = None,  # [T] fp32
    inter_scale: torch.Tensor | None = None,  # [T] fp32
) -> None:
    """Fills d_partial, d_inter_out, d_inter_lse, d_query, and d_key_weight, d_output_weight if given.

    eps went into rstd in the forward. d_new_partial may be d_partial itself: a row is read before it is written. Gradients have
    one dtype, bf16 or fp16; partial and inter_out are bf16 or fp16, each on its own, fp16 where they have scales; parameters are
    bf16, fp16 or fp32; rows start at multiples of 16 bytes. Moves 5 T D elements, 6 T D with d_new_partial.
    Deterministic.
    """
    tokens, hidden_size = d_out.shape
    kernel = kernel_for(
        d_out.dtype,
        hidden_size,
        query.dtype,
        dtype_of(key_weight),
        dtype_of(output_weight),
        partial=partial.dtype,
        inter_out=inter_out.dtype,
        partial_scaled=partial_scale is not None,
        inter_scaled=inter_scale is not None,
        new_partial=d_new_partial is not None,
    )
    grid = min(tokens, sm_count(d_out.device))
    rows = 1 if d_output_weight is None else 2
    sums = torch.empty(grid, rows, hidden_size, dtype=torch.float32, device=d_out.device)
    keys = [aligned(query), aligned(key_weight), aligned(output_weight)]
    operands = Phase2BwdOperands(
        d_out=d_out.data_ptr(),
        partial=partial.data_ptr(),
        partial_stride=partial.stride(0),
        partial_scale=address(partial_scale),
        partial_scale_stride=0 if partial_scale is None else partial_scale.stride(0),
        inter_out=inter_out.data_ptr(),
        inter_out_stride=inter_out.stride(0),
        inter_scale=address(inter_scale),
        inter_scale_stride=0 if inter_scale is None else inter_scale.stride(0),
        d_new_partial=address(d_new_partial),
        d_new_partial_stride=0 if d_new_partial is None else d_new_partial.stride(0),
        query=address(keys[0]),
        key_weight=address(keys[1]),
        output_weight=address(keys[2]),
        logit=logit.data_ptr(),
        rstd=rstd.data_ptr(),
        inter_lse=inter_lse.data_ptr(),
        d_partial=d_partial.data_ptr(),
        d_inter_out=d_inter_out.data_ptr(),
        d_inter_lse=d_inter_lse.data_ptr(),
        sums=sums.data_ptr(),
    )
    kernel(operands, tokens, output_eps, scale, grid, current_stream(d_out.device))
    vector_grad(sums if rows == 2 else sums[:, 0], query, key_weight, d_query, d_key_weight, d_output_weight)
