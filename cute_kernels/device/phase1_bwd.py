"""The kernel behind phase1_bwd: gradients of S queries' mixes of the same N source rows, on tensor cores.

    a_sn = <do_s, v_n>      h_sn = p_sn (a_sn - sum_k p_sk a_sk + d_lse_s)      g_sn = scale * rstd_n * h_sn
    d_v_n = sum_s p_sn do_s + sum_s g_sn u_s - (rstd_n^2 / D) (sum_s logit_sn h_sn) v_n      du_s = sum_tokens sum_n g_sn v_n

The hidden dimension is split over the CTAs of a cluster, then over consumer warps; all walk the same tokens. Per token,
a warp does

    products   gradients of outputs [8s x D-slice] times sources^T [D-slice x 8]
    exchange   sums of these over all warps and CTAs: each warp adds up one share and sends it to every CTA
    weights    in every warp, from the sums: p, g and the pull become mma operands in place
    mix        p^T and g^T [8 high and 8 low x 8s] times gradients of outputs and queries [8s x D-slice], and
               g and the pull [8s x 8] times sources [8 x D-slice], which adds to du in registers

in the order products(k + 1), weights(k), mix(k), exchange(k + 1), so that no warp waits for a sum that was sent just
before. Three more warps work beside them: one keeps a ring of slots full, each the rows of a token; one fetches the
token's statistics; one stores the sources' gradients that consumers stage in shared memory.

Rows are read from device memory once. Deterministic: every sum has a fixed order.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Int64, const_expr

from cute_kernels.config import ITEM_BYTES, LANES, VECTOR
from cute_kernels.config_phase1 import OCTET
from cute_kernels.config_phase1_bwd import CONSUMER_REGISTERS, OTHER_REGISTERS, STEP, Phase1BwdConfig
from cute_kernels.device.mma import (
    Pair,
    bulk_load,
    bulk_store,
    ldmatrix,
    load_scalar,
    load_shared,
    mma,
    mma_k8,
    pack,
    power_of_two_scale,
    select,
    split_vector,
    store_cluster,
    store_pair,
    store_shared,
    transpose,
    unpack,
)
from cute_kernels.device.phase1 import TYPES, QueryReader, Work
from cute_kernels.device.pipelines import EVICT_FIRST, producer_state
from cute_kernels.device.rows import add, exp_difference, tree

ITEM = ITEM_BYTES
TILES = STEP // 8  # mma tiles of columns that one ldmatrix covers
CONSUMERS = 1  # the named barrier of consumers and the statistics warp


class Memory:
    """Byte addresses in shared memory, and the mbarriers."""

    def __init__(self, config: Phase1BwdConfig, base: cute.Pointer):
        tile = config.tile
        # [slots, slot_rows, row_bytes]: sources, gradients of outputs, gradients of sources that are added to
        self.ring = Int32(base.toint())
        # [terms, S, row_bytes]
        queries_at = tile.slots * config.slot_bytes
        self.queries = self.ring + queries_at
        # [stages, N, row_bytes]
        stage_at = queries_at + config.query_bytes
        self.stage = self.ring + stage_at
        # [2 buffers, statistics_bytes]
        statistics_at = stage_at + tile.stages * config.stage_bytes
        self.statistics = self.ring + statistics_at
        # [2 buffers, warps, partial_bytes]
        partial_at = statistics_at + 2 * config.statistics_bytes
        self.partial = self.ring + partial_at
        # [2 buffers, CTAs of the cluster, partial_bytes]
        self.reduced = self.partial + 2 * tile.warps * config.partial_bytes
        barriers = cute.recast_ptr(base + (statistics_at + config.exchange_bytes), dtype=Int64)
        # [slots]: the slot's bytes have landed; every warp is done with it
        self.full, self.empty = barriers, barriers + tile.slots
        # [stages]: every warp has written its columns; the stores have read them
        self.staged = barriers + 2 * tile.slots
        self.stored = self.staged + tile.stages
        # [2 buffers]: every share of the totals is there
        self.reduced_ready = self.stored + tile.stages
        self.reduced_ready_address = Int32(self.reduced_ready.toint())


class Lane(NamedTuple):
    """A consumer thread's place: c and q are the mma coordinates of device/mma.py."""

    warp: Int32
    lane: Int32
    c: Int32
    q: Int32
    column: Int32  # first column of the warp's slice, in the whole row
    offset: Int32  # of the warp's slice, in bytes of a row in shared memory


class Statistics(NamedTuple):
    """Device addresses of what the forward saved, fp32, and of lse's gradient (0: none)."""

    lse: Int64  # [S, T]
    logits: Int64  # [S, N, T]
    rstd: Int64  # [N, T]
    d_lse: Int64  # [S, T]


class Weights(NamedTuple):
    """A token's weights as mma operands, octets of queries in turn."""

    # [octets] (high, low): rows are sources, K the octet's queries
    p: list[tuple[Pair, Pair]]
    g: list[tuple[Pair, Pair]]
    # [octets + 1][terms]: rows are the octet's queries, K the sources; last comes the pull, on its diagonal
    of_sources: list[list[Pair]]
    # undoes the power of two of fp16 weights
    unscale: Float32 | None


class Phase1BwdKernel:
    def __init__(self, config: Phase1BwdConfig):
        self.config, self.tile = config, config.tile
        self.dtype = TYPES[config.dtype]
        self.warp_columns = config.tile.columns
        self.ragged = config.ragged
        self.adds_apart = config.adds_apart
        # A row's first bytes in its slot
        self.d_out_at = config.num_sources * config.tile.row_bytes
        self.addend_at = self.d_out_at + config.num_queries * config.tile.row_bytes

    @cute.jit
    def __call__(
        self,
        d_out: Int64,  # [S, T, D]
        d_lse: Int64,  # [S, T] fp32, when there is one
        sources: list,  # N addresses of [T, D]
        strides: list,  # elements from one token to the next
        queries: Int64,  # [S, D]
        query_stride: Int64,
        key_weights: Int64,  # [S, D], when there are any
        key_weight_stride: Int64,
        lse: Int64,
        logits: Int64,
        rstd: Int64,
        d_sources: list,  # N addresses of [T, D]
        d_strides: list,
        du: Int64,  # [clusters, S, D] fp32
        tokens: Int32,
        scale: Float32,
        grid: Int32,
        stream: cuda.CUstream,
    ):
        cluster = self.tile.cluster
        self.kernel(
            d_out,
            sources,
            strides,
            queries,
            query_stride,
            key_weights,
            key_weight_stride,
            Statistics(lse, logits, rstd, d_lse),
            d_sources,
            d_strides,
            du,
            tokens,
            scale,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[cluster, 1, 1] if cluster > 1 else None,
            smem=self.config.shared_bytes,
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        d_out: Int64,
        sources: list,
        strides: list,
        queries: Int64,
        query_stride: Int64,
        key_weights: Int64,
        key_weight_stride: Int64,
        statistics: Statistics,
        d_sources: list,
        d_strides: list,
        du: Int64,
        tokens: Int32,
        scale: Float32,
    ):
        tile = self.tile
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        base = cutlass.utils.SmemAllocator().allocate(self.config.shared_bytes - 1024, 1024)
        memory = Memory(self.config, base)

        if thread == 0:
            self.init_barriers(memory)
        if const_expr(self.ragged):
            self.clear(memory, thread)
        cute.arch.mbarrier_init_fence()
        self.sync()

        first = tile.consumer_warps
        if warp >= first:
            if const_expr(tile.moves_registers):
                cute.arch.setmaxregister_decrease(OTHER_REGISTERS)
            if warp == first:
                with cute.arch.elect_one():
                    self.load(memory, self.work(tokens), d_out, sources, strides, d_sources, d_strides)
                cute.arch.sync_warp()
            if warp == first + 1:
                self.fetch_statistics(memory, self.work(tokens), statistics, thread % LANES, scale)
            if warp == first + 2:
                with cute.arch.elect_one():
                    self.store(memory, self.work(tokens), d_sources, d_strides)
                cute.arch.sync_warp()
        else:
            if const_expr(tile.moves_registers):
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            if warp < tile.warps:
                work = self.work(tokens)
                lane = self.place(work, warp, thread % LANES)
                self.load_queries(memory, lane, queries, query_stride, key_weights, key_weight_stride)
                self.consume(memory, work, lane, du)
        if const_expr(tile.cluster > 1):
            # No CTA may leave while another can still write to its shared memory.
            self.sync()

    def work(self, tokens: Int32) -> Work:
        """By each role for itself: kept across the branch, its numbers were spilled for want of producer registers."""
        cluster = self.tile.cluster
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        rank = cute.arch.block_idx_in_cluster() if cluster > 1 else Int32(0)
        first, step = block // cluster, blocks // cluster
        return Work(rank, first, step, (tokens - first + step - 1) // step, tokens)

    def sync(self) -> None:
        """All threads of the cluster."""
        cute.arch.sync_warp()
        if self.tile.cluster > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.barrier()

    def init_barriers(self, memory: Memory) -> None:
        tile = self.tile
        for slot in range(tile.slots):
            cute.arch.mbarrier_init(memory.full + slot, 1)
            cute.arch.mbarrier_init(memory.empty + slot, tile.warps)
        for stage in range(tile.stages):
            cute.arch.mbarrier_init(memory.staged + stage, tile.warps)
            cute.arch.mbarrier_init(memory.stored + stage, 1)
        for buffer in range(2):
            # Shares arrive as bytes; the one arrival announces how many.
            cute.arch.mbarrier_init(memory.reduced_ready + buffer, 1)

    @cute.jit
    def clear(self, memory: Memory, thread: Int32):
        """Zeros where no copy writes: they enter the products, and what shared memory holds at first may be a NaN."""
        end = self.tile.slots * self.config.slot_bytes
        zero = Int32(0)
        for offset in cutlass.range(thread * 16, end, self.config.threads * 16, unroll=1):
            store_shared(memory.ring + offset, 0, [zero, zero, zero, zero])
        cute.arch.fence_view_async_shared()

    def part(self, work: Work) -> tuple[Int32, Int32, cutlass.Boolean | None]:
        """(first column, bytes, whether there are any) of this CTA's part of a row."""
        column = work.rank * self.tile.cta_columns
        size = Int32(self.tile.cta_columns * ITEM)
        if not self.ragged:
            return column, size, None
        size = cutlass.max(cutlass.min(size, (self.config.hidden_size - column) * ITEM), 0)
        return column, size, size > 0

    # Loads

    @cute.jit
    def load(self, memory: Memory, work: Work, d_out: Int64, sources: list, strides: list, d_sources: list, d_strides: list):
        """Fills the ring with the tokens' rows."""
        config, row_bytes = self.config, self.tile.row_bytes
        column, size, some = self.part(work)
        state = producer_state(self.tile.slots)
        row_stride = Int64(work.tokens) * (config.hidden_size * ITEM)
        for turn in cutlass.range(work.items, unroll=1):
            token = Int64(work.item(turn))
            cute.arch.mbarrier_wait(memory.empty + state.index, state.phase)
            cute.arch.mbarrier_arrive_and_expect_tx(memory.full + state.index, size * config.slot_rows)
            slot = memory.ring + state.index * config.slot_bytes
            barrier = Int32((memory.full + state.index).toint())
            for n in cutlass.range_constexpr(config.num_sources):
                address = sources[n] + (token * strides[n] + column) * ITEM
                bulk_load(slot + n * row_bytes, address, size, barrier, EVICT_FIRST, some)
            address = d_out + (token * config.hidden_size + column) * ITEM
            for s in cutlass.range(config.num_queries, unroll=4):
                at = slot + self.d_out_at + s * row_bytes
                bulk_load(at, address + s * row_stride, size, barrier, EVICT_FIRST, some)
            if const_expr(config.accumulate):
                for n in cutlass.range_constexpr(config.num_sources):
                    address = d_sources[n] + (token * d_strides[n] + column) * ITEM
                    bulk_load(slot + self.addend_at + n * row_bytes, address, size, barrier, EVICT_FIRST, some)
            state.advance()

    # Statistics

    @cute.jit
    def fetch_statistics(self, memory: Memory, work: Work, statistics: Statistics, lane: Int32, scale: Float32):
        """Each token's p, logits and factors, one token ahead of the consumers; lane 8i + n takes rows of source n.

        Two buffers: the consumers read those of token k between the barriers of k and k + 1, in both of which this warp
        takes part.
        """
        config = self.config
        octets = config.octets
        r_loaded = cute.make_rmem_tensor((4 * octets + 2,), Float32)
        self.load_statistics(work, statistics, lane, Int32(0), r_loaded)
        for turn in cutlass.range(work.items, unroll=1):
            at = memory.statistics + (turn & 1) * config.statistics_bytes
            for i in cutlass.range_constexpr(2 * octets):
                logit, lse = r_loaded[2 * i], r_loaded[2 * i + 1]
                query = i * 4 + lane // OCTET
                there = (query < config.num_queries) & (lane % OCTET < config.num_sources)
                p = select(there, exp_difference(logit, lse), Float32(0.0))
                store_shared(at + lane * 4, i * 128, [p])
                store_shared(at + lane * 4, octets * 256 + i * 128, [logit])
            rstd = r_loaded[4 * octets]
            factors = at + octets * 512 + lane * 4
            store_shared(factors, 0, [scale * rstd], lane < OCTET)
            store_shared(factors, 32, [rstd * rstd * Float32(1.0 / config.hidden_size)], lane < OCTET)
            store_shared(factors, 64, [r_loaded[4 * octets + 1]], lane < octets * OCTET)
            self.load_statistics(work, statistics, lane, turn + 1, r_loaded)
            cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=(self.tile.warps + 1) * LANES)

    def load_statistics(self, work: Work, statistics: Statistics, lane: Int32, turn: Int32, r_loaded: cute.Tensor) -> None:
        config = self.config
        sources, tokens = config.num_sources, Int64(work.tokens)
        token = work.item(turn)
        inside = token < work.tokens
        first, source = lane // OCTET, lane % OCTET
        position = (first * sources + source) * tokens + token
        for i in range(2 * config.octets):
            there = inside & (first + i * 4 < config.num_queries)
            logit = statistics.logits + (position + i * 4 * sources * tokens) * 4
            r_loaded[2 * i] = load_scalar(logit, there & (source < sources))
            r_loaded[2 * i + 1] = load_scalar(statistics.lse + ((first + i * 4) * tokens + token) * 4, there)
        position = (lane * tokens + token) * 4
        r_loaded[4 * config.octets] = load_scalar(statistics.rstd + position, inside & (lane < sources))
        if config.d_lse:
            d_lse = load_scalar(statistics.d_lse + position, inside & (lane < config.num_queries))
        else:
            d_lse = Float32(0.0)
        r_loaded[4 * config.octets + 1] = d_lse

    # Stores

    @cute.jit
    def store(self, memory: Memory, work: Work, d_sources: list, d_strides: list):
        """Staged rows to device memory."""
        stages = self.tile.stages
        column, size, some = self.part(work)
        present = cutlass.Boolean(size > 0)
        for turn in cutlass.range(work.items, unroll=1):
            token = Int64(work.item(turn))
            buffer = turn % stages
            cute.arch.mbarrier_wait(memory.staged + buffer, (turn // stages) & 1)
            stage = memory.stage + buffer * self.config.stage_bytes
            for n in cutlass.range_constexpr(self.config.num_sources):
                address = d_sources[n] + (token * d_strides[n] + column) * ITEM
                bulk_store(address, stage + n * self.tile.row_bytes, size, present)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.mbarrier_arrive(memory.stored + buffer)
        cute.arch.cp_async_bulk_wait_group(0)

    # Consumers

    def place(self, work: Work, warp: Int32, lane: Int32) -> Lane:
        return Lane(
            warp=warp,
            lane=lane,
            c=lane // 4,
            q=lane % 4,
            column=work.rank * self.tile.cta_columns + warp * self.warp_columns,
            offset=warp * (self.warp_columns * ITEM),
        )

    @cute.jit
    def load_queries(self, memory: Memory, lane: Lane, queries: Int64, query_stride, key_weights, key_weight_stride):
        """The terms of the effective queries over the warp's columns, to shared memory."""
        vectors = self.config.num_queries * self.warp_columns // VECTOR
        for index in cutlass.range(lane.lane, vectors, LANES, unroll=2):
            # Made in here: a loop cannot carry it
            reader = QueryReader(self, lane, queries, query_stride, key_weights, key_weight_stride)
            self.load_query_vector(memory, lane, reader, index)
        cute.arch.sync_warp()

    def load_query_vector(self, memory: Memory, lane: Lane, reader: QueryReader, index: Int32) -> None:
        config, row_bytes = self.config, self.tile.row_bytes
        per_row = self.warp_columns // VECTOR
        query, column = index // per_row, index % per_row * VECTOR
        given = reader.load(query, column)
        terms = given[:1]
        if config.query_terms > 1:
            terms = split_vector(self.dtype, reader.product(given), config.query_terms)
        at = memory.queries + lane.offset + query * row_bytes + column * ITEM
        for i, term in enumerate(terms):
            store_shared(at, i * config.num_queries * row_bytes, term)

    def octet_rows(self, lane: Lane, first: Int32, count: int) -> list[tuple[Int32, int]]:
        """(address, offset) that this lane gives to ldmatrix for 32 columns of each octet of `count` rows.

        Rows past the last repeat it: their weights are zero, and they belong to the same token.
        """
        row_bytes = self.tile.row_bytes
        base = first + lane.offset + (lane.lane // 8) * 16
        whole = base + (lane.lane % 8) * row_bytes
        rows = []
        for row in range(0, count, OCTET):
            if row + OCTET <= count:
                rows.append((whole, row * row_bytes))
            else:
                rows.append((base + cutlass.min(lane.lane % 8, count - row - 1) * row_bytes, row * row_bytes))
        return rows

    @cute.jit
    def consume(self, memory: Memory, work: Work, lane: Lane, du: Int64):
        config = self.config
        # [octets, tiles, 2] fp32: query c of the octet, columns 2q and 2q + 1 of the tile
        r_du = cute.make_rmem_tensor((2, self.warp_columns // 8, config.octets), Float32)
        r_du.fill(0.0)
        if const_expr(self.tile.ahead):
            # One turn more than there are tokens: each part of the code is there once.
            for turn in cutlass.range(work.items + 1, unroll=1):
                if turn < work.items:
                    self.products(memory, lane, turn)
                if turn > 0:
                    self.mix(memory, lane, turn - 1, self.weights(memory, lane, turn - 1), r_du)
                if turn < work.items:
                    self.exchange(memory, work, lane, turn)
        else:
            for turn in cutlass.range(work.items, unroll=1):
                self.products(memory, lane, turn)
                self.exchange(memory, work, lane, turn)
                self.mix(memory, lane, turn, self.weights(memory, lane, turn), r_du)
        self.store_du(work, lane, du, r_du)

    def slot(self, memory: Memory, turn: Int32) -> tuple[Int32, Int32, Int32]:
        """(index, parity of its full barrier, address)."""
        index = turn % self.tile.slots
        return index, (turn // self.tile.slots) & 1, memory.ring + index * self.config.slot_bytes

    def products(self, memory: Memory, lane: Lane, turn: Int32) -> None:
        """This warp's share of <do_s, v_n>, to its partial buffer.

        One ldmatrix of an octet of gradients is two operands in one, columns 0 to 7 and 16 to 23 of its 32 as rows 0 to
        7, the others as rows 8 to 15; sources come in that order, too. Half of each product is left out of the sums.
        """
        config = self.config
        index, parity, slot = self.slot(memory, turn)
        cute.arch.mbarrier_wait(memory.full + index, parity)
        row = cutlass.min(lane.lane % 8, config.num_sources - 1)
        piece = lane.lane // 8
        source_rows = slot + lane.offset + row * self.tile.row_bytes + (piece % 2 * 2 + piece // 2) * 16
        d_out_rows = self.octet_rows(lane, slot + self.d_out_at, config.num_queries)
        sums: list[list[list[Float32] | None]] = [[None, None] for _ in d_out_rows]
        for step in range(self.warp_columns // STEP):
            columns = step * STEP * ITEM
            source = ldmatrix(source_rows, columns)
            for octet, (address, offset) in enumerate(d_out_rows):
                four = ldmatrix(address, offset + columns)
                operand = ((four[0], four[2]), (four[1], four[3]))
                for half in range(2):
                    b = (source[2 * half], source[2 * half + 1])
                    sums[octet][half] = mma(self.dtype, operand, b, sums[octet][half])
            # See mix.
            cute.arch.sync_warp()
        share = memory.partial + ((turn & 1) * self.tile.warps + lane.warp) * config.partial_bytes
        for octet, (first, second) in enumerate(sums):
            store_shared(share + lane.lane * 8, octet * 256, [first[e] + second[2 + e] for e in range(2)])

    def exchange(self, memory: Memory, work: Work, lane: Lane, turn: Int32) -> None:
        """Makes the warps' partial sums common; over a cluster, adds this warp's share of them up and sends it to every
        CTA.

        Two buffers of each are enough: the barrier of k + 1 comes after every warp's reads of partial sums k, or of
        totals k - 1. A warp sends totals of k + 2 after it has seen all totals of k + 1, which were sent after such a
        barrier in each CTA.
        """
        config, tile = self.config, self.tile
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=(tile.warps + 1) * LANES)
        if tile.cluster == 1:
            return
        buffer = turn & 1
        self.announce_totals(memory, lane, buffer)
        vectors = config.partial_bytes // 16
        begin, end = lane.warp * vectors // tile.warps, (lane.warp + 1) * vectors // tile.warps
        partial = memory.partial + buffer * (tile.warps * config.partial_bytes)
        reduced = memory.reduced + (buffer * tile.cluster + work.rank) * config.partial_bytes
        for first in range(0, -(-vectors // tile.warps), LANES):
            vector = begin + lane.lane + first
            at = cutlass.min(vector, vectors - 1) * 16
            shares = [load_shared(Float32, partial + at, w * config.partial_bytes, 4) for w in range(tile.warps)]
            total = [tree(add, [share[e] for share in shares]) for e in range(4)]
            barrier = memory.reduced_ready_address + buffer * 8
            for cta in range(tile.cluster):
                store_cluster(reduced + at, barrier, Int32(cta), total, vector < end)

    @cute.jit
    def announce_totals(self, memory: Memory, lane: Lane, buffer: Int32):
        """The barrier's one arrival. Bytes that come before it are counted too; the phase cannot end without it."""
        if lane.warp == 0:
            with cute.arch.elect_one():
                size = self.tile.cluster * self.config.partial_bytes
                cute.arch.mbarrier_arrive_and_expect_tx(memory.reduced_ready + buffer, size)

    def weights(self, memory: Memory, lane: Lane, turn: Int32) -> Weights:
        """p, g and pull of a token; every warp computes them all.

        Lane (c, q) holds query c of each octet and sources 2q and 2q + 1: the layout of products and of an operand with
        queries for rows; transposed, of one with sources for rows.
        """
        config, octets = self.config, self.config.octets
        buffer = turn & 1
        if self.tile.cluster == 1:
            shares = self.tile.warps
            totals = memory.partial + buffer * (shares * config.partial_bytes)
        else:
            shares = self.tile.cluster
            totals = memory.reduced + buffer * (shares * config.partial_bytes)
            cute.arch.mbarrier_wait(memory.reduced_ready + buffer, (turn >> 1) & 1)
        statistics = memory.statistics + buffer * config.statistics_bytes
        per_source, per_pair = statistics + lane.q * 8, statistics + lane.lane * 8
        factor = load_shared(Float32, per_source, octets * 512, 2)
        ps, gs, pull = [], [], [Float32(0.0), Float32(0.0)]
        for octet in range(octets):
            parts = [
                load_shared(Float32, totals + lane.lane * 8, octet * 256 + share * config.partial_bytes, 2)
                for share in range(shares)
            ]
            a = [tree(add, [part[e] for part in parts]) for e in range(2)]
            p = load_shared(Float32, per_pair, octet * 256, 2)
            logit = load_shared(Float32, per_pair, (octets + octet) * 256, 2)
            (rest,) = load_shared(Float32, statistics + lane.c * 4, octets * 512 + 64 + octet * 32, 1)
            mean = p[0] * a[0] + p[1] * a[1]
            for offset in (1, 2):
                mean = mean + cute.arch.shuffle_sync_bfly(mean, offset=offset)
            h = [p[e] * (a[e] + (rest - mean)) for e in range(2)]
            pull = [pull[e] + logit[e] * h[e] for e in range(2)]
            ps.append(p)
            gs.append([factor[e] * h[e] for e in range(2)])
        factor = load_shared(Float32, per_source, octets * 512 + 32, 2)
        for offset in (4, 8, 16):
            pull = [value + cute.arch.shuffle_sync_bfly(value, offset=offset) for value in pull]
        diagonal = [
            select(lane.c == lane.q * 2 + e, Float32(0.0) - factor[e] * pull[e], Float32(0.0)) for e in range(2)
        ]
        unscale = None
        if self.dtype is Float16:
            scale, unscale = self.scale_of([*ps, *gs, diagonal])
            ps, gs = ([[scale * value for value in pair] for pair in pairs] for pairs in (ps, gs))
            diagonal = [scale * value for value in diagonal]
        of_sources = [[term[0] for term in split_vector(self.dtype, g, config.weight_terms)] for g in gs]
        of_sources.append([term[0] for term in split_vector(self.dtype, diagonal, 2)])
        high_low = [[term[0] for term in split_vector(self.dtype, p, 2)] for p in ps]
        return Weights(
            p=[(transpose(high), transpose(low)) for high, low in high_low],
            g=[(transpose(terms[0]), transpose(terms[1])) for terms in of_sources[:octets]],
            of_sources=of_sources,
            unscale=unscale,
        )

    def scale_of(self, pairs: list[list[Float32]]) -> tuple[Float32, Float32]:
        """The power of two for fp16 weights of a token, and its inverse."""
        peak = tree(cute.arch.fmax, [cute.arch.fmax(value, -value) for pair in pairs for value in pair])
        for offset in (16, 8, 4, 2, 1):
            peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, offset=offset))
        return power_of_two_scale(peak)

    def mix(self, memory: Memory, lane: Lane, turn: Int32, weights: Weights, r_du: cute.Tensor) -> None:
        """A token's gradients of sources over the warp's columns, rounded, into the staging buffer; adds to du."""
        config, tile = self.config, self.tile
        index, _, slot = self.slot(memory, turn)
        (sources,) = self.octet_rows(lane, slot, config.num_sources)
        d_outs = self.octet_rows(lane, slot + self.d_out_at, config.num_queries)
        addends = self.octet_rows(lane, slot + self.addend_at, config.num_sources) if config.accumulate else []
        factors = list(zip(d_outs, weights.p, strict=True))
        for term in range(config.query_terms):
            first = memory.queries + term * config.num_queries * tile.row_bytes
            factors += zip(self.octet_rows(lane, first, config.num_queries), weights.g, strict=True)
        stage_index = turn % tile.stages
        stage = memory.stage + stage_index * config.stage_bytes + lane.offset + lane.c * tile.row_bytes + lane.q * 4
        cute.arch.mbarrier_wait(memory.stored + stage_index, ((turn // tile.stages) & 1) ^ 1)
        for step in range(self.warp_columns // STEP):
            columns = step * STEP * ITEM
            rows = ldmatrix(sources[0], columns, transposed=True)
            pulls = [self.add_products(weights, row, r_du, step * TILES + k) for k, row in enumerate(rows)]
            # Here and at the end: keeps the compiler from hoisting loads and products, which spilled.
            cute.arch.sync_warp()
            sums: list[list[Float32] | None] = [None] * TILES
            for (address, offset), weight in factors:
                rows = ldmatrix(address, offset + columns, transposed=True)
                sums = [mma_k8(self.dtype, weight, row, total) for row, total in zip(rows, sums, strict=True)]
            given = ldmatrix(addends[0][0], columns) if config.accumulate else None
            for k in range(TILES):
                d_source = [sums[k][e] + sums[k][2 + e] + pulls[k][e] for e in range(2)]
                if weights.unscale is not None:
                    d_source = [value * weights.unscale for value in d_source]
                if given is not None:
                    d_source = [value + old for value, old in zip(d_source, unpack(self.dtype, given[k]), strict=True)]
                packed = pack(self.dtype, *d_source)
                store_shared(stage, columns + k * 16, [packed], lane.c < config.num_sources)
            cute.arch.sync_warp()
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(memory.staged + stage_index)
            cute.arch.mbarrier_arrive(memory.empty + index)

    def add_products(self, weights: Weights, row: Pair, r_du: cute.Tensor, tile: int) -> list[Float32]:
        """Adds to du what a tile of sources gives; returns the pull. Operands share an mma by twos.

        Where fp32 gradients are wanted, products start from zero and are added in fp32 registers: the tensor core's
        own sums are truncated, by 5e-6 over a hundred tokens. (And fp16 products have a scale of their own.)
        """
        octets, zero = self.config.octets, Float32(0.0)
        operands, pull = weights.of_sources, None
        for i in range(0, octets + 1, 2):
            pair = operands[i : i + 2]
            held = [(r_du[0, tile, o], r_du[1, tile, o]) if o < octets else (zero, zero) for o in (i, i + 1)]
            total = None if self.adds_apart or i == octets else [*held[0], *held[1]]
            for term in range(max(len(terms) for terms in pair)):
                a = [terms[term] if term < len(terms) else Int32(0) for terms in pair] + [Int32(0)]
                total = mma_k8(self.dtype, (a[0], a[1]), row, total)
            for octet, part in ((i, total[:2]), (i + 1, total[2:])):
                if octet == octets:
                    pull = part
                elif octet < octets:
                    for e in range(2):
                        value = part[e] if weights.unscale is None else part[e] * weights.unscale
                        r_du[e, tile, octet] = r_du[e, tile, octet] + value if self.adds_apart else value
        return pull

    def store_du(self, work: Work, lane: Lane, du: Int64, r_du: cute.Tensor) -> None:
        """This warp's columns of the cluster's du."""
        config = self.config
        hidden_size = config.hidden_size
        row = Int64(work.first * config.num_queries + lane.c)
        address = du + (row * hidden_size + lane.column + lane.q * 2) * 4
        for octet in range(config.octets):
            there = octet * OCTET + lane.c < config.num_queries
            for k in range(self.warp_columns // 8):
                inside = there & (lane.column + k * 8 < hidden_size) if self.ragged else there
                offset = (octet * OCTET * hidden_size + k * 8) * 4
                store_pair(address, offset, [r_du[0, k, octet], r_du[1, k, octet]], inside)
