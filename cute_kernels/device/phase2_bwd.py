"""Phase 2's backward. x is the partial sum after delta, p = sigmoid(logit - inter_lse), h = inter_out + p (x - inter_out).

    dh = d_out, or through out = RMSNorm(h) * w_o        z = p (1-p) <dh, x - inter_out>        g = scale * r * z
    d_inter_out = (1-p) dh        d_inter_lse = -z        d_x = p dh + g u - (r^2 logit z / D) x  (+ d_new_partial)
    du = sum_tokens g x        d_w_o = sum_tokens d_out * h_hat

Groups of warps take a CTA's tokens in turn. A thread copies its own vectors of every row ahead into shared memory (cp.async) and
alone reads them, so that no barrier is needed but the one in which a token's sums are exchanged. With an output norm, too, one
exchange is enough: <dh, x - inter_out> follows from products of d_out * w_o, x - inter_out and h, as accurately as from dh itself.
du and d_w_o stay in registers over all tokens. Deterministic: every sum has a fixed order.

Rows of scaled fp16 (values * scale, scale a power of two for each row) may be of any magnitude, whose squares leave fp32's range.
The merge of such a token is worked on in its unit, the larger of its scales or one: x, inter_out and h are divided by it, exactly.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from cute_kernels.config_phase2_bwd import Phase2BwdConfig, Phase2BwdOperands
from cute_kernels.device.mix import TYPES
from cute_kernels.device.pipelines import global_row
from cute_kernels.device.rounding import inverse
from cute_kernels.device.rows import (
    LANES,
    VECTOR,
    GroupExchange,
    RowSums,
    RowTile,
    number_at,
    pack,
    reciprocal_root,
    select,
    sigmoids,
    store_scalar,
    strided_fp32,
    unpack,
    vector_fp32,
    warp_sum,
)

D_OUT, PARTIAL, INTER_OUT, D_NEW_PARTIAL = range(4)  # places of a token's rows


class Scalars(NamedTuple):
    """Run-time numbers of a launch."""

    tokens: Int32
    output_eps: Float32
    scale: Float32


class Statistics(NamedTuple):
    """What the forward saved of a token."""

    logit: Float32
    rstd: Float32
    inter_lse: Float32
    partial_scale: Float32  # of the row's values; 1 where rows have none
    inter_scale: Float32

    def unit(self) -> Float32:
        return cute.arch.fmax(cute.arch.fmax(self.partial_scale, self.inter_scale), 1.0)


class Gradient(NamedTuple):
    """The factors with which a token's rows, as stored, enter its gradients."""

    down_partial: Float32  # from values of x to x in the token's unit
    down_inter: Float32
    share: Float32  # p
    rest: Float32  # 1 - p
    key: Float32  # g, of u
    du: Float32  # g, of x
    radial: Float32  # of -x, from the RMSNorm of the key
    output_rstd: Float32 | None  # of d_out * w_o
    output_radial: Float32 | None  # of -h, from the output norm
    normalise: Float32 | None  # from h to h_hat


class Phase2BwdKernel:
    def __init__(self, config: Phase2BwdConfig):
        self.config, self.dtype = config, TYPES[config.dtype]
        self.types = [TYPES[kind] for kind in (config.dtype, config.partial, config.inter_out, config.dtype)]  # of rows
        self.norm = config.output_weight is not None

    @cute.jit
    def __call__(
        self,
        operands: Phase2BwdOperands,
        tokens: Int32,
        output_eps: Float32,
        scale: Float32,
        grid: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(operands, Scalars(tokens, output_eps, scale)).launch(
            grid=[grid, 1, 1], block=[self.config.threads, 1, 1], stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, operands: Phase2BwdOperands, scalars: Scalars):
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = warp // config.warps
        part = RowTile(config.hidden_size, config.warps, tid - group * (config.warps * LANES))

        smem = SmemAllocator()
        layout = cute.make_layout((config.pitch, config.rows, config.stages, config.groups))
        s_rows = smem.allocate_tensor(self.dtype, layout, byte_alignment=128)
        s_partials = GroupExchange.allocate(smem, LANES, config.warps, config.groups)
        s_own = s_rows[None, None, None, group]

        first, step = block + group * grid, grid * config.groups
        if const_expr(config.pitch > config.hidden_size):
            self.clear_padding(s_own, part)
        # The launch overlaps the end of the kernel before, whose results may be read from here on.
        cute.arch.griddepcontrol_wait()
        for stage in cutlass.range_constexpr(config.stages - 1):
            self.fetch(s_own, stage, first + stage * step, part, operands, scalars)
        r_u = self.load_parameter(part, config.query, operands.query)
        if const_expr(config.key_weight is not None):
            r_u.store(r_u.load() * self.load_parameter(part, config.key_weight, operands.key_weight).load())
        r_du = part.fragment(Float32)
        r_du.fill(0.0)
        r_weight, r_d_weight = None, None
        if const_expr(self.norm):
            r_weight = self.load_parameter(part, config.output_weight, operands.output_weight)
            r_d_weight = part.fragment(Float32)
            r_d_weight.fill(0.0)

        turn, stage = Int32(0), Int32(0)
        ahead = self.load_statistics(operands, scalars, first)
        for token in cutlass.range(first, scalars.tokens, step, unroll=1):
            statistics = ahead
            # The next token's, a token ahead: their latency would otherwise stand before the reduction.
            ahead = self.load_statistics(operands, scalars, token + step)
            cute.arch.cp_async_wait_group(config.stages - 2)
            filled = select(stage == 0, Int32(config.stages - 1), stage - 1)
            self.fetch(s_own, filled, token + (config.stages - 1) * step, part, operands, scalars)
            s_token = s_own[None, None, stage]
            exchange = GroupExchange(s_partials, group, warp % config.warps, tid % LANES, config.warps, turn)
            gradient = self.reduce(token, s_token, statistics, exchange, r_weight, part, operands, scalars)
            self.write(token, s_token, gradient, r_u, r_du, r_weight, r_d_weight, part, operands)
            turn = exchange.turn
            stage = select(stage == config.stages - 1, Int32(0), stage + 1)

        cute.arch.cp_async_wait_group(0)
        # query_grad's CTAs may take their places now; they wait for this kernel's end by themselves.
        cute.arch.griddepcontrol_launch_dependents()
        self.combine(r_du, 0, operands, s_rows, group, tid, part)
        if const_expr(self.norm):
            self.combine(r_d_weight, 1, operands, s_rows, group, tid, part)

    def load_parameter(self, part: RowTile, dtype: str, address: Int64) -> cute.Tensor:
        """This thread's part of a vector [D] in fp32."""
        r_stored = part.load(TYPES[dtype], global_row(TYPES[dtype], address, 0, 0, self.config.hidden_size))
        r_part = part.fragment(Float32)
        r_part.store(r_stored.load().to(Float32))
        return r_part

    @cute.jit
    def clear_padding(self, s_own: cute.Tensor, part: RowTile):
        """Zeros beyond the row's end, in some threads' last vectors, where no copy ever writes."""
        zeros = cute.make_rmem_tensor((VECTOR,), self.dtype)
        zeros.fill(0.0)
        if not part.inside(part.vectors - 1):
            for stage in cutlass.range_constexpr(self.config.stages):
                for row in cutlass.range_constexpr(self.config.rows):
                    cute.autovec_copy(zeros, part.view(s_own[None, row, stage])[None, part.vectors - 1])

    @cute.jit
    def fetch(self, s_own, stage, token, part: RowTile, operands: Phase2BwdOperands, scalars: Scalars):
        """Starts copying this thread's vectors of a token; past the last token, an empty batch."""
        if token < scalars.tokens:
            size = self.config.hidden_size
            rows = [
                (operands.d_out, size),
                (operands.partial, operands.partial_stride),
                (operands.inter_out, operands.inter_out_stride),
                (operands.d_new_partial, operands.d_new_partial_stride),
            ]
            atom = cute.make_copy_atom(
                cpasync.CopyG2SOp(cpasync.LoadCacheMode.GLOBAL), self.dtype, num_bits_per_copy=128
            )
            for row in cutlass.range_constexpr(self.config.rows):
                address, stride = rows[row]
                g_part = part.view(global_row(self.dtype, address, stride, token, part.pitch))
                s_part = part.view(s_own[None, row, stage])
                for v in cutlass.range_constexpr(part.vectors):
                    if const_expr(part.is_partial(v)):
                        if part.inside(v):
                            cute.copy(atom, g_part[None, v], s_part[None, v])
                    else:
                        cute.copy(atom, g_part[None, v], s_part[None, v])
        cute.arch.cp_async_commit_group()

    def load_statistics(self, operands: Phase2BwdOperands, scalars: Scalars, token: Int32) -> Statistics:
        """Of the token, or of the last one where it lies beyond."""
        token = cutlass.min(token, scalars.tokens - 1)
        addresses = (operands.logit, operands.rstd, operands.inter_lse)
        saved = [vector_fp32(address, scalars.tokens)[token] for address in addresses]
        partial_scale, inter_scale = Float32(1.0), Float32(1.0)
        if self.config.partial_scaled:
            partial_scale = strided_fp32(operands.partial_scale, operands.partial_scale_stride, token)
        if self.config.inter_scaled:
            inter_scale = strided_fp32(operands.inter_scale, operands.inter_scale_stride, token)
        return Statistics(*saved, partial_scale, inter_scale)

    def vector(self, s_rows: cute.Tensor, row: int, v: int, part: RowTile) -> list[Float32]:
        """Vector v of a row as fp32."""
        r_vector = cute.make_rmem_tensor((VECTOR, 1), self.types[row])
        s_row = cute.recast_tensor(s_rows[None, row], self.types[row])
        cute.autovec_copy(part.view(s_row)[None, v], r_vector[None, 0])
        return unpack(r_vector, 0)

    def in_unit(self, values: list[Float32], down: Float32) -> list[Float32]:
        """A vector of x or inter_out in the token's unit."""
        return [value * down for value in values] if self.config.scaled else values

    def reduce(self, token, s_rows, statistics, exchange: GroupExchange, r_weight, part, operands, scalars) -> Gradient:
        """The token's sums and what follows from them."""
        one_over_d = Float32(1.0 / self.config.hidden_size)
        share, rest = sigmoids(statistics.logit - statistics.inter_lse)
        unit, down = Float32(1.0), Float32(1.0)
        if self.config.scaled:
            unit = statistics.unit()
            down = inverse(unit)
        down_partial, down_inter = statistics.partial_scale * down, statistics.inter_scale * down
        count = 4 if self.norm else 1
        sums = [[Float32(0.0)] * 2 for _ in range(count)]
        for v in range(part.vectors):
            d_out, x, inter = (self.vector(s_rows, row, v, part) for row in (D_OUT, PARTIAL, INTER_OUT))
            x, inter = self.in_unit(x, down_partial), self.in_unit(inter, down_inter)
            for e in range(VECTOR):
                difference = x[e] - inter[e]
                factors = [(d_out[e], difference)]
                if self.norm:
                    h = inter[e] + share * difference
                    d_hat = d_out[e] * r_weight[e, v]
                    factors = [(d_hat, difference), (h, difference), (d_hat, h), (h, h)]
                for accumulators, (a, b) in zip(sums, factors, strict=True):
                    accumulators[e % 2] = accumulators[e % 2] + a * b
        totals = [a + b for a, b in sums]
        output_rstd, output_radial, normalise = None, None, None
        if self.norm:
            pairs = RowSums(2)
            (held,) = exchange.sum(pairs.reduce(totals[:2], totals[2:], exchange.lane))
            first, second = pairs.pair(held, exchange.lane)
            (gradient_difference, h_difference), (gradient_h, square) = pairs.spread([first]), pairs.spread([second])
            eps = scalars.output_eps * (down * down)
            normalise = reciprocal_root(square * one_over_d + eps)
            output_rstd = normalise * down
            # dh = output_rstd * (d_hat - ratio * h). Where a few channels make most of every sum, two nearly equal terms are
            # subtracted: by one common ratio, not by rstd and rstd^3, whose own errors would be what is left.
            ratio = gradient_h / (square + Float32(self.config.hidden_size) * eps)
            output_radial = output_rstd * ratio
            product = normalise * (gradient_difference - ratio * h_difference)
        else:
            (product,) = exchange.sum([warp_sum(totals[0])])
            product = product * unit
        z = share * rest * product
        store_scalar(number_at(operands.d_inter_lse, token), -z, exchange)
        rstd = statistics.rstd * statistics.partial_scale  # of the values; fp32 has no square of a large row's own
        radial = statistics.rstd * (rstd * statistics.logit * z * one_over_d)
        key = scalars.scale * (statistics.rstd * z)
        du = scalars.scale * (rstd * z)
        return Gradient(down_partial, down_inter, share, rest, key, du, radial, output_rstd, output_radial, normalise)

    def write(self, token, s_rows, gradient: Gradient, r_u, r_du, r_weight, r_d_weight, part, operands) -> None:
        """The token's gradients, and its part of those of the parameters."""
        size = self.config.hidden_size
        g_d_partial = global_row(self.dtype, operands.d_partial, size, token, size)
        g_d_inter_out = global_row(self.dtype, operands.d_inter_out, size, token, size)
        share, rest = gradient.share, gradient.rest
        for v in range(part.vectors):
            # Without it the compiler reads vectors ahead, or keeps those of the first pass, as fp32, and spills.
            cute.arch.sync_warp()
            d_h, x, inter = (self.vector(s_rows, row, v, part) for row in (D_OUT, PARTIAL, INTER_OUT))
            if self.norm:
                inter, own = self.in_unit(inter, gradient.down_inter), self.in_unit(x, gradient.down_partial)
                for e in range(VECTOR):
                    h = inter[e] + share * (own[e] - inter[e])
                    r_d_weight[e, v] = r_d_weight[e, v] + d_h[e] * (gradient.normalise * h)
                    d_h[e] = gradient.output_rstd * (d_h[e] * r_weight[e, v]) - gradient.output_radial * h
            part.store_vector(pack([rest * d_h[e] for e in range(VECTOR)], self.dtype), g_d_inter_out, v)
            d_x = [share * d_h[e] + (gradient.key * r_u[e, v] - gradient.radial * x[e]) for e in range(VECTOR)]
            if self.config.new_partial:
                d_new = self.vector(s_rows, D_NEW_PARTIAL, v, part)
                d_x = [a + b for a, b in zip(d_x, d_new, strict=True)]
            part.store_vector(pack(d_x, self.dtype), g_d_partial, v)
            for e in range(VECTOR):
                r_du[e, v] = r_du[e, v] + gradient.du * x[e]

    @cute.jit
    def combine(
        self, r_sums: cute.Tensor, row: cutlass.Constexpr, operands, s_rows: cute.Tensor, group, tid, part: RowTile
    ):
        """One row of the CTA's sums: those of its groups, added up in shared memory, which the tokens have left."""
        config = self.config
        block, _, _ = cute.arch.block_idx()
        s_sums = cute.make_tensor(
            cute.recast_ptr(s_rows.iterator, dtype=Float32), cute.make_layout((config.pitch, config.groups))
        )
        cute.arch.sync_threads()
        for v in cutlass.range_constexpr(part.vectors):
            cute.autovec_copy(r_sums[None, v], part.view(s_sums[None, group])[None, v])
        cute.arch.sync_threads()
        g_row = global_row(
            Float32, operands.sums, config.hidden_size, block * (1 + self.norm) + row, config.hidden_size
        )
        g_vectors = cute.make_tensor(g_row.iterator, cute.make_layout((4, config.hidden_size // 4)))
        s_vectors = cute.make_tensor(s_sums.iterator, cute.make_layout((4, config.pitch // 4, config.groups)))
        for i in cutlass.range(tid, config.hidden_size // 4, config.threads, unroll=1):
            r_sum = cute.make_rmem_tensor((4,), Float32)
            cute.autovec_copy(s_vectors[None, i, 0], r_sum)
            for g in cutlass.range_constexpr(1, config.groups):
                r_sum.store(r_sum.load() + s_vectors[None, i, g].load())
            cute.autovec_copy(r_sum, g_vectors[None, i])
