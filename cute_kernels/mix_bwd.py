"""Direct mix, backward: gradients of the sources, of the query and of both weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from cute_kernels.compile import cached_kernel, compile_kernel
from cute_kernels.config_mix_bwd import BackwardOperands, MixBwdConfig, mix_bwd_config
from cute_kernels.mix_fwd import address, aligned, current_stream, dtype_of, sm_count
from cute_kernels.query_grad import query_grad


@cached_kernel
def build(config: MixBwdConfig) -> Any:
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream

    from cute_kernels.device.mix_bwd import MixBwdKernel

    rows, gradients = [Int64(0)] * config.rows_per_token, [Int64(0)] * config.num_sources
    scales = gradients if config.scaled else []
    operands = BackwardOperands(*[Int64(0)] * 6, gradients, gradients, scales, scales, Int64(0))
    numbers = (Int32(1), Float32(1.0), Float32(1.0), Int32(1))
    return compile_kernel(MixBwdKernel(config), rows, rows, operands, *numbers, make_fake_stream())


@functools.cache
def kernel_for(*shape: Any) -> tuple[Any, int]:
    """The compiled kernel for `mix_bwd_config(*shape)`, and the CTAs of its clusters."""
    config = mix_bwd_config(*shape)
    return build(config), config.cluster


def mix_bwd(
    d_out: torch.Tensor,  # [T, D]
    sources: list[torch.Tensor],  # L of [T, D]
    query: torch.Tensor,  # [D]
    key_weight: torch.Tensor | None,  # [D]
    output_weight: torch.Tensor | None,  # [D]
    eps: float,
    output_eps: float,
    scale: float,
    mixed: torch.Tensor | None,
    logits: torch.Tensor,  # [L, T] fp32
    rstd: torch.Tensor,  # [L, T] fp32
    lse: torch.Tensor,  # [T] fp32
    d_sources: list[torch.Tensor],  # L of [T, D]
    d_query: torch.Tensor,  # [D]
    d_key_weight: torch.Tensor | None,  # [D]
    d_output_weight: torch.Tensor | None,  # [D], wanted exactly when output_weight is given
    *,
    source_scales: Sequence[torch.Tensor] | None = None,  # L of [T] fp32
) -> None:
    """Fills d_sources, d_query, d_key_weight and d_output_weight.

    d_out, d_sources and sources are all bf16 or all fp16; sources with scales are fp16 beside either. Parameters are bf16, fp16 or
    fp32; rows start at multiples of 16 bytes. Moves (2 L + 1) T D elements: `mixed` is not read, because the mix is made again from
    rows that are in shared memory anyway. Deterministic.
    """
    tokens, hidden_size = d_out.shape
    query, key_weight, output_weight = aligned(query), aligned(key_weight), aligned(output_weight)
    kernel, cluster = kernel_for(
        d_out.dtype,
        hidden_size,
        len(sources),
        query.dtype,
        dtype_of(key_weight),
        dtype_of(output_weight),
        source_scales is not None,
    )
    clusters = min(tokens, sm_count(d_out.device) // cluster)
    rows_of_sums = 1 if output_weight is None else 2
    sums = torch.empty(clusters, rows_of_sums, hidden_size, dtype=torch.float32, device=d_out.device)
    rows = [d_out, *sources]
    operands = BackwardOperands(
        query=query.data_ptr(),
        key_weight=address(key_weight),
        output_weight=address(output_weight),
        logits=logits.data_ptr(),
        rstd=rstd.data_ptr(),
        lse=lse.data_ptr(),
        d_sources=[d_source.data_ptr() for d_source in d_sources],
        d_strides=[d_source.stride(0) for d_source in d_sources],
        scales=[row_scale.data_ptr() for row_scale in source_scales or ()],
        scale_strides=[row_scale.stride(0) for row_scale in source_scales or ()],
        sums=sums.data_ptr(),
    )
    kernel(
        [row.data_ptr() for row in rows],
        [row.stride(0) for row in rows],
        operands,
        tokens,
        output_eps,
        scale,
        clusters * cluster,
        current_stream(d_out.device),
    )
    query_grad(
        sums,
        query.unsqueeze(0),
        None if key_weight is None else key_weight.unsqueeze(0),
        d_query.unsqueeze(0),
        None if d_key_weight is None else d_key_weight.unsqueeze(0),
        d_output_weight,
    )
