"""The row kernel for few bytes a token and for few tokens: rows go straight from device memory to registers.

A CTA mixes one token, all of its rows in registers, packed as stored; CTAs that come and go keep more memory traffic in flight than
a loop over tokens would. Where there are fewer tokens than SMs, a token is spread over the CTAs of a cluster, which meet twice at
most: for the sums of the rows and for the output norm's.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from cute_kernels.config import Operands
from cute_kernels.device.mix import RowMix, Scalars
from cute_kernels.device.pipelines import global_row
from cute_kernels.device.rows import LANES, ClusterExchange, GroupExchange, RowTile, vector_fp32


class RegisterKernel(RowMix):
    @cute.jit
    def __call__(
        self,
        rows: list,  # addresses of the rows of token 0: (merged row), sources, (delta); then of the scales of scaled rows
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
            min_blocks_per_mp=1,
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
            exchange = ClusterExchange(
                smem, config.num_sources, tile.cluster, tile.warps, rank, warp, lane, leading=int(config.scaled_sum)
            )
            exchange.start(thread)
        else:
            s_partials = GroupExchange.allocate(smem, config.num_sources, tile.warps, 1)
            exchange = GroupExchange(s_partials, 0, warp, lane, tile.warps, 0)
        # Before any read: the kernel before this one may have written a parameter, too.
        cute.arch.griddepcontrol_wait()
        part = RowTile(config.hidden_size, tile.cluster * tile.warps, rank * tile.threads + thread)
        token = block // tile.cluster
        # Every load before the first use.
        reader = self.load_rows(token, rows, strides, part)
        given = vector_fp32(operands.given_logit, scalars.tokens)[token] if const_expr(config.merge) else None
        weight = None
        if const_expr(config.output_weight is not None):
            weight = self.load_parameter(part, config.output_weight, operands.output_weight)
        r_u = self.load_key(part, operands)
        self.mix_token(token, reader, exchange, r_u, given, weight, operands, scalars)

    def load_rows(self, token: Int32, rows: list, strides: list, part: RowTile) -> "LoadedRows":
        size, count = self.config.hidden_size, self.config.rows_per_token
        r_rows = []
        for dtype, row, stride in zip(self.row_types, rows[:count], strides[:count], strict=True):
            r_rows.append(part.load(dtype, global_row(dtype, row, stride, token, size)))
        # One number a row: its address is aligned to no more than that.
        loaded = [
            vector_fp32(a + Int64(token) * s * 4, 1)[0] for a, s in zip(rows[count:], strides[count:], strict=True)
        ]
        found = iter(loaded)
        scales = [next(found) if name == "fp16_scaled" else None for name in self.formats]
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
