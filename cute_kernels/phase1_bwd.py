"""Phase 1, backward: gradients of S queries' mixes of the same N sources."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from cute_kernels.clusters import cluster_count
from cute_kernels.compile import cached_kernel, compile_kernel
from cute_kernels.config import PARAMETER_DTYPES
from cute_kernels.config_phase1_bwd import Phase1BwdConfig, Statistics, phase1_bwd_config
from cute_kernels.mix_fwd import address, current_stream, dtype_of
from cute_kernels.phase1_fwd import aligned
from cute_kernels.query_grad import query_grad


@cached_kernel
def build(config: Phase1BwdConfig) -> Any:
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream

    from cute_kernels.device.phase1_bwd import Phase1BwdKernel

    rows, zero = [Int64(0)] * config.num_sources, Int64(0)
    scales = rows if config.scaled else []
    return compile_kernel(
        Phase1BwdKernel(config),
        zero,
        rows,
        rows,
        *[zero] * 4,
        Statistics(*[zero] * 4, scales, scales, [zero] * config.stochastic),
        rows,
        rows,
        zero,
        Int32(1),
        Float32(1.0),
        Int32(1),
        make_fake_stream(),
    )


@functools.cache
def kernel_for(
    device: torch.device,
    dtype: torch.dtype,
    query: torch.dtype,
    key_weight: torch.dtype | None,
    hidden_size: int,
    num_sources: int,
    num_queries: int,
    d_lse: bool,
    accumulate: bool,
    scaled: bool,
    stochastic: bool,
) -> tuple[Any, int, int]:
    """The kernel compiled for the launch, the CTAs of its clusters, and how many clusters the device holds."""
    config = phase1_bwd_config(
        dtype=PARAMETER_DTYPES[dtype],
        query=PARAMETER_DTYPES[query],
        key_weight=None if key_weight is None else PARAMETER_DTYPES[key_weight],
        hidden_size=hidden_size,
        num_sources=num_sources,
        num_queries=num_queries,
        d_lse=d_lse,
        accumulate=accumulate,
        scaled=scaled,
        stochastic=stochastic,
    )
    if config is None:
        raise ValueError(f"no tile for hidden size {hidden_size}, {num_sources} sources, {num_queries} queries")
    cluster = config.tile.cluster
    return build(config), cluster, cluster_count(cluster, config.threads, config.shared_bytes, device)


def phase1_bwd(
    d_out: torch.Tensor,  # [S, T, D]
    d_lse: torch.Tensor | None,  # [S, T] fp32
    sources: list[torch.Tensor],  # N of [T, D]
    queries: torch.Tensor,  # [S, D]
    key_weights: torch.Tensor | None,  # [S, D]
    eps: float,
    scale: float,
    lse: torch.Tensor,  # [S, T] fp32
    logits: torch.Tensor,  # [S, N, T] fp32
    rstd: torch.Tensor,  # [N, T] fp32
    d_sources: list[torch.Tensor],  # N of [T, D]
    accumulate: bool,
    d_queries: torch.Tensor,  # [S, D]
    d_key_weights: torch.Tensor | None,  # [S, D]
    *,
    source_scales: Sequence[torch.Tensor] | None = None,  # N of [T] fp32
    seed: int | None = None,
) -> None:
    """Fill (or, with accumulate, add to) d_sources; fill d_queries and, if given, d_key_weights. eps went into rstd in the
    forward. d_out, d_sources and sources are all bf16 or all fp16; sources with scales are fp16 beside either. A seed rounds
    d_sources stochastically.

    Moves (2N + S) T D elements, N T D more when adding. Deterministic.
    """
    queries, key_weights = aligned(queries), None if key_weights is None else aligned(key_weights)
    num_queries, tokens, hidden_size = d_out.shape
    kernel, cluster, clusters = kernel_for(
        d_out.device,
        d_out.dtype,
        queries.dtype,
        dtype_of(key_weights),
        hidden_size,
        len(sources),
        num_queries,
        d_lse is not None,
        accumulate,
        source_scales is not None,
        seed is not None,
    )
    clusters = min(tokens, clusters)
    du = torch.empty(clusters, num_queries, hidden_size, dtype=torch.float32, device=d_out.device)
    kernel(
        d_out.data_ptr(),
        [source.data_ptr() for source in sources],
        [source.stride(0) for source in sources],
        queries.data_ptr(),
        queries.stride(0),
        address(key_weights),
        0 if key_weights is None else key_weights.stride(0),
        Statistics(
            lse=lse.data_ptr(),
            logits=logits.data_ptr(),
            rstd=rstd.data_ptr(),
            d_lse=address(d_lse),
            scales=[row_scale.data_ptr() for row_scale in source_scales or ()],
            scale_strides=[row_scale.stride(0) for row_scale in source_scales or ()],
            seeds=[] if seed is None else [seed],
        ),
        [d_source.data_ptr() for d_source in d_sources],
        [d_source.stride(0) for d_source in d_sources],
        du.data_ptr(),
        tokens,
        scale,
        clusters * cluster,
        current_stream(d_out.device),
    )
    query_grad(du, queries, key_weights, d_queries, d_key_weights)
