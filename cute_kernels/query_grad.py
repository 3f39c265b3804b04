"""Parameter gradients from the fp32 partial sums that persistent CTAs leave behind, added up in a fixed order.

    du = sum_k partials[k]        d_query = du * w        d_key_weight = du * q        (u = q * w)

No atomics, so the same partials give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from cute_kernels.compile import cached_kernel, compile_kernel
from cute_kernels.config import QueryGradConfig, query_grad_config
from cute_kernels.mix_fwd import address, current_stream, dtype_of


@cached_kernel
def build(config: QueryGradConfig) -> Any:
    from cutlass import Int32, Int64
    from cutlass.cute.runtime import make_fake_stream

    from cute_kernels.device.query_grad import QueryGradKernel

    return compile_kernel(QueryGradKernel(config), *[Int64(0)] * 8, *[Int32(1)] * 3, make_fake_stream())


@functools.cache
def kernel_for(*dtypes: torch.dtype | None) -> Any:
    """The compiled kernel for `query_grad_config(*dtypes)`."""
    return build(query_grad_config(*dtypes))


def query_grad(
    partials: torch.Tensor,  # [P, S, D] fp32, or [P, S + 1, D] with d_output_weight
    queries: torch.Tensor | None,  # [S, D]
    key_weights: torch.Tensor | None,  # [S, D]
    d_queries: torch.Tensor,  # [S, D]
    d_key_weights: torch.Tensor | None,  # [S, D]
    d_output_weight: torch.Tensor | None = None,  # [D]
) -> None:
    """Fills d_queries, d_key_weights and d_output_weight, each rounded once to its own dtype: bf16, fp16 or fp32. D is a multiple
    of 4.

    An output weight's gradient is the sum of the partials' last row, in the same launch: a launch of its own costs 2 to 3 us.
    """
    num_partials, num_rows, hidden_size = partials.shape
    read = None if d_key_weights is None else dtype_of(queries)
    kernel_for(read, dtype_of(key_weights), d_queries.dtype, dtype_of(d_key_weights), dtype_of(d_output_weight))(
        partials.data_ptr(),
        address(queries),
        0 if queries is None else queries.stride(0),
        address(key_weights),
        0 if key_weights is None else key_weights.stride(0),
        d_queries.data_ptr(),
        address(d_key_weights),
        address(d_output_weight),
        num_partials,
        num_rows,
        hidden_size,
        current_stream(partials.device),
    )


def vector_grad(
    partials: torch.Tensor,
    query: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    d_query: torch.Tensor,
    d_key_weight: torch.Tensor | None,
    d_output_weight: torch.Tensor | None = None,
) -> None:
    """query_grad for one query: partials [P, D] fp32, or [P, 2, D] with d_output_weight; the others [D]."""
    query_grad(
        partials if d_output_weight is not None else partials.unsqueeze(1),
        None if query is None else query.unsqueeze(0),
        None if key_weight is None else key_weight.unsqueeze(0),
        d_query.unsqueeze(0),
        None if d_key_weight is None else d_key_weight.unsqueeze(0),
        d_output_weight,
    )
