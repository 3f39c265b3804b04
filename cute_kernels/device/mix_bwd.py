"""The kernel behind mix_bwd: reads d_out and every source once, writes every source's gradient once.

    x    = d_out, or with out = RMSNorm(m) * w_out: d_out * w_out        p_i = exp(logit_i - lse)
    b_i  = <x, v_i>,  e_i = <m, v_i>,  m = sum_i p_i v_i                 B = sum_i p_i b_i,  E = sum_i p_i e_i = <m, m>
    dm   = d_out, or rstd_o (x - c m), rstd_o = (E / D + eps)^(-1/2), c = rstd_o^2 B / D
    h_i  = p_i (b_i - B), or p_i rstd_o ((b_i - B) - c (e_i - E));       g_i = scale * rstd_i * h_i
    dv_i = p_i dm + g_i u - (rstd_i^2 logit_i h_i / D) v_i
    du   = sum_tokens sum_i g_i v_i                                      d_w_out = sum_tokens d_out * rstd_o m

Roles and rings are the row kernel's (mix_ring.py); the rows of a token are d_out, then the sources. Here they stay in shared
memory until the last pass over them:

    pass 1   as the rows arrive: b_i, and m for the norm
    pass 2   for the norm: e_i. Its input m is cheaper to make again than to read, even where the forward kept it.
    sums     one exchange over the group's warps gives all of a token's scalars: with B and E, the norm needs no exchange of its own
    pass 3   dv_i, straight to device memory; du, in registers over all tokens of the CTA; the slots go back to the producer

Deterministic: every sum has a fixed order.

Sources of scaled fp16 (values * s_i, s_i a power of two for each row) may be of any magnitude, whose squares leave fp32's range. A
token is worked on in its unit, the largest of its scales or one: what sources, m, b_i, e_i are divided by, exactly. The passes
multiply values; scales enter by the factors of a source alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator
from cutlass.pipeline import PipelineState

from cute_kernels.config_mix_bwd import BackwardOperands, MixBwdConfig
from cute_kernels.config_rows import PRODUCER_REGISTERS
from cute_kernels.device.cluster import sync_cluster
from cute_kernels.device.mix import TYPES, Scalars
from cute_kernels.device.mix_ring import RingKernel, RowReader
from cute_kernels.device.mma import opaque, store_cluster
from cute_kernels.device.pipelines import (
    NamedBarrier,
    RowRings,
    RowTable,
    await_barriers,
    consumer_state,
    global_row,
    publish_barriers,
)
from cute_kernels.device.rounding import inverse
from cute_kernels.device.rows import (
    LANES,
    VECTOR,
    GroupExchange,
    RowSums,
    RowTile,
    add,
    exp_difference,
    pack,
    reciprocal_root,
    select,
    strided_fp32,
    tree,
    unpack,
    vector_fp32,
    warp_max,
    warp_sum,
)

Vectors = list[list[Float32]]  # [vectors][VECTOR]: a thread's part of a row


class Part(NamedTuple):
    """Up to 16 sources whose sums are reduced together, so that each lands in one lane."""

    index: int
    sources: range
    sums: RowSums
    source: Int32  # the one that this lane owns, or -1
    scales: Int64 | None  # of scaled fp16: where that source's scales are, and elements from one token to the next
    scale_stride: Int64 | None

    def spread(self, numbers: list[Float32], i: int) -> Float32:
        """The number of the part's source i, from its owner to every lane."""
        return self.sums.spread_one([numbers[self.index]], i)


class MixBwdKernel(RingKernel):
    def __init__(self, config: MixBwdConfig):
        super().__init__(config)
        self.cluster = config.cluster
        self.source_type = Float16 if config.scaled else self.dtype

    @property
    def columns(self) -> int:
        return self.config.columns

    @cute.jit
    def __call__(
        self,
        rows: list,  # addresses of the rows of token 0 in ring order: d_out, sources
        strides: list,  # elements from one token to the next
        operands: BackwardOperands,
        tokens: Int32,
        output_eps: Float32,
        scale: Float32,
        grid: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(rows, strides, operands, Scalars(tokens, Float32(0.0), output_eps, scale)).launch(
            grid=[grid, 1, 1],
            block=[self.tile.threads, 1, 1],
            cluster=[self.cluster, 1, 1] if self.cluster > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, rows: list, strides: list, operands: BackwardOperands, scalars: Scalars):
        config, tile = self.config, self.tile
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cute.arch.griddepcontrol_launch_dependents()
        smem = SmemAllocator()
        rings = RowRings.allocate(
            smem,
            self.dtype,
            groups=tile.groups,
            slots=tile.slots,
            rows=tile.rows,
            pitch=config.pitch,
            elements=self.columns,
            consumer_warps=tile.warps,
        )
        table = RowTable.allocate(smem, config.rows_per_token, tile.producer_warps)
        finished = smem.allocate_array(Int64, 1)  # mbarrier of all consumers
        s_partials, arrived, s_weight = None, None, None
        if const_expr(config.exchange_warps > 1):
            # (LANES * depth, warps of all CTAs, 2, groups)
            shape = (LANES * len(config.parts), config.exchange_warps, 2, tile.groups)
            s_partials = smem.allocate_tensor(Float32, cute.make_layout(shape), 16)
        if const_expr(self.cluster > 1):
            arrived = smem.allocate_array(Int64, tile.groups * 2)  # [groups, 2] mbarriers of the exchange
        if const_expr(config.output_weight is not None):
            s_weight = smem.allocate_tensor(Float32, cute.make_layout((config.pitch,)), 16)  # (pitch,)
        if warp >= tile.consumer_warps:
            producer = warp - tile.consumer_warps
            with cute.arch.elect_one():
                rings.init_barriers(producer, tile.producer_warps)
                self.init_barriers(finished, arrived, producer)
            publish_barriers(tile.threads)
            self.sync_cluster()
            if const_expr(tile.consumer_registers > 0):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            cute.arch.griddepcontrol_wait()
            with cute.arch.elect_one():
                item = self.dtype.width // 8
                addresses = [row + Int64(self.rank()) * (self.columns * item) for row in rows]
                table.of(producer).fill(addresses, strides, item)
                self.produce(producer, rings, table.of(producer), scalars)
        else:
            rank = self.rank()
            own = self.own_columns(operands, rank)
            if const_expr(config.pitch > self.columns):
                rings.clear_padding(tid, tile.consumer_warps * LANES)
            cute.arch.griddepcontrol_wait()
            if const_expr(config.output_weight is not None):
                self.stage_weight(tid, s_weight, own)
            if const_expr(config.pitch > self.columns or config.output_weight is not None):
                self.sync_consumers()
            await_barriers(tile.threads)
            self.sync_cluster()
            if const_expr(tile.consumer_registers > 0):
                cute.arch.setmaxregister_increase(tile.consumer_registers)
            self.consume(tid, warp, rank, rings, s_partials, arrived, finished, s_weight, own, scalars)
        # No CTA may leave while another can still write to its shared memory.
        self.sync_cluster()

    def rank(self) -> Int32:
        """Of the CTA in its cluster. By each role for itself: a number kept across their branch was spilled."""
        return cute.arch.block_idx_in_cluster() if self.cluster > 1 else Int32(0)

    def sync_cluster(self) -> None:
        if self.cluster > 1:
            sync_cluster(self.cluster)

    def sync_consumers(self) -> None:
        cute.arch.barrier(barrier_id=NamedBarrier.CTA, number_of_threads=self.tile.consumer_warps * LANES)

    @cute.jit
    def init_barriers(self, finished: cute.Pointer, arrived: cute.Pointer | None, producer: Int32):
        if producer == 0:
            cute.arch.mbarrier_init(finished, self.tile.consumer_warps * LANES)
            if const_expr(self.cluster > 1):
                for i in cutlass.range_constexpr(self.tile.groups * 2):
                    cute.arch.mbarrier_init(arrived + i, 1)

    def turns(self) -> tuple[Int32, Int32]:
        """The CTAs of a cluster take the same tokens, a part of their columns each."""
        block, grid = super().turns()
        return block // self.cluster, grid // self.cluster

    def own_columns(self, operands: BackwardOperands, rank: Int32) -> BackwardOperands:
        """With the addresses of this CTA's first column."""

        def shift(address: Int64, kind: str | None) -> Int64:
            return address if kind is None else address + Int64(rank) * (self.columns * TYPES[kind].width // 8)

        config = self.config
        return operands._replace(
            query=shift(operands.query, config.query),
            key_weight=shift(operands.key_weight, config.key_weight),
            output_weight=shift(operands.output_weight, config.output_weight),
            sums=shift(operands.sums, "fp32"),
        )

    @cute.jit
    def consume(
        self,
        tid,
        warp,
        rank,
        rings,
        s_partials,
        arrived,
        finished,
        s_weight,
        operands: BackwardOperands,
        scalars: Scalars,
    ):
        """The gradients of one group's tokens: group, group + groups, ... of this CTA's; then the sums over all tokens."""
        config, tile = self.config, self.tile
        group, lane = warp // tile.warps, tid % LANES
        row_tile = RowTile(self.columns, tile.warps, tid - group * (tile.warps * LANES))
        ring = rings.of(group)
        r_u = self.load_key(row_tile, operands)
        r_du, r_d_weight = row_tile.fragment(Float32), row_tile.fragment(Float32)
        r_du.fill(0.0)
        r_d_weight.fill(0.0)
        parts = self.parts(lane, operands)
        r_statistics = cute.make_rmem_tensor(((2 + config.scaled) * len(parts) + 1,), Float32)
        self.load_statistics(r_statistics, parts, operands, scalars, group)
        count = self.token_count(scalars)
        state = consumer_state(tile.slots)
        turn = Int32(0)
        for i in cutlass.range(group, count, tile.groups, unroll=1):
            exchange = self.exchange(s_partials, arrived, group, warp % tile.warps, lane, rank, turn)
            first = RowReader(config, ring, state.clone(), row_tile, keep=True)
            state = self.mix_gradient(
                i, first, exchange, parts, r_statistics, r_u, r_du, r_d_weight, s_weight, operands, scalars
            )
            turn = exchange.turn
        self.store_sum(group, rings, finished, row_tile, r_du, operands.sums, 0)
        if const_expr(config.output_weight is not None):
            self.store_sum(group, rings, finished, row_tile, r_d_weight, operands.sums, 1)

    def exchange(self, s_partials, arrived, group: Int32, warp: Int32, lane: Int32, rank: Int32, turn: Int32):
        warps = self.tile.warps
        if self.cluster == 1:
            return GroupExchange(s_partials, group, warp, lane, warps, turn)
        return RingClusterExchange(s_partials, arrived, group, warp, lane, warps, rank, turn)

    def parts(self, lane: Int32, operands: BackwardOperands) -> list[Part]:
        parts = []
        for index, sources in enumerate(self.config.parts):
            sums = RowSums(len(sources))
            (row,) = sums.rows_of(lane)
            source = select(row >= 0, row + sources.start, row)
            scales = stride = None
            if self.config.scaled:
                scales, stride = operands.scales[sources.start], operands.scale_strides[sources.start]
                for i in sources[1:]:
                    scales = select(source == i, operands.scales[i], scales)
                    stride = select(source == i, operands.scale_strides[i], stride)
            parts.append(Part(index, sources, sums, source, scales, stride))
        return parts

    def load_statistics(self, r_statistics, parts: list[Part], operands, scalars: Scalars, turn: Int32) -> None:
        """logit, rstd and scale of this lane's sources, and lse, of the group's token at `turn`, or of the last token."""
        tokens = scalars.tokens
        token = cutlass.min(self.token(turn), tokens - 1)
        for k, part in enumerate(parts):
            row = Int64(cutlass.max(part.source, 0)) * tokens * 4
            r_statistics[k] = vector_fp32(operands.logits + row, tokens)[token]
            r_statistics[len(parts) + k] = vector_fp32(operands.rstd + row, tokens)[token]
            if self.config.scaled:
                r_statistics[2 * len(parts) + 1 + k] = strided_fp32(part.scales, part.scale_stride, token)
        r_statistics[2 * len(parts)] = vector_fp32(operands.lse, tokens)[token]

    def mix_gradient(
        self, turn: Int32, arriving, exchange, parts, r_statistics, r_u, r_du, r_d_weight, s_weight, operands, scalars
    ) -> PipelineState:
        """The group's token at `turn`: dv_i to device memory; adds to du, and to the output weight's gradient.

        Returns where the next token begins in the ring.
        """
        start = arriving.state.clone()
        statistics = [r_statistics[k] for k in range(cute.size(r_statistics))]
        count = len(parts)
        logits, rstd, lse, scales = statistics[:count], statistics[count : 2 * count], statistics[2 * count], None
        # Scalars of sources are lists with a number for each part, in the lane that owns the source; zero in the others.
        p = [
            select(part.source >= 0, exp_difference(logit, lse), Float32(0.0))
            for part, logit in zip(parts, logits, strict=True)
        ]
        unit, down, shares = Float32(1.0), None, p
        if self.config.scaled:
            scales = [
                select(part.source >= 0, scale, Float32(0.0))
                for part, scale in zip(parts, statistics[2 * count + 1 :], strict=True)
            ]
            unit = cute.arch.fmax(warp_max(tree(cute.arch.fmax, scales)), 1.0)
            down = [scale * inverse(unit) for scale in scales]
            shares = multiply(p, down)
        one_over_d = Float32(1.0 / self.config.hidden_size)
        if s_weight is None:
            d_mix = unpack_row(arriving.next())
            b = exchange.sum(self.products(arriving, parts, d_mix, exchange.lane))
            last = another_pass(arriving, start, keep=False)
            last.skip()
            b = multiply(b, scales)
            (b_mean,) = weighted_means(p, b)
            h = [p_k * (b_k - b_mean) for p_k, b_k in zip(p, b, strict=True)]
        else:
            s_part = arriving.part.view(s_weight)
            x = self.weighted_gradient(arriving, s_part)
            mix = [[Float32(0.0)] * VECTOR for _ in x]
            b = self.products(arriving, parts, x, exchange.lane, shares, mix)
            again = another_pass(arriving, start, keep=True)
            again.skip()
            e = self.products(again, parts, mix, exchange.lane)
            totals = exchange.sum([select(exchange.lane < LANES // 2, b_k, e_k) for b_k, e_k in zip(b, e, strict=True)])
            pairs = [part.sums.pair(total, exchange.lane) for part, total in zip(parts, totals, strict=True)]
            b, e = (multiply([pair[k] for pair in pairs], down) for k in range(2))
            b_mean, e_mean = weighted_means(p, b, e)
            eps = scalars.output_eps
            if self.config.scaled:
                eps = eps * inverse(unit) * inverse(unit)
            output_rstd = reciprocal_root(cute.arch.fmax(e_mean, 0.0) * one_over_d + eps)  # of m in the token's unit
            c = output_rstd * output_rstd * b_mean * one_over_d
            h = [
                p_k * (output_rstd * ((b_k - b_mean) - c * (e_k - e_mean)))
                for p_k, b_k, e_k in zip(p, b, e, strict=True)
            ]
            last = another_pass(arriving, start, keep=False)
            d_mix = self.norm_gradient(last, s_part, mix, output_rstd, c, unit, r_d_weight)
        # Their sum is zero; what rounding leaves of it would add a multiple of m to du, and where the sources are nearly the same
        # the rest of du is small beside m.
        (rest,) = weighted_means([Float32(1.0)] * len(h), h)
        h = [h_k - p_k * rest for p_k, h_k in zip(p, h, strict=True)]
        g = [scalars.scale * (rstd_k * h_k) for rstd_k, h_k in zip(rstd, h, strict=True)]
        values_rstd = multiply(rstd, scales)  # not rstd^2 of scaled sources: fp32 has no square of a large row's
        pull = [
            values_rstd_k * rstd_k * logit * h_k * one_over_d
            for values_rstd_k, rstd_k, logit, h_k in zip(values_rstd, rstd, logits, h, strict=True)
        ]
        factors = [p, pull, g] if scales is None else [p, pull, g, multiply(g, scales)]
        # Now, to be there for the next token; sooner they would take registers from the passes before.
        self.load_statistics(r_statistics, parts, operands, scalars, turn + self.tile.groups)
        self.store_gradients(self.token(turn), last, parts, factors, d_mix, r_u, r_du, operands)
        return last.state

    def products(
        self,
        rows: RowReader,
        parts: list[Part],
        x: Vectors,
        lane: Int32,
        p: list[Float32] | None = None,
        mix: Vectors | None = None,
    ) -> list[Float32]:
        """<x, v_i> over the warp's columns, in lanes l and l + 16; adds p_i v_i to `mix`."""
        products, even, odd = [], [], []
        for part, i, r_row in one_ahead(rows, parts):
            share = None if p is None else part.spread(p, i)
            # Two accumulators keep a lone warp's FMA pipe busy; as a pair they cost the reduction nothing more.
            sums = [Float32(0.0)] * 2
            for v, vector in enumerate(x):
                row = self.source_vector(r_row, v)
                for k in range(VECTOR):
                    sums[k % 2] = sums[k % 2] + vector[k] * row[k]
                    if share is not None:
                        mix[v][k] = mix[v][k] + share * row[k]
            even.append(sums[0])
            odd.append(sums[1])
            if i == len(part.sources) - 1:
                (half,) = part.sums.reduce(even, odd, lane)
                products.append(half + cute.arch.shuffle_sync_bfly(half, offset=16))
                even, odd = [], []
        return products

    def source_vector(self, r_row: cute.Tensor, v: int) -> list[Float32]:
        """Vector v of a source's row, of scaled fp16 its values."""
        return unpack(cute.recast_tensor(r_row, self.source_type), v)

    def weighted_gradient(self, rows: RowReader, s_part) -> Vectors:
        """d_out * w_out."""
        r_d_out, x = rows.next(), []
        for v in range(rows.part.vectors):
            x.append([d * w for d, w in zip(unpack(r_d_out, v), load_vector(s_part, v), strict=True)])
        return x

    def norm_gradient(self, last: RowReader, s_part, mix: Vectors, output_rstd, c, unit, r_d_weight) -> Vectors:
        """dm; adds d_out * rstd_o m to the output weight's gradient. output_rstd, c and the mix are in the token's unit."""
        r_d_out = last.next()
        down_rstd = output_rstd * inverse(unit) if self.config.scaled else output_rstd
        d_mix = []
        for v, vector in enumerate(mix):
            d_out, weight = unpack(r_d_out, v), load_vector(s_part, v)
            for k in range(VECTOR):
                r_d_weight[k, v] = r_d_weight[k, v] + d_out[k] * (vector[k] * output_rstd)
            d_mix.append([down_rstd * (d_out[k] * weight[k] - c * vector[k]) for k in range(VECTOR)])
        return d_mix

    def store_gradients(self, token, rows: RowReader, parts, factors, d_mix: Vectors, r_u, r_du, operands) -> None:
        row_tile = rows.part
        first_column = self.rank() * self.columns
        for part, i, r_row in one_ahead(rows, parts):
            source = part.sources[i]
            p, pull, g, *scaled_g = (part.spread(factor, i) for factor in factors)
            values_g = scaled_g[0] if scaled_g else g
            # Were they known to be the same for all rows, the addresses of all rows would be computed ahead, and spill.
            row, column = opaque(token), opaque(first_column)
            address = operands.d_sources[source] + Int64(column) * (self.dtype.width // 8)
            g_row = global_row(self.dtype, address, operands.d_strides[source], row, self.columns)
            for v, vector in enumerate(d_mix):
                source_row, gradient = self.source_vector(r_row, v), []
                for k in range(VECTOR):
                    gradient.append(p * vector[k] + (g * r_u[k, v] - pull * source_row[k]))
                    r_du[k, v] = r_du[k, v] + values_g * source_row[k]
                row_tile.store_vector(pack(gradient, self.dtype), g_row, v)

    @cute.jit
    def store_sum(
        self,
        group: Int32,
        rings: RowRings,
        finished: cute.Pointer,
        row_tile: RowTile,
        r_sum: cute.Tensor,
        address: Int64,
        row: cutlass.Constexpr,
    ):
        """Adds the groups' sums up in order, by way of their rings, which are empty by now; they become a row of the cluster's."""
        pitch, rows, slots, groups = rings.s_rows.shape
        memory = cute.recast_ptr(rings.s_rows.iterator, dtype=Float32)
        s_sums = cute.make_tensor(memory, cute.make_layout((pitch, groups), stride=(1, pitch * rows * slots // 2)))
        await_all(finished, 0)  # other warps of the group may still read their parts of its last rows
        if group > 0:
            cute.autovec_copy(r_sum, row_tile.view(s_sums[None, group]))
        await_all(finished, 1)
        if group == 0:
            cluster, _ = self.turns()
            count = 1 if const_expr(self.config.output_weight is None) else 2
            g_row = global_row(Float32, address, self.config.hidden_size, cluster * count + row, self.columns)
            for v in cutlass.range_constexpr(row_tile.vectors):
                total = [r_sum[k, v] for k in range(VECTOR)]
                for other in range(1, groups):
                    more = load_vector(row_tile.view(s_sums[None, other]), v)
                    total = [a + b for a, b in zip(total, more, strict=True)]
                row_tile.store_vector(pack(total, Float32), g_row, v)


def await_all(barrier: cute.Pointer, phase: int) -> None:
    """By every consumer thread: until all of them are here. racecheck follows it, where it loses named barriers of some warps."""
    cute.arch.mbarrier_arrive(barrier)
    cute.arch.mbarrier_wait(barrier, phase)


class RingClusterExchange:
    """GroupExchange over the group's warps in every CTA of a cluster: each warp sends its values to each CTA, where an mbarrier
    counts their bytes. (rows.ClusterExchange is for a CTA's only token: no buffers in turn, no phases.)

    Two buffers in turn: a warp sends to buffer b again only after a wait for sums that its peers sent after their reads of b.
    """

    def __init__(
        self,
        s_partials: cute.Tensor,  # (LANES * depth, warps of all CTAs, 2 buffers, groups)
        barriers: cute.Pointer,  # [groups, 2] mbarriers for one arrival
        group: Int32,
        warp: Int32,
        lane: Int32,
        warps: int,
        rank: Int32,
        turn: Int32,
    ):
        self.s_partials, self.barriers, self.group, self.warp, self.lane = s_partials, barriers, group, warp, lane
        self.warps, self.rank, self.turn = warps, rank, turn

    def sum(self, values: list[Float32]) -> list[Float32]:
        """Each lane's values summed over the same lane of all warps of all CTAs."""
        depth, senders, _, _ = self.s_partials.shape
        s_buffer = self.s_partials[None, None, self.turn % 2, self.group]
        barrier = self.barriers + (self.group * 2 + self.turn % 2)
        phase = self.turn // 2 % 2
        self.turn = self.turn + 1
        expect_bytes(barrier, self.warp, senders * LANES * len(values) * 4)
        sent = Int32(s_buffer.iterator.toint()) + ((self.rank * self.warps + self.warp) * depth + self.lane) * 4
        for cta in range(senders // self.warps):
            for k, value in enumerate(values):
                store_cluster(sent + k * LANES * 4, Int32(barrier.toint()), Int32(cta), [value])
        cute.arch.mbarrier_wait(barrier, phase)
        lanes = [k * LANES + self.lane for k in range(len(values))]
        return [sum_over_senders(s_buffer, lane, senders) for lane in lanes]


@cute.jit
def sum_over_senders(s_buffer: cute.Tensor, lane: Int32, senders: cutlass.Constexpr) -> Float32:
    """A loop: all loads at once spilled."""
    total = Float32(0.0)
    for sender in cutlass.range(senders, unroll=4):
        total = total + s_buffer[lane, sender]
    return total


@cute.jit
def expect_bytes(barrier: cute.Pointer, warp: Int32, count: cutlass.Constexpr) -> None:
    """By the group's first warp: the barrier's phase ends when that many bytes have arrived."""
    if warp == 0:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, count)


def another_pass(rows: RowReader, start: PipelineState, keep: bool) -> RowReader:
    """Over the same token.

    Where the compiler knows that positions are those of the pass before, it keeps the addresses of all slots for it, and spills.
    """
    state = PipelineState(start.stages, start.count, opaque(start.index), opaque(start.phase))
    return RowReader(rows.config, rows.ring, state, rows.part, keep)


def one_ahead(rows: RowReader, parts: list[Part]) -> Iterator[tuple[Part, int, cute.Tensor]]:
    """(part, index in the part, row) of all sources. The next row is on its way when a row is handed out, to cover its latency."""
    places = [(part, i) for part in parts for i in range(len(part.sources))]
    r_next = rows.next()
    for n, (part, i) in enumerate(places):
        r_row = r_next
        if n + 1 < len(places):
            r_next = rows.next()
        else:
            rows.release()
        yield part, i, r_row


def unpack_row(r_row: cute.Tensor) -> Vectors:
    return [unpack(r_row, v) for v in range(cute.size(r_row, mode=[1]))]


def load_vector(s_part: cute.Tensor, v: int) -> list[Float32]:
    """Vector v of (VECTOR, vectors) fp32 in shared memory."""
    r_vector = cute.make_rmem_tensor((VECTOR,), Float32)
    cute.autovec_copy(s_part[None, v], r_vector)
    return [r_vector[k] for k in range(VECTOR)]


def multiply(numbers: list[Float32], factors: list[Float32] | None) -> list[Float32]:
    return numbers if factors is None else [a * b for a, b in zip(numbers, factors, strict=True)]


def weighted_means(p: list[Float32], *numbers: list[Float32]) -> list[Float32]:
    """sum_i p_i a_i of each list of numbers a, in every lane."""
    return [warp_sum(tree(add, [p_k * a_k for p_k, a_k in zip(p, a, strict=True)])) for a in numbers]
