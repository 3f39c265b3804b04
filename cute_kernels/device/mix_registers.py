"""The row kernel for few bytes a token and for few tokens: rows go straight from device memory to registers.

A CTA mixes one token, all of its rows in registers, packed as stored; CTAs that come and go keep more memory traffic in flight than
a loop over tokens would. Where there are fewer tokens than SMs, a token is spread over the CTAs of a cluster, which meet twice at
most: for the sums of the rows and for the output norm's.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from cute_kernels.config import SCALED_FP16
from cute_kernels.config_rows import Operands
from cute_kernels.device.mix import TYPES, RowMix, Scalars
from cute_kernels.device.pipelines import global_row
from cute_kernels.device.rows import (
    LANES,
    ClusterExchange,
    GroupExchange,
    RowTile,
    number_at,
    prefetch_line,
    strided_fp32,
    vector_fp32,
)


class RegisterKernel(RowMix):
    scale_first = False

    @cute.jit
    def __call__(
        self,
        rows: list,  # addresses of the rows of token 0: RowConfig.formats has their order; then of the scales of scaled rows
        strides: list,  # elements from one token to the next
        operands: Operands,
        tokens: Int32,
        eps: Float32,
        output_eps: Float32,
        scale: Float32,
        multiprocessors: Int32,
        stream: cuda.CUstream,
    ):
        tile = self.tile
        self.kernel(rows, strides, operands, Scalars(tokens, eps, output_eps, scale)).launch(
            grid=[tokens * tile.cluster, 1, 1],
            block=[tile.threads, 1, 1],
            cluster=[tile.cluster, 1, 1] if tile.cluster > 1 else None,
            stream=stream,
            min_blocks_per_mp=tile.resident,
            preferred_smem_carveout=self.config.carveout,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, rows: list, strides: list, operands: Operands, scalars: Scalars):
        config, tile = self.config, self.tile
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), thread % LANES
        rank = cute.arch.block_idx_in_cluster() if const_expr(tile.cluster > 1) else Int32(0)
        cute.arch.griddepcontrol_launch_dependents()
        smem = SmemAllocator()
        if const_expr(tile.cluster > 1):
            exchange = ClusterExchange(smem, config.exchange_words, tile.cluster, tile.warps, rank, warp, lane)
            exchange.start(thread)
        else:
            s_partials = GroupExchange.allocate(smem, config.exchange_words, tile.warps, 1)
            exchange = GroupExchange(s_partials, 0, warp, lane, tile.warps, 0)
        part = RowTile(config.hidden_size, tile.cluster * tile.warps, rank * tile.threads + thread)
        token = block // tile.cluster
        if const_expr(tile.cluster > 1):
            self.prefetch(token, rows, strides, part, operands)
        # Before any read: the kernel before this one may have written a parameter, too.
        cute.arch.griddepcontrol_wait()
        # Every load before the first use, but for the norm's weight where registers are to suffice for more CTAs.
        reader = self.load_rows(token, rows, strides, part)
        given = vector_fp32(operands.given_logit, scalars.tokens)[token] if const_expr(config.merge) else None
        weight = None
        if const_expr(config.output_weight is not None and tile.resident == 1):
            weight = self.load_parameter(part, config.output_weight, operands.output_weight)
        if const_expr(tile.resident > 1):
            # All rows' loads stay ahead of it. Short of registers, the compiler had the last of them wait for the delta's sum: on
            # an H200, the scaled step at (16384, 4096, L5) took 288 us, where bf16 takes 244.
            cute.arch.sync_threads()
        r_u = self.load_key(part, operands)
        self.mix_token(token, reader, exchange, r_u, given, weight, operands, scalars)

    def prefetch(self, token: Int32, rows: list, strides: list, part: RowTile, operands: Operands) -> None:
        """Starts bringing what this CTA will read into L2, while the kernel before this one ends.

        L2 is where all SMs agree on what memory holds, so it does not matter that the kernel before may still write some of it. On
        an H200, step at D 7168, L 9: T 1 2.54 -> 2.10 us, T 16 3.71 -> 3.44, T 64 5.18 -> 4.93; with a CTA a token, T 128 8.27 ->
        8.57, prefill alike.
        """
        config, count = self.config, self.config.rows_per_token
        found = [(dtype, *place, token) for dtype, *place in zip(self.row_types, rows, strides, strict=False)]
        for kind, address in (
            (config.query, operands.query),
            (config.key_weight, operands.key_weight),
            (config.output_weight, operands.output_weight),
        ):
            if kind is not None:
                found.append((TYPES[kind], address, 0, 0))
        for dtype, *place in found:
            part.prefetch(global_row(dtype, *place, config.hidden_size))
        for address, stride in zip(rows[count:], strides[count:], strict=True):
            prefetch_line(number_at(address, token, stride), 0, part.thread % LANES == 0)

    def load_rows(self, token: Int32, rows: list, strides: list, part: RowTile) -> "LoadedRows":
        size, count = self.config.hidden_size, self.config.rows_per_token
        r_rows = []
        for dtype, row, stride in zip(self.row_types, rows[:count], strides[:count], strict=True):
            r_rows.append(part.load(dtype, global_row(dtype, row, stride, token, size)))
        found = iter([strided_fp32(a, s, token) for a, s in zip(rows[count:], strides[count:], strict=True)])
        scales = [next(found) if name == SCALED_FP16 else None for name in self.formats]
        return LoadedRows(r_rows, scales, part)


class LoadedRows:
    """The rows of one token in registers as stored, one after the other."""

    def __init__(self, r_rows: list[cute.Tensor], scales: list[Float32 | None], part: RowTile):
        self.rows, self.part = iter(zip(r_rows, scales, strict=True)), part
        self.scale: Float32 | None = None  # of the last row, if it has one

    def next(self) -> cute.Tensor:
        r_row, self.scale = next(self.rows)
        return r_row

    def release(self) -> None:
        """Nothing to give back."""
