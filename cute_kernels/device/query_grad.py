"""Parameter gradients from fp32 partial sums, added up in a fixed order.

    du = sum_k partials[k]        d_query = du * w        d_key_weight = du * q        d_output_weight = sum_k (a row of its own)[k]

A CTA sums a tile of COLUMNS columns of one query. Its threads split the partials: eight lanes cover a row of the tile with 16 bytes
each, so that a warp reads four rows at once, and a thread has most of its loads in flight before its
first addition.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Numeric, const_expr
from cutlass.memory import SmemAllocator

from cute_kernels.config import LANES, QueryGradConfig
from cute_kernels.device.mma import load_vector
from cute_kernels.device.rows import add, tree

TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}

COLUMNS = 32  # of a CTA: whole lines of 128 bytes, and CTAs enough for one query of 2048 elements
VECTOR = 4
VECTORS = COLUMNS // VECTOR  # lanes of a row
ROWS = LANES // VECTORS * QueryGradConfig.warps  # partials that a CTA reads at once
BATCH = 9  # loads of a thread in flight: 288 partials, more than two CTAs on each SM of an H200 leave


class QueryGradKernel:
    def __init__(self, config: QueryGradConfig):
        self.config = config

    @cute.jit
    def __call__(
        self,
        partials: Int64,  # [P, S, D] fp32
        queries: Int64,  # [S, D]
        query_stride: Int64,
        key_weights: Int64,  # [S, D]
        key_weight_stride: Int64,
        d_queries: Int64,  # [S, D]
        d_key_weights: Int64,  # [S, D]
        d_output_weight: Int64,  # [D]
        num_partials: Int32,
        num_rows: Int32,  # of partials: S, or S + 1 with the output weight's
        hidden_size: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(
            partials,
            queries,
            query_stride,
            key_weights,
            key_weight_stride,
            d_queries,
            d_key_weights,
            d_output_weight,
            num_partials,
            num_rows,
            hidden_size,
        ).launch(
            grid=[cute.ceil_div(hidden_size, COLUMNS), num_rows, 1],
            block=[self.config.warps * LANES, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        partials: Int64,
        queries: Int64,
        query_stride: Int64,
        key_weights: Int64,
        key_weight_stride: Int64,
        d_queries: Int64,
        d_key_weights: Int64,
        d_output_weight: Int64,
        num_partials: Int32,
        num_rows: Int32,
        hidden_size: Int32,
    ):
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        tile, row, _ = cute.arch.block_idx()
        s_sums = SmemAllocator().allocate_tensor(Float32, cute.make_layout((COLUMNS, config.warps)), 16)

        column = tile * COLUMNS + tid % COLUMNS
        readable = cutlass.min(column, hidden_size - 1)
        query = row
        if const_expr(config.d_output_weight is not None):
            query = cutlass.min(row, num_rows - 2)
        # Ahead of the partials, whose latency hides this one.
        q = w = Float32(1.0)
        if const_expr(config.d_key_weight is not None):
            q = element(TYPES[config.query], queries, Int64(query) * query_stride + readable)[0].to(Float32)
        if const_expr(config.key_weight is not None):
            w = element(TYPES[config.key_weight], key_weights, Int64(query) * key_weight_stride + readable)[0].to(
                Float32
            )

        first = tile * COLUMNS + tid % VECTORS * VECTOR
        row_bytes = Int64(num_rows) * hidden_size * 4
        start = partials + (Int64(row) * hidden_size + first) * 4
        sums = [Float32(0.0) for _ in range(VECTOR)]
        # The kernel that leaves the partials may still be running: the launch does not wait for its end.
        cute.arch.griddepcontrol_wait()
        for k_first in cutlass.range(tid // VECTORS, num_partials, BATCH * ROWS, unroll=1):
            loaded = []
            for k in cutlass.range_constexpr(BATCH):
                at = k_first + k * ROWS
                loaded.append(
                    load_vector(Float32, start + at * row_bytes, 0, (at < num_partials) & (first < hidden_size))
                )
            sums = [tree(add, [total, *values]) for total, values in zip(sums, zip(*loaded, strict=True), strict=True)]
        for offset in (VECTORS, 2 * VECTORS):
            sums = [value + cute.arch.shuffle_sync_bfly(value, offset=offset) for value in sums]
        if tid % LANES < VECTORS:
            for e in cutlass.range_constexpr(VECTOR):
                s_sums[tid % VECTORS * VECTOR + e, tid // LANES] = sums[e]
        cute.arch.barrier()

        if (tid < COLUMNS) & (column < hidden_size):
            du = tree(add, [s_sums[tid, warp] for warp in range(config.warps)])
            at = Int64(query) * hidden_size + column
            if row == query:
                store_element(TYPES[config.d_query], d_queries, at, du * w)
                if const_expr(config.d_key_weight is not None):
                    store_element(TYPES[config.d_key_weight], d_key_weights, at, du * q)
            elif const_expr(config.d_output_weight is not None):
                store_element(TYPES[config.d_output_weight], d_output_weight, Int64(column), du)


def element(dtype: type[Numeric], address: Int64, index: Int64) -> cute.Tensor:
    """One element of device memory: (1,)."""
    size = dtype.width // 8
    pointer = cute.make_ptr(dtype, address + index * size, cute.AddressSpace.gmem, assumed_align=size)
    return cute.make_tensor(pointer, cute.make_layout((1,)))


def store_element(dtype: type[Numeric], address: Int64, index: Int64, value: Float32) -> None:
    g_element = element(dtype, address, index)
    g_element[0] = value.to(dtype)
