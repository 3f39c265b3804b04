"""Serving site, in place: prefix += delta, optional write of the new block, mix of blocks and prefix, output norm, in one pass."""

from __future__ import annotations

import torch

from cute_kernels.config import Operands, token_class
from cute_kernels.mix_fwd import address, aligned, dtype_of, kernel_for, launch


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
    seed: int | None = None,
) -> None:
    """out = mix of blocks[:, :num_blocks] and prefix + delta (rounded to the storage dtype), normalised where a weight is given.

    Tensors are bf16 or fp16, parameters bf16, fp16 or fp32; rows start at multiples of 16 bytes. A row of prefix is read before
    the same CTA writes it; a seed rounds it stochastically. Moves (num_blocks + 4) T D elements with delta, one T D more with a
    block write. Deterministic.
    """
    query, key_weight, output_weight = aligned(query), aligned(key_weight), aligned(output_weight)
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
    )
    first_block, next_block = blocks.data_ptr(), blocks.stride(1) * blocks.element_size()
    rows = [first_block + i * next_block for i in range(num_blocks)] + [prefix.data_ptr()]
    strides = [blocks.stride(0)] * num_blocks + [prefix.stride(0)]
    if delta is not None:
        rows.append(delta.data_ptr())
        strides.append(delta.stride(0))
    operands = Operands(
        query=query.data_ptr(),
        key_weight=address(key_weight),
        output_weight=address(output_weight),
        out=out.data_ptr(),
        sum=address(prefix),
        sum_stride=prefix.stride(0),
        block=first_block + block_write_idx * next_block if block_write_idx >= 0 else 0,
        block_stride=blocks.stride(0),
        seed=seed or 0,
    )
    launch(kernel, rows, strides, operands, out, eps, output_eps, 1.0)
