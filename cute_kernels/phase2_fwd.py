"""Phase 2, forward: merges the partial sum x into phase 1's mix: h = inter_out + sigmoid(logit(x) - inter_lse) * (x - inter_out).

The sigmoid is the softmax over two rows whose logits are logit(x) and inter_lse, so this is the row kernel with one source and one
merged row whose logit is given.
"""

from __future__ import annotations

import torch

from cute_kernels.config_rows import Operands, token_class
from cute_kernels.mix_fwd import address, aligned, dtype_of, format_of, formats_beside, kernel_for, launch


def phase2_fwd(
    partial: torch.Tensor,  # [T, D]
    delta: torch.Tensor | None,  # [T, D]
    query: torch.Tensor,  # [D]
    key_weight: torch.Tensor | None,  # [D]
    inter_out: torch.Tensor,  # [T, D]
    inter_lse: torch.Tensor,  # [T] fp32
    output_weight: torch.Tensor | None,  # [D]
    eps: float,
    output_eps: float,
    scale: float,
    out: torch.Tensor,  # [T, D]
    new_partial: torch.Tensor | None,  # [T, D], wanted exactly when delta is given
    logit: torch.Tensor | None,  # [T] fp32
    rstd: torch.Tensor | None,  # [T] fp32
    *,
    partial_scale: torch.Tensor | None = None,  # [T] fp32: partial is scaled fp16
    inter_scale: torch.Tensor | None = None,  # [T] fp32
    new_partial_scale: torch.Tensor | None = None,  # [T] fp32
    seed: int | None = None,
) -> None:
    """out = h or RMSNorm(h) * output_weight, with x = partial, or partial + delta rounded to the storage dtype (new_partial).

    Rows are bf16 or fp16, those with a scale fp16, out and parameters bf16, fp16 or fp32; rows start at multiples of 16 bytes. A
    seed rounds new_partial stochastically. logit and rstd are what the backward needs. Moves 3 T D elements, 5 T D with delta.
    Deterministic.
    """
    query, key_weight, output_weight = aligned(query), aligned(key_weight), aligned(output_weight)
    rows = [inter_out, partial] if delta is None else [inter_out, partial, delta]
    row_scales = [inter_scale, partial_scale, None][: len(rows)]
    formats = [format_of(row, row_scale) for row, row_scale in zip(rows, row_scales, strict=True)]
    kernel = kernel_for(
        "phase2_fwd",
        out.dtype,
        out.shape[1],
        1,
        query.dtype,
        dtype_of(key_weight),
        dtype_of(output_weight),
        tokens=token_class(out.shape[0]),
        merge=True,
        delta=delta is not None,
        logits=logit is not None,
        rstd=rstd is not None,
        stochastic=seed is not None and delta is not None,
        **formats_beside(out, formats, None if new_partial is None else format_of(new_partial, new_partial_scale)),
    )
    operands = Operands(
        query=query.data_ptr(),
        key_weight=address(key_weight),
        output_weight=address(output_weight),
        given_logit=inter_lse.data_ptr(),
        out=out.data_ptr(),
        logits=address(logit),
        rstd=address(rstd),
        sum=address(new_partial),
        sum_stride=0 if new_partial is None else new_partial.stride(0),
        sum_scale=address(new_partial_scale),
        sum_scale_stride=1,
        seed=seed or 0,
    )
    given = rows + [row_scale for row_scale in row_scales if row_scale is not None]
    strides = [row.stride(0) for row in given]
    launch(kernel, [row.data_ptr() for row in given], strides, operands, out, eps, output_eps, scale)
