"""Serving site, in place: prefix += delta, optional write of the new block, mix of blocks and prefix, output norm, in one pass."""

from __future__ import annotations

import torch

from cute_kernels.config import DTYPES
from cute_kernels.config_rows import Operands, token_class
from cute_kernels.mix_fwd import address, aligned, dtype_of, format_of, formats_beside, kernel_for, launch


def serve_step(
    prefix: torch.Tensor,  # [T, D], updated in place when delta is given
    delta: torch.Tensor | None,  # [T, D]
    blocks: torch.Tensor,  # [T, B, D]
    query: torch.Tensor,  # [D]
    key_weight: torch.Tensor | None,  # [D]
    output_weight: torch.Tensor | None,  # [D]
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_eps: float,
    out: torch.Tensor,  # [T, D]
    *,
    prefix_scale: torch.Tensor | None = None,  # [T] fp32: prefix and blocks are scaled fp16
    blocks_scale: torch.Tensor | None = None,  # [T, B] fp32
    seed: int | None = None,
) -> None:
    """out = mix of blocks[:, :num_blocks] and prefix + delta (rounded to prefix's storage), normalised where a weight is given.

    Rows are bf16 or fp16, those with a scale fp16, out and parameters bf16, fp16 or fp32; rows start at multiples of 16 bytes. A
    row of prefix is read before the same CTA writes it; a seed rounds it stochastically. Moves (num_blocks + 4) T D elements with
    delta, one T D more with a block write. Deterministic.
    """
    query, key_weight, output_weight = aligned(query), aligned(key_weight), aligned(output_weight)
    storage = format_of(prefix, prefix_scale)
    formats = [storage] * (num_blocks + 1)
    if delta is not None:
        formats.insert(1, DTYPES[delta.dtype])
    kernel = kernel_for(
        "serve_step",
        out.dtype,
        out.shape[1],
        num_blocks + 1,
        query.dtype,
        dtype_of(key_weight),
        dtype_of(output_weight),
        tokens=token_class(out.shape[0]),
        delta=delta is not None,
        write_block=block_write_idx >= 0,
        stochastic=seed is not None and delta is not None,
        **formats_beside(out, formats, None if delta is None else storage),
    )
    rows, strides = [prefix.data_ptr()], [prefix.stride(0)]
    if delta is not None:
        rows.append(delta.data_ptr())
        strides.append(delta.stride(0))
    first, step = columns(blocks)
    rows += [first + i * step for i in range(num_blocks)]
    strides += [blocks.stride(0)] * num_blocks
    scales: dict[str, int] = {}
    if prefix_scale is not None:
        first_scale, scale_step = columns(blocks_scale)
        rows += [prefix_scale.data_ptr(), *[first_scale + i * scale_step for i in range(num_blocks)]]
        strides += [prefix_scale.stride(0)] + [blocks_scale.stride(0)] * num_blocks
        scales = {
            "sum_scale": prefix_scale.data_ptr(),
            "sum_scale_stride": prefix_scale.stride(0),
            "block_scale": first_scale + block_write_idx * scale_step,
            "block_scale_stride": blocks_scale.stride(0),
        }
    operands = Operands(
        query=query.data_ptr(),
        key_weight=address(key_weight),
        output_weight=address(output_weight),
        out=out.data_ptr(),
        sum=prefix.data_ptr(),
        sum_stride=prefix.stride(0),
        seed=seed or 0,
        block=first + block_write_idx * step,  # read where there is a write
        block_stride=blocks.stride(0),
        **scales,
    )
    launch(kernel, rows, strides, operands, out, eps, output_eps, 1.0)


def columns(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of tensor[0, 0] and bytes from there to tensor[0, 1]."""
    return tensor.data_ptr(), tensor.stride(1) * tensor.element_size()
