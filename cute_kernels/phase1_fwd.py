"""Phase 1, forward: S queries mix the same N sources, out_s = sum_n softmax_n(scale * rstd_n * <u_s, v_n>) v_n."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from cute_kernels.clusters import cluster_count
from cute_kernels.compile import cached_kernel, compile_kernel
from cute_kernels.config import ALIGNMENT, DTYPES, PARAMETER_DTYPES
from cute_kernels.config_phase1 import Phase1Config, Phase1Outputs, phase1_config
from cute_kernels.mix_fwd import address, current_stream, dtype_of, mix_fwd


@cached_kernel
def build(config: Phase1Config) -> Any:
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream

    from cute_kernels.device.phase1 import Phase1Kernel

    rows = [Int64(0)] * (config.num_sources * (1 + config.scaled_sources))
    outputs = Phase1Outputs(*[Int64(0)] * len(Phase1Outputs._fields))
    numbers = (Int32(1), Float32(1.0), Float32(1.0), Int32(1))
    return compile_kernel(
        Phase1Kernel(config), rows, rows, *[Int64(0)] * 4, outputs, Int64(0), *numbers, make_fake_stream()
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
    logits: bool,
    rstd: bool,
    out: str,
    scaled_sources: bool,
    stochastic: bool,
) -> tuple[Any, Phase1Config, int]:
    """The kernel compiled for the next launch, its configuration, and how many of its clusters the device holds."""
    config = phase1_config(
        dtype=PARAMETER_DTYPES[dtype],
        query=PARAMETER_DTYPES[query],
        key_weight=None if key_weight is None else PARAMETER_DTYPES[key_weight],
        hidden_size=hidden_size,
        num_sources=num_sources,
        num_queries=num_queries,
        logits=logits,
        rstd=rstd,
        out=out,
        scaled_sources=scaled_sources,
        stochastic=stochastic,
    )
    return build(config), config, cluster_count(config.tile.cluster, config.threads, config.shared_bytes, device)


def phase1_fwd(
    sources: list[torch.Tensor],  # N of [T, D]
    queries: torch.Tensor,  # [S, D]
    key_weights: torch.Tensor | None,  # [S, D]
    eps: float,
    scale: float,
    out: torch.Tensor,  # [S, T, D]
    lse: torch.Tensor,  # [S, T] fp32
    logits: torch.Tensor | None,  # [S, N, T] fp32
    rstd: torch.Tensor | None,  # [N, T] fp32
    *,
    source_scales: Sequence[torch.Tensor] | None = None,  # N of [T] fp32
    out_scale: torch.Tensor | None = None,  # [S, T] fp32
    seed: int | None = None,
) -> None:
    """out, lse, logits = phase 1 of all queries; rstd_n = (mean(v_n^2) + eps)^(-1/2).

    Sources and out are both bf16 or both fp16. With scales, a power of two for each row, either is fp16 beside any of the
    other's dtypes; those of out are chosen here. With a seed, out is rounded stochastically. Queries and key weights are
    bf16, fp16 or fp32; rows of sources start at multiples of 16 bytes.
    Moves (N + S) T D elements, when one launch takes all queries (config_phase1). Deterministic.
    """
    num_queries, tokens, hidden_size = out.shape
    if num_queries == 1 and out_scale is None and seed is None:
        # A direct mix, which the row kernel does at up to twice the speed (N = 1, D = 4096: .51 of copy bandwidth here).
        weight, row_logits = (None if tensor is None else tensor[0] for tensor in (key_weights, logits))
        given = (sources, queries[0], weight, None, eps, eps, scale)
        mix_fwd(*given, out[0], None, row_logits, rstd, lse[0], None, source_scales=source_scales)
        return
    queries, key_weights = aligned(queries), None if key_weights is None else aligned(key_weights)
    stream = current_stream(out.device)
    counter = item_counter(out.device, stream)
    rows = [*sources, *(source_scales or ())]
    addresses, strides = [row.data_ptr() for row in rows], [row.stride(0) for row in rows]
    out_format = DTYPES[out.dtype] if out_scale is None else "fp16_scaled"
    first = 0
    while first < num_queries:
        # The source statistics are the same for every part of the queries.
        wanted_rstd = rstd if first == 0 else None
        kernel, config, clusters = kernel_for(
            out.device,
            sources[0].dtype,
            queries.dtype,
            dtype_of(key_weights),
            hidden_size,
            len(sources),
            num_queries - first,
            logits is not None,
            wanted_rstd is not None,
            out_format,
            source_scales is not None,
            seed is not None,
        )
        outputs = Phase1Outputs(
            out=address_of(out, first),
            out_scale=address_of(out_scale, first),
            lse=address_of(lse, first),
            logits=address_of(logits, first),
            rstd=address(wanted_rstd),
            seed=seed or 0,
            first_row=first * tokens,
        )
        kernel(
            addresses,
            strides,
            address_of(queries, first),
            queries.stride(0),
            address_of(key_weights, first),
            0 if key_weights is None else key_weights.stride(0),
            outputs,
            counter.data_ptr(),
            tokens,
            eps,
            scale,
            # As many CTAs as run at once, or as there are items for
            min(-(-tokens // config.shape.tokens), clusters) * config.tile.cluster,
            stream,
        )
        first += config.num_queries


def item_counter(device: torch.device, stream: int) -> torch.Tensor:
    """[1] int32, zero: the kernel leaves it so, and launches on one stream follow each other. A captured launch gets one of its
    own, since its graph may be replayed on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return stream_counter(device, stream)


@functools.cache
def stream_counter(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def address_of(tensor: torch.Tensor | None, index: int) -> int:
    """Of tensor[index], without making it."""
    return 0 if tensor is None else tensor.data_ptr() + index * tensor.stride(0) * tensor.element_size()


def aligned(parameter: torch.Tensor) -> torch.Tensor:
    """With rows at multiples of 16 bytes, as they are read; a copy if they are not (the backend choice sees to sources
    only).
    """
    if (parameter.data_ptr() | parameter.stride(0) * parameter.element_size()) % ALIGNMENT == 0:
        return parameter
    return parameter.clone(memory_format=torch.contiguous_format)
