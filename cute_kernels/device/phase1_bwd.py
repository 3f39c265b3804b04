"""The kernel behind phase1_bwd: gradients of S queries' mixes of the same N source rows, on tensor cores.

    a_sn = <do_s, v_n>      h_sn = p_sn (a_sn - sum_k p_sk a_sk + d_lse_s)      g_sn = scale * rstd_n * h_sn
    d_v_n = sum_s p_sn do_s + sum_s g_sn u_s - (rstd_n^2 / D) (sum_s logit_sn h_sn) v_n      du_s = sum_tokens sum_n g_sn v_n

An *item* is up to 16 queries of one token, one or two *octets* of an mma; gradients of different queries meet only in
d_v, whose sums stay in registers from a token's first item to its last. The hidden dimension is split over the CTAs of a
cluster, then over consumer warps; all walk the same items. Per item, a consumer warp does

    products   gradients of outputs [16 x D-slice] times sources^T [D-slice x 8]
    mix        gradients of outputs and queries, transposed [D-slice x 16], times p and g [16 x 8]; sources times the pull; and
               g [16 x 8] times sources [8 x D-slice], which adds to du in registers

and one more warp of every CTA

    exchange   sums of the products over its CTA's warps, sent to every CTA of the cluster
    weights    from the sums of all CTAs: p and g as mma operands, and the pull, a factor of each source, for the consumers

Consumers go in the order products(i + 1), mix(i), so that the weights of an item have a mix's and the next products' time, and wait
for nobody else, each other included. One more warp keeps two rings full, of tokens' sources and of octets' gradients; another
stores the sources' gradients that consumers stage in shared memory.

Rows are read from device memory once. Deterministic: every sum has a fixed order.

Sources of scaled fp16 are rows x_n with v_n = s_n x_n, s_n a power of two for each: products are made of the rows as
stored, scales enter by the weights alone. Beside bf16 gradients, the rows become two bf16 terms, which is exact.

Sources' gradients that are rounded stochastically are sums of fp32's accuracy: bf16 weights have a third term, and queries
that the gradients' dtype cannot hold are two fp16 terms, times a power of two.
"""

import itertools
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float16, Float32, Int32, Int64, Numeric, const_expr
from cutlass.memory import SmemAllocator

from cute_kernels.config import ITEM_BYTES, LANES, VECTOR
from cute_kernels.config_phase1 import OCTET, ceil_div
from cute_kernels.config_phase1_bwd import (
    BUFFERS,
    LOGITS_AT,
    LSE_AT,
    PIECE,
    RSTD_AT,
    SCALES_AT,
    SCRATCH_BYTES,
    STATISTICS_BUFFERS,
    STATISTICS_BYTES,
    STEP,
    Phase1BwdConfig,
    Statistics,
)
from cute_kernels.device.cluster import Work, cluster_work, sync_cluster
from cute_kernels.device.mma import (
    Octet,
    Pair,
    bulk_load,
    bulk_prefetch,
    bulk_store,
    copy_scalar,
    ldmatrix,
    load_shared,
    mma,
    mma_k8,
    pack,
    power_of_two_scale,
    select,
    split_pair,
    split_vector,
    stmatrix,
    store_cluster,
    store_pair,
    store_shared,
    transpose,
    unpack,
)
from cute_kernels.device.phase1_queries import TYPES, ChainedSum, QueryReader
from cute_kernels.device.pipelines import EVICT_FIRST, producer_state, wait_all
from cute_kernels.device.rounding import D_SOURCES, RowBits, inverse, row_bits, stochastic_pair
from cute_kernels.device.rows import add, exp_difference, tree, warp_max

ITEM = ITEM_BYTES
TILES = STEP // 8  # mma tiles of columns that one ldmatrix covers
CONSUMERS = 1  # their named barrier
STATISTICS_AHEAD = STATISTICS_BUFFERS - 1  # items whose statistics are being copied


class Memory:
    """Byte addresses in shared memory, and the mbarriers."""

    def __init__(self, config: Phase1BwdConfig, base: cute.Pointer):
        tile = config.tile
        # [source_slots, N, row_bytes]; twice N rows when gradients are added to: they come second
        self.sources = Int32(base.toint())
        # [output_slots, up to 8, row_bytes]
        outputs_at = tile.source_slots * config.source_slot_bytes
        self.outputs = self.sources + outputs_at
        # [terms, S, row_bytes]
        queries_at = outputs_at + tile.output_slots * config.output_slot_bytes
        self.queries = self.sources + queries_at
        # [stages, stage_bytes]: N rows, and what is beyond them
        stage_at = queries_at + config.query_bytes
        self.stage = self.sources + stage_at
        # [octets * 8], fp32
        query_scales_at = stage_at + tile.stages * config.stage_bytes
        self.query_scales = self.sources + query_scales_at
        # [STATISTICS_BUFFERS, STATISTICS_BYTES]
        statistics_at = query_scales_at + config.query_scale_bytes
        self.statistics = self.sources + statistics_at
        # [BUFFERS, warps, partial_bytes]
        self.partial = self.statistics + STATISTICS_BUFFERS * STATISTICS_BYTES
        # [BUFFERS, weight_bytes]
        self.weights = self.partial + BUFFERS * tile.warps * config.partial_bytes
        # [BUFFERS, CTAs of the cluster, partial_bytes], over a cluster
        self.reduced = self.weights + BUFFERS * config.weight_bytes
        barriers = cute.recast_ptr(base + (statistics_at + config.exchange_bytes), dtype=Int64)
        # [slots]: the slot's bytes have landed; every warp is done with it
        self.sources_full, self.sources_empty = barriers, barriers + tile.source_slots
        self.outputs_full = barriers + 2 * tile.source_slots
        self.outputs_empty = self.outputs_full + tile.output_slots
        # [stages]: every warp has written its columns; the stores have read them
        self.staged = self.outputs_empty + tile.output_slots
        self.stored = self.staged + tile.stages
        # [BUFFERS]: every warp's partial sums are there; every CTA's totals; the weights
        self.partial_ready = self.stored + tile.stages
        self.reduced_ready = self.partial_ready + BUFFERS
        self.weights_ready = self.reduced_ready + BUFFERS


class Lane(NamedTuple):
    """A consumer thread's place: c and q are the mma coordinates of device/mma.py."""

    warp: Int32
    lane: Int32
    c: Int32
    q: Int32
    column: Int32  # first column of the warp's slice, in the whole row
    offset: Int32  # of the warp's slice, in bytes of a row in shared memory


class Item(NamedTuple):
    """One or two octets of a token's queries."""

    turn: Int32
    number: int  # in its token
    octets: range
    first: bool
    last: bool
    index: Int32  # over all items


class Weight(NamedTuple):
    """An octet's weights as an mma operand: its terms, the high one first. Rows are the octet's queries, columns sources."""

    dtype: type[Numeric]
    terms: list[Pair]


class Weights(NamedTuple):
    """An item's weights as mma operands; the octets in turn."""

    p: list[Weight]
    g: list[Weight]
    # of sources 2q and 2q + 1, in a token's last item: by fp32 arithmetic, since an mma of its diagonal takes the tensor core as
    # long as one of eight queries
    pull: list[Float32] | None
    # g whose rows are queries, multiplied with sources for du: rows 0 to 7 and rows 8 to 15 are two octets', term by term, or
    # one's terms by twos
    of_sources: list[tuple[Pair, Pair]]
    # undo the powers of two of fp16 weights: of what makes d_sources, of what makes du
    unscale: Float32 | None
    value_unscale: Float32 | None


class Tiles(NamedTuple):
    """A step's operands of a mix, from shared memory: blocks are of 16 columns, two tiles."""

    sources: list[Pair]  # of tiles
    factors: list[list[tuple[Pair, ...]]]  # of p and g, one or two octets each: of blocks
    addends: list[Pair]  # of tiles: old gradients of the sources, where they are added to


class Sums(NamedTuple):
    """What a consumer thread adds up, in fp32 registers."""

    # (2, tiles, octets), of one octet high and low weights' sums: query c, columns 2q and 2q + 1 of a tile, over all tokens
    du: cute.Tensor
    # (2, tiles): sources 2q and 2q + 1, column c of a tile, over the items of a token
    d_sources: cute.Tensor


class Phase1BwdKernel:
    def __init__(self, config: Phase1BwdConfig):
        self.config, self.tile = config, config.tile
        self.dtype, self.query_dtype = TYPES[config.dtype], TYPES[config.query_dtype]
        self.warp_columns = config.tile.columns
        self.ragged = config.ragged
        self.mixed = config.scaled and self.dtype is not Float16

    @cute.jit
    def __call__(
        self,
        d_out: Int64,  # [S, T, D]
        sources: list,  # N addresses of [T, D]
        strides: list,  # elements from one token to the next
        queries: Int64,  # [S, D]
        query_stride: Int64,
        key_weights: Int64,  # [S, D], when there are any
        key_weight_stride: Int64,
        statistics: Statistics,
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
            statistics,
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
        base = SmemAllocator().allocate(self.config.shared_bytes - SCRATCH_BYTES, SCRATCH_BYTES)
        memory = Memory(self.config, base)

        if thread == 0:
            self.init_barriers(memory)
        if const_expr(self.ragged):
            self.clear(memory, thread)
        cute.arch.mbarrier_init_fence()
        sync_cluster(tile.cluster)

        first, (consumer_registers, other_registers) = tile.consumer_warps, self.config.registers
        if warp >= first:
            if const_expr(tile.moves_registers):
                cute.arch.setmaxregister_decrease(other_registers)
            if warp == first:
                with cute.arch.elect_one():
                    self.load(memory, cluster_work(tile.cluster, tokens), d_out, sources, strides)
                cute.arch.sync_warp()
            if warp == first + 1:
                with cute.arch.elect_one():
                    self.store(memory, cluster_work(tile.cluster, tokens), d_sources, d_strides)
                cute.arch.sync_warp()
            if const_expr(self.config.accumulate) and warp == first + 2:
                with cute.arch.elect_one():
                    self.load_addends(memory, cluster_work(tile.cluster, tokens), d_sources, d_strides)
                cute.arch.sync_warp()
            if warp == first + 3:
                self.weigh(memory, cluster_work(tile.cluster, tokens), thread % LANES, statistics, scale)
        else:
            if const_expr(tile.moves_registers):
                cute.arch.setmaxregister_increase(consumer_registers)
            if warp < tile.warps:
                work = cluster_work(tile.cluster, tokens)
                lane = self.place(work, warp, thread % LANES)
                self.load_queries(memory, lane, queries, query_stride, key_weights, key_weight_stride)
                self.consume(memory, work, lane, du)
        if const_expr(tile.cluster > 1):
            # No CTA may leave while another can still write to its shared memory.
            sync_cluster(tile.cluster)

    def init_barriers(self, memory: Memory) -> None:
        tile = self.tile
        rings = (
            (memory.sources_full, memory.sources_empty, tile.source_slots, 2 if self.config.accumulate else 1),
            (memory.outputs_full, memory.outputs_empty, tile.output_slots, 1),
        )
        for full, empty, slots, loaders in rings:
            for slot in range(slots):
                cute.arch.mbarrier_init(full + slot, loaders)
                cute.arch.mbarrier_init(empty + slot, tile.warps)
        for stage in range(tile.stages):
            cute.arch.mbarrier_init(memory.staged + stage, tile.warps)
            cute.arch.mbarrier_init(memory.stored + stage, 1)
        for buffer in range(BUFFERS):
            # Every lane arrives for its own stores: racecheck does not see that one lane's arrival covers its warp's.
            cute.arch.mbarrier_init(memory.partial_ready + buffer, tile.warps * LANES)
            cute.arch.mbarrier_init(memory.weights_ready + buffer, LANES)
            # Shares arrive as bytes; the one arrival announces how many.
            cute.arch.mbarrier_init(memory.reduced_ready + buffer, 1)

    @cute.jit
    def clear(self, memory: Memory, thread: Int32):
        """Zeros where no copy writes: they enter the products, and what shared memory holds at first may be a NaN."""
        zero = Int32(0)
        for offset in cutlass.range(thread * 16, self.config.ring_bytes, self.config.threads * 16, unroll=1):
            store_shared(memory.sources + offset, 0, [zero, zero, zero, zero])
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
    def load(self, memory: Memory, work: Work, d_out: Int64, sources: list, strides: list):
        """Fills the rings: a token's sources, then its items' gradients."""
        config, row_bytes = self.config, self.tile.row_bytes
        column, size, some = self.part(work)
        at_source, at_output = producer_state(self.tile.source_slots), producer_state(self.tile.output_slots)
        row_stride = Int64(work.tokens) * (config.hidden_size * ITEM)
        for turn in cutlass.range(work.items, unroll=1):
            token = Int64(work.item(turn))
            if const_expr(self.tile.cluster == 1):
                self.prefetch(work, turn + 1, d_out, sources, strides)
            self.load_sources(memory, work, at_source, turn, sources, strides, 0)
            at_source.advance()
            for octet in cutlass.range_constexpr(config.octets):
                cute.arch.mbarrier_wait(memory.outputs_empty + at_output.index, at_output.phase)
                full = memory.outputs_full + at_output.index
                rows = config.octet_rows(octet)
                cute.arch.mbarrier_arrive_and_expect_tx(full, size * rows)
                slot, barrier = memory.outputs + at_output.index * config.output_slot_bytes, Int32(full.toint())
                address = d_out + (token * config.hidden_size + column) * ITEM + octet * OCTET * row_stride
                for s in cutlass.range(rows, unroll=4):
                    bulk_load(slot + s * row_bytes, address + s * row_stride, size, barrier, EVICT_FIRST, some)
                at_output.advance()

    @cute.jit
    def prefetch(self, work: Work, turn: Int32, d_out: Int64, sources: list, strides: list):
        """A token's rows to L2, before there is room for them. Where clusters share a token, it cost time."""
        config = self.config
        column, size, some = self.part(work)
        if turn < work.items:
            token = Int64(work.item(turn))
            for source, stride in zip(sources, strides, strict=True):
                bulk_prefetch(source + (token * stride + column) * ITEM, size, some)
            address = d_out + (token * config.hidden_size + column) * ITEM
            for s in cutlass.range(config.num_queries, unroll=4):
                bulk_prefetch(address + s * (Int64(work.tokens) * (config.hidden_size * ITEM)), size, some)

    @cute.jit
    def load_addends(self, memory: Memory, work: Work, d_sources: list, d_strides: list):
        """What the sources' gradients are added to, beside the sources. One warp would spill with all those addresses."""
        at_source = producer_state(self.tile.source_slots)
        for turn in cutlass.range(work.items, unroll=1):
            self.load_sources(memory, work, at_source, turn, d_sources, d_strides, self.config.num_sources)
            at_source.advance()

    def load_sources(
        self, memory: Memory, work: Work, state, turn: Int32, sources: list, strides: list, first: int
    ) -> None:
        """N rows, from row `first` of a slot on."""
        config = self.config
        column, size, some = self.part(work)
        token = Int64(work.item(turn))
        full = memory.sources_full + state.index
        cute.arch.mbarrier_wait(memory.sources_empty + state.index, state.phase)
        cute.arch.mbarrier_arrive_and_expect_tx(full, size * config.num_sources)
        slot = memory.sources + state.index * config.source_slot_bytes + first * self.tile.row_bytes
        for n, (source, stride) in enumerate(zip(sources, strides, strict=True)):
            address = source + (token * stride + column) * ITEM
            bulk_load(slot + n * self.tile.row_bytes, address, size, Int32(full.toint()), EVICT_FIRST, some)

    # Stores

    @cute.jit
    def store(self, memory: Memory, work: Work, d_sources: list, d_strides: list):
        """Staged rows to device memory.

        Bulk copies read what other threads stored, by another proxy: a fence belongs between, in this CTA. Here only this thread
        waits for it.
        """
        stages = self.tile.stages
        column, size, _ = self.part(work)
        present = cutlass.Boolean(size > 0)
        for turn in cutlass.range(work.items, unroll=1):
            token = Int64(work.item(turn))
            buffer = turn % stages
            cute.arch.mbarrier_wait(memory.staged + buffer, (turn // stages) & 1)
            cute.arch.fence_view_async_shared()
            stage = memory.stage + buffer * self.config.stage_bytes
            for n in cutlass.range_constexpr(self.config.num_sources):
                address = d_sources[n] + (token * d_strides[n] + column) * ITEM
                bulk_store(address, stage + n * self.tile.row_bytes, size, present)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.mbarrier_arrive(memory.stored + buffer)
        cute.arch.cp_async_bulk_wait_group(0)

    # Exchange and weights

    @cute.jit
    def weigh(self, memory: Memory, work: Work, lane: Int32, statistics: Statistics, scale: Float32):
        """Makes the weights of all items."""
        for index in cutlass.range_constexpr(STATISTICS_AHEAD):
            self.start_statistics(memory, work, lane, statistics, Int32(index))
        for turn in cutlass.range(work.items, unroll=1):
            self.weigh_token(memory, work, self.place(work, Int32(0), lane), turn, statistics, scale)

    def weigh_token(
        self, memory: Memory, work: Work, lane: Lane, turn: Int32, statistics: Statistics, scale: Float32
    ) -> None:
        """Makes the weights of a token's items.

        Why two buffers: this warp sends totals of item i + 2 after it has seen all totals of i + 1, which each CTA sent when it had
        read those of i. Consumers write partial sums of i + 2 after their mix of i, and have left weights i before they arrive with
        those.
        """
        pull = [Float32(0.0)] * 2
        for number in range(self.config.items):
            item = self.item(turn, number)
            buffer, phase = item.index % BUFFERS, (item.index // BUFFERS) & 1
            # Copies that nobody waits for: when they were loads, an item took as long as their latency, whatever the consumers
            # did (on an H200, D = 4096, S = 16: .768 -> .804 of copy bandwidth).
            self.start_statistics(memory, work, lane.lane, statistics, item.index + STATISTICS_AHEAD)
            cute.arch.cp_async_wait_group(STATISTICS_AHEAD)
            cute.arch.mbarrier_wait(memory.partial_ready + buffer, phase)
            if self.tile.cluster > 1:
                self.exchange(memory, work, lane, item)
            if item.last and self.config.stochastic:
                self.store_bits(memory, work, lane.lane, statistics.seeds[0], item)
            cute.arch.sync_warp()  # every lane's copies
            weights, pull = self.weights(memory, lane, item, pull, scale)
            self.store_weights(memory, lane, item, weights)
            cute.arch.mbarrier_arrive(memory.weights_ready + buffer)
            cute.arch.sync_warp()  # every lane has read its statistics

    @cute.jit
    def start_statistics(self, memory: Memory, work: Work, lane: Int32, statistics: Statistics, index: Int32):
        """A group of copies: an item's statistics, if there is one."""
        if index < work.items * self.config.items:
            self.copy_statistics(memory, work, lane, statistics, index)
        cute.arch.cp_async_commit_group()

    def copy_statistics(self, memory: Memory, work: Work, lane: Int32, statistics: Statistics, index: Int32) -> None:
        """An item's, to its buffer, as config_phase1_bwd.py says. What is not there is not copied: see weights."""
        config = self.config
        sources, tokens = config.num_sources, Int64(work.tokens)
        token = work.item(index // config.items)
        octets = self.tile.item_octets
        buffer = memory.statistics + index % STATISTICS_BUFFERS * STATISTICS_BYTES
        at = buffer + lane * 4
        first, source, row = index % config.items * (octets * OCTET), lane % OCTET, lane // OCTET
        for piece in range(octets * 64 // LANES):
            octet, c = piece // 2, row + piece % 2 * (LANES // OCTET)
            query = first + octet * OCTET + c
            logit = statistics.logits + (Int64(query * sources + source) * tokens + token) * 4
            there = (query < config.num_queries) & (source < sources)
            place = (c * 4 + source // 2) * (8 * octets) + octet * 8 + source % 2 * 4
            copy_scalar(buffer + place + LOGITS_AT, logit, there)
        query = first + lane
        there = (lane < octets * OCTET) & (query < config.num_queries)
        position = (Int64(query) * tokens + token) * 4
        place = buffer + lane % OCTET * (8 * octets) + lane // OCTET * 4 + LSE_AT
        copy_scalar(place, statistics.lse + position, there)
        if config.d_lse:
            copy_scalar(place + octets * 4, statistics.d_lse + position, there)
        copy_scalar(at + RSTD_AT, statistics.rstd + (Int64(lane) * tokens + token) * 4, lane < sources)
        if config.scaled:
            address, stride = statistics.scales[0], statistics.scale_strides[0]
            for n in range(1, sources):
                address = select(lane == n, statistics.scales[n], address)
                stride = select(lane == n, statistics.scale_strides[n], stride)
            copy_scalar(at + SCALES_AT, address + token * stride * 4, lane < sources)

    def exchange(self, memory: Memory, work: Work, lane: Lane, item: Item) -> None:
        """Adds up what this CTA's warps have, and sends it to every CTA of the cluster."""
        config, tile = self.config, self.tile
        buffer, size = item.index % BUFFERS, len(item.octets) * 256
        with cute.arch.elect_one():
            # The barrier's one arrival. Bytes that come before it are counted too; the phase cannot end without it.
            cute.arch.mbarrier_arrive_and_expect_tx(memory.reduced_ready + buffer, tile.cluster * size)
        vectors = size // 16
        at = lane.lane % vectors * 16
        partial = memory.partial + buffer * (tile.warps * config.partial_bytes) + at
        shares = [load_shared(Float32, partial, warp * config.partial_bytes, 4) for warp in range(tile.warps)]
        total = [tree(add, list(values)) for values in zip(*shares, strict=True)]
        reduced = memory.reduced + (buffer * tile.cluster + work.rank) * config.partial_bytes + at
        barrier = Int32(memory.reduced_ready.toint()) + buffer * 8
        # Of one octet, half of the lanes send to every other CTA.
        for first in range(0, tile.cluster, LANES // vectors):
            store_cluster(reduced, barrier, first + lane.lane // vectors, total)

    def store_bits(self, memory: Memory, work: Work, lane: Int32, seed: Int64, item: Item) -> None:
        """What the random bits of a token's gradients are made of, lane n's of source n: for the mix of its last item."""
        bits = row_bits(seed, lane * work.tokens + work.item(item.turn), D_SOURCES)
        at = self.bits_address(memory, item) + lane * 8
        store_shared(at, 0, [bits.step, bits.first], lane < self.config.num_sources)

    def bits_address(self, memory: Memory, item: Item) -> Int32:
        return self.weights_address(memory, item) + self.config.weight_vectors * (LANES * 16)

    def weights_address(self, memory: Memory, item: Item) -> Int32:
        """Each lane's 16 bytes of one vector side by side, then of the next."""
        return memory.weights + item.index % BUFFERS * self.config.weight_bytes

    def weights(
        self, memory: Memory, lane: Lane, item: Item, pull: list[Float32], scale: Float32
    ) -> tuple[Weights, list[Float32]]:
        """p, g and, at last, the pull, whose sum over the token's items goes from one to the next. p, before the totals are there.

        Lane (c, q) holds query c of an octet and sources 2q and 2q + 1: the layout of products and of an operand with
        queries for rows; transposed, of a second operand with queries for rows and sources for columns.
        """
        config, tile = self.config, self.tile
        buffer, octets = item.index % BUFFERS, tile.item_octets
        statistics = memory.statistics + item.index % STATISTICS_BUFFERS * STATISTICS_BYTES
        source_there, zero = None, Float32(0.0)
        if config.num_sources < OCTET:
            source_there = [lane.q * 2 + e < config.num_sources for e in range(2)]
        rstd = masked(load_shared(Float32, statistics + lane.q * 8, RSTD_AT, 2), source_there)
        row_scale = []
        if config.scaled:
            row_scale = [masked(load_shared(Float32, statistics + lane.q * 8, SCALES_AT, 2), source_there)]
        logits = load_shared(Float32, statistics + lane.lane * (8 * octets), LOGITS_AT, 2 * octets)
        # of every octet, then their gradients
        lses = load_shared(Float32, statistics + lane.c * (8 * octets), LSE_AT, octets * (1 + config.d_lse))
        theres, ps, gs, value_gs = [], [], [], []
        for i, octet in enumerate(item.octets):
            there = source_there
            if config.octet_rows(octet) < OCTET:
                query_there = lane.c < config.octet_rows(octet)
                there = [query_there if there is None else query_there & there[e] for e in range(2)]
            theres.append(there)
            logits[2 * i : 2 * i + 2] = masked(logits[2 * i : 2 * i + 2], there)
            ps.append(masked([exp_difference(value, lses[i]) for value in logits[2 * i : 2 * i + 2]], there))
        shares, totals = tile.warps, memory.partial
        if tile.cluster > 1:
            shares, totals = tile.cluster, memory.reduced
            cute.arch.mbarrier_wait(memory.reduced_ready + buffer, (item.index // BUFFERS) & 1)
        totals = totals + buffer * (shares * config.partial_bytes) + lane.lane * (8 * len(item.octets))
        parts = [load_shared(Float32, totals, i * config.partial_bytes, 2 * len(item.octets)) for i in range(shares)]
        products = [tree(add, list(values)) for values in zip(*parts, strict=True)]
        for i, (p, there) in enumerate(zip(ps, theres, strict=True)):
            a = multiply(products[2 * i : 2 * i + 2], *row_scale)
            d_lse = lses[octets + i] if config.d_lse else zero
            mean = p[0] * a[0] + p[1] * a[1]
            for offset in (1, 2):
                mean = mean + cute.arch.shuffle_sync_bfly(mean, offset=offset)
            h = masked([p[e] * (a[e] + (d_lse - mean)) for e in range(2)], there)
            pull = [pull[e] + logits[2 * i + e] * h[e] for e in range(2)]
            gs.append([scale * rstd[e] * h[e] for e in range(2)])
            value_gs.append(multiply(gs[-1], *row_scale))
        total = pull
        if item.last:
            for offset in (4, 8, 16):
                total = [value + cute.arch.shuffle_sync_bfly(value, offset=offset) for value in total]
            # Not rstd^2: fp32 has no square of a large row's.
            factors = multiply([r * Float32(1.0 / config.hidden_size) for r in rstd], *row_scale)
            total = [zero - factors[e] * (rstd[e] * total[e]) for e in range(2)]
        if config.scales_queries:
            for i, octet in enumerate(item.octets):
                (query_unscale,) = load_shared(Float32, memory.query_scales + lane.c * 4, octet * OCTET * 4, 1)
                gs[i] = [query_unscale * value for value in gs[i]]
        unscale = value_unscale = None
        if config.scales_weights:
            power, unscale = self.scale_of([*ps, *gs])
            ps, gs = ([[power * value for value in pair] for pair in pairs] for pairs in (ps, gs))
        if self.dtype is Float16:
            # Where sources are scaled, what makes du may be of another magnitude.
            apart = config.scaled or config.scales_queries
            value_power, value_unscale = self.scale_of(value_gs) if apart else (power, unscale)
            value_gs = [[value_power * value for value in pair] for pair in value_gs]

        def split(pairs: list[list[Float32]], terms: int, dtype: type[Numeric] = self.dtype) -> list[list[Pair]]:
            return [split_pair(dtype, *pair, terms) for pair in pairs]

        of_sources = split(value_gs, config.weight_terms)
        count, query_count = config.mix_terms(config.dtype), config.mix_terms(config.query_dtype)
        of_queries = [terms[:2] for terms in of_sources]
        if config.scaled or config.stochastic:
            of_queries = split(gs, query_count, self.query_dtype)

        def transposed(octets: list[list[Pair]], dtype: type[Numeric]) -> list[Weight]:
            return [Weight(dtype, [transpose(term) for term in terms]) for terms in octets]

        weights = Weights(
            p=transposed(split(ps, count), self.dtype),
            g=transposed(of_queries, self.query_dtype),
            pull=total if item.last else None,
            of_sources=list(zip(*of_sources, strict=True)) if len(of_sources) == 2 else by_twos(of_sources[0]),
            unscale=unscale,
            value_unscale=value_unscale,
        )
        return weights, pull

    def scale_of(self, pairs: list[list[Float32]]) -> tuple[Float32, Float32]:
        """The power of two for fp16 weights of an item, and its inverse."""
        peak = tree(cute.arch.fmax, [cute.arch.fmax(value, -value) for pair in pairs for value in pair])
        return power_of_two_scale(warp_max(cute.arch.fmax(peak, Float32(0.0))))  # NaN has no say

    def store_weights(self, memory: Memory, lane: Lane, item: Item, weights: Weights) -> None:
        """For the same lane of every consumer warp."""
        at = self.weights_address(memory, item) + lane.lane * 16
        numbers = [*(weights.pull or [None, None]), weights.unscale, weights.value_unscale]
        numbers = [Float32(0.0) if number is None else number for number in numbers]
        store_shared(at, 0, numbers[: self.config.weight_numbers])
        words = [term for of in weights.p + weights.g for term in of.terms] + list(itertools.chain(*weights.of_sources))
        words += [Int32(0)] * (-len(words) % 4)
        for i in range(0, len(words), 4):
            store_shared(at, LANES * 16 * (1 + i // 4), words[i : i + 4])

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
        if const_expr(self.config.scales_queries):
            self.store_query_scales(
                memory, lane, QueryReader(self, lane, queries, query_stride, key_weights, key_weight_stride)
            )
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
        if config.query_terms > 1 or config.scales_queries:
            product = reader.product(given)
            if config.scales_queries:
                (unscale,) = load_shared(Float32, memory.query_scales + query * 4, 0, 1)
                product = [value * inverse(unscale) for value in product]
            terms = split_vector(self.query_dtype, product, config.query_terms)
        at = memory.queries + lane.offset + query * row_bytes + column * ITEM
        for i, term in enumerate(terms):
            store_shared(at, i * config.num_queries * row_bytes, term)

    def store_query_scales(self, memory: Memory, lane: Lane, reader: QueryReader) -> None:
        """What undoes the powers of two of the queries' terms: these are below 2^8, in the middle of fp16's range, so that
        neither their second terms nor those of weights are subnormal.
        """
        config, warps = self.config, self.tile.warps
        # Where weights will be: before the first, all warps have been here.
        peaks, row = memory.weights + lane.c * 4, config.query_scale_bytes
        for octet in range(config.octets):
            store_shared(peaks + lane.warp * row, octet * OCTET * 4, [reader.peak(octet)])
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=warps * LANES)
        for octet in range(config.octets):
            at = [octet * OCTET * 4 + warp * row for warp in range(warps)]
            peak = tree(cute.arch.fmax, [load_shared(Float32, peaks, offset, 1)[0] for offset in at])
            _, unscale = power_of_two_scale(peak)
            store_shared(memory.query_scales + lane.c * 4, octet * OCTET * 4, [unscale * Float32(64.0)])
        cute.arch.sync_warp()

    def steps(self) -> list[range]:
        """The warp's tiles by fours, as one ldmatrix reads them. The last may be two."""
        tiles = self.warp_columns // 8
        return [range(first, min(first + TILES, tiles)) for first in range(0, tiles, TILES)]

    def rows(self, lane: Lane, first: Int32, count: int) -> Int32:
        """The address that this lane gives to ldmatrix for 32 columns of up to 8 rows.

        Rows past the last repeat it: their weights are zero, and they belong to the same token.
        """
        row = lane.lane % 8
        if count < OCTET:
            row = cutlass.min(row, count - 1)
        return first + lane.offset + (lane.lane // 8) * 16 + row * self.tile.row_bytes

    def pair_rows(self, lane: Lane, octets: list[tuple[Int32, int]], transposed: bool) -> Int32:
        """The address for 16 columns of up to 8 rows of each of two. Matrices come as an mma's operand wants them: rows of one
        octet and of the other in turn; or, where columns are its rows, both matrices of an octet one after the other.
        """
        row, piece = lane.lane % 8, lane.lane // 8
        starts = [at + cutlass.min(row, count - 1) * self.tile.row_bytes for at, count in octets]
        octet, matrix = (piece // 2, piece % 2) if transposed else (piece % 2, piece // 2)
        return select(octet == 0, *starts) + lane.offset + matrix * 16

    def item(self, turn: Int32, number: int) -> Item:
        octets, items = self.config.octets, self.config.items
        first = number * self.tile.item_octets
        return Item(
            turn=turn,
            number=number,
            octets=range(first, min(first + self.tile.item_octets, octets)),
            first=number == 0,
            last=number == items - 1,
            index=turn * items + number,
        )

    @cute.jit
    def consume(self, memory: Memory, work: Work, lane: Lane, du: Int64):
        items, tiles = self.config.items, self.warp_columns // 8
        sums = Sums(
            cute.make_rmem_tensor((2, tiles, self.config.du_octets), Float32),
            cute.make_rmem_tensor((2, tiles), Float32),
        )
        sums.du.fill(0.0)
        # One turn more than there are tokens: each part of the code is there once.
        for turn in cutlass.range(work.items + 1, unroll=1):
            if turn < work.items:
                self.products(memory, lane, self.item(turn, 0))
            if turn > 0:
                self.mix(memory, lane, self.item(turn - 1, items - 1), sums)
            if turn < work.items:
                for number in cutlass.range_constexpr(1, items):
                    self.products(memory, lane, self.item(turn, number))
                    self.mix(memory, lane, self.item(turn, number - 1), sums)
        self.store_du(work, lane, du, sums.du)

    def source_slot(self, memory: Memory, turn: Int32) -> tuple[Int32, Int32, Int32]:
        """(index, parity of its full barrier, address)."""
        slots = self.tile.source_slots
        index = turn % slots
        return index, (turn // slots) & 1, memory.sources + index * self.config.source_slot_bytes

    def output_slot(self, memory: Memory, turn: Int32, octet: int) -> tuple[Int32, Int32, Int32]:
        position, slots = turn * self.config.octets + octet, self.tile.output_slots
        index = position % slots
        return index, (position // slots) & 1, memory.outputs + index * self.config.output_slot_bytes

    def products(self, memory: Memory, lane: Lane, item: Item) -> None:
        """This warp's share of <do_s, v_n>, to its partial buffer.

        One ldmatrix of gradients is an operand: columns 0 to 7 and 8 to 15 of two octets. Or, of one octet, columns 0
        to 7 and 16 to 23 of 32 as rows 0 to 7, the others as rows 8 to 15; sources come in that order, too, and half of
        each product is left out of the sums.
        """
        config, tile = self.config, self.tile
        index, parity, slot = self.source_slot(memory, item.turn)
        awaited = [(memory.sources_full + index, parity)] if item.first else []
        alone = len(item.octets) == 1
        piece = lane.lane // 8
        order = piece % 2 * 2 + piece // 2 if alone else piece
        row = cutlass.min(lane.lane % 8, config.num_sources - 1)
        source_rows = slot + lane.offset + row * tile.row_bytes + order * 16
        outputs = []
        for octet in item.octets:
            index, parity, slot = self.output_slot(memory, item.turn, octet)
            awaited.append((memory.outputs_full + index, parity))
            outputs.append((slot, config.octet_rows(octet)))
        wait_all(awaited)
        d_out_rows = self.rows(lane, *outputs[0]) if alone else self.pair_rows(lane, outputs, transposed=False)
        sums, zero = ChainedSum(self.dtype, alternating=alone), Int32(0)
        for step, tiles in enumerate(self.steps()):
            columns, whole = step * STEP * ITEM, len(tiles) == TILES
            operands: list[tuple[Octet, Octet]] = []
            if alone:
                # Of the last 16 columns, both matrices twice
                source = ldmatrix(source_rows if whole else source_rows - order // 2 * 32, columns)
                d_out = ldmatrix(d_out_rows, columns, count=len(tiles)) + [zero] * (TILES - len(tiles))
                operands = [((d_out[0], d_out[2]), (d_out[1], d_out[3]))] * 2
                rows = [(source[0], source[whole]), (source[2], source[2 + whole])]
            else:
                source = ldmatrix(source_rows, columns, count=len(tiles))
                for half in range(len(tiles) // 2):
                    d_out = ldmatrix(d_out_rows, columns + half * PIECE * ITEM)
                    operands.append(((d_out[0], d_out[2]), (d_out[1], d_out[3])))
                rows = list(zip(source[::2], source[1::2], strict=True))
            for terms in zip(*[zip(*map(self.source_terms, pair), strict=True) for pair in rows], strict=True):
                for operand, term in zip(operands, terms, strict=True):
                    sums.add(operand, term)
            # See mix.
            if step % 2:
                cute.arch.sync_warp()
        buffer = item.index % BUFFERS
        share = memory.partial + (buffer * tile.warps + lane.warp) * config.partial_bytes
        values = [value for octet in sums.octets() for value in octet]
        store_shared(share + lane.lane * (4 * len(values)), 0, values)
        cute.arch.mbarrier_arrive(memory.partial_ready + buffer)

    def mix(self, memory: Memory, lane: Lane, item: Item, sums: Sums) -> None:
        """An item's gradients over the warp's columns: adds to du and d_sources.

        After a token's last item, d_sources are rounded into the staging buffer.
        """
        config, tile = self.config, self.tile
        steps = self.steps()
        source_index, _, source_slot = self.source_slot(memory, item.turn)
        source_rows = self.rows(lane, source_slot, config.num_sources)
        addend_rows = self.rows(lane, source_slot + config.num_sources * tile.row_bytes, config.num_sources)
        adds = item.last and config.accumulate
        # (address, rows) of what p and g are multiplied with, an octet of rows each
        outputs, queries, released = [], [], []
        for octet in item.octets:
            index, _, slot = self.output_slot(memory, item.turn, octet)
            outputs.append((slot, config.octet_rows(octet)))
            released.append(index)
        for term in range(config.query_terms):
            for octet in item.octets:
                first = (term * config.num_queries + octet * OCTET) * tile.row_bytes
                queries.append((memory.queries + first, config.octet_rows(octet)))
        pairs = self.pairs(outputs, queries)
        factors = [
            self.pair_rows(lane, octets, transposed=True) if len(octets) == 2 else self.rows(lane, *octets[0])
            for octets in pairs
        ]

        def load(step: int) -> Tiles:
            columns, count = step * STEP * ITEM, len(steps[step])
            blocks, found = range(count // 2), []
            sources = ldmatrix(source_rows, columns, True, count)
            for octets, address in zip(pairs, factors, strict=True):
                if len(octets) == 1:
                    matrices = ldmatrix(address, columns, True, count)
                    found.append([tuple(matrices[2 * i : 2 * i + 2]) for i in blocks])
                else:
                    found.append([tuple(ldmatrix(address, columns + i * PIECE * ITEM, True)) for i in blocks])
            return Tiles(sources, found, ldmatrix(addend_rows, columns, True, count) if adds else [])

        loaded = load(0)
        cute.arch.mbarrier_wait(memory.weights_ready + item.index % BUFFERS, (item.index // BUFFERS) & 1)
        weights = self.load_weights(memory, lane, item)
        rounds = item.last and config.stochastic
        if rounds:
            words = load_shared(Int32, self.bits_address(memory, item) + lane.q * 16, 0, 4)
            bits = [RowBits(*words[i : i + 2]).after(lane.column + lane.c) for i in (0, 2)]
        stage_index = item.turn % tile.stages
        stage = memory.stage + stage_index * config.stage_bytes
        for step, tiles in enumerate(steps):
            now = loaded or load(step)
            # Before this step's stores: the compiler cannot tell that they go elsewhere.
            loaded = load(step + 1) if config.loads_ahead and step + 1 < len(steps) else None
            rows = [self.source_terms(matrix) for matrix in now.sources]
            self.add_products(weights, rows, sums.du, tiles, item)
            totals = self.d_source_sums(weights, now.factors)
            if item.last and step == 0:  # while the tensor core works
                cute.arch.mbarrier_wait(memory.stored + stage_index, ((item.turn // tile.stages) & 1) ^ 1)
            staged = []
            for i, k in enumerate(tiles):
                d_source = totals[i // 2][i % 2 * 2 : i % 2 * 2 + 2]
                if weights.unscale is not None:
                    d_source = [value * weights.unscale for value in d_source]
                if not item.first:
                    d_source = [d_source[e] + sums.d_sources[e, k] for e in range(2)]
                if item.last:
                    values = unpack(Float16 if config.scaled else self.dtype, now.sources[i])
                    d_source = [d_source[e] + weights.pull[e] * values[e] for e in range(2)]
                if adds:
                    old = unpack(self.dtype, now.addends[i])
                    d_source = [value + addend for value, addend in zip(d_source, old, strict=True)]
                if rounds:
                    drawn = [of_row.after(k * 8).first for of_row in bits]
                    staged.append(stochastic_pair(d_source, drawn, self.dtype))
                elif item.last:
                    staged.append(pack(self.dtype, *d_source))
                else:
                    sums.d_sources[0, k], sums.d_sources[1, k] = d_source
            if item.last:
                stmatrix(stage + self.staged_place(lane, step), 0, staged)
            # Keeps the compiler from hoisting every step's loads and products, which spilled.
            cute.arch.sync_warp()
        if not item.last:
            # Another proxy fills the slots again. What was staged has waited for this item's reads; without it, an arrival overtook
            # reads that stood behind remote stores, until they found the slot's next rows (on an H200: one token in a hundred).
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
        with cute.arch.elect_one():
            for index in released:
                cute.arch.mbarrier_arrive(memory.outputs_empty + index)
            if item.last:
                cute.arch.mbarrier_arrive(memory.sources_empty + source_index)
                cute.arch.mbarrier_arrive(memory.staged + stage_index)

    def load_weights(self, memory: Memory, lane: Lane, item: Item) -> Weights:
        """As store_weights has stored them."""
        config, octets = self.config, len(item.octets)
        at = self.weights_address(memory, item) + lane.lane * 16
        numbers = load_shared(Float32, at, 0, config.weight_numbers) + [None] * (4 - config.weight_numbers)
        vectors = range(ceil_div(config.weight_words(octets), 4))
        words = itertools.chain(*[load_shared(Int32, at, LANES * 16 * (1 + i), 4) for i in vectors])

        def operands(dtype: type[Numeric], terms: int) -> list[Weight]:
            return [Weight(dtype, list(itertools.islice(words, terms))) for _ in range(octets)]

        p = operands(self.dtype, config.mix_terms(config.dtype))
        g = operands(self.query_dtype, config.mix_terms(config.query_dtype))
        of_sources = [(next(words), next(words)) for _ in range(ceil_div(octets * config.weight_terms, 2))]
        pull = numbers[:2] if item.last else None
        return Weights(p, g, pull, of_sources, numbers[2], numbers[3] if self.dtype is Float16 else None)

    def staged_place(self, lane: Lane, step: int) -> Int32:
        """Where this lane lets stmatrix begin in a step, in bytes of a stage: row l % 8, 8 columns on for every 8 lanes.

        Lanes of rows past the last have a place each, behind the rows, that nobody reads.
        """
        sources, row, matrix = self.config.num_sources, lane.lane % OCTET, lane.lane // OCTET
        place = row * self.tile.row_bytes + lane.offset + matrix * 16 + step * STEP * ITEM
        if sources == OCTET:
            return place
        beyond = sources * self.tile.row_bytes + ((lane.warp * (OCTET - sources) + row - sources) * TILES + matrix) * 16
        return select(row < sources, place, beyond)

    def pairs(self, outputs: list, queries: list) -> list[list]:
        """What belongs to octets of outputs and of queries, by twos that share an mma: those of one dtype."""
        if self.query_dtype is self.dtype:
            outputs, queries = outputs + queries, []
        return [octets[i : i + 2] for octets in (outputs, queries) for i in range(0, len(octets), 2)]

    def d_source_sums(self, weights: Weights, factors: list) -> list[list[Float32]]:
        """What a step's blocks of 16 columns of the sources' gradients get from an item's p and g.

        High terms' products and the others' are two sums, and one mma of every sum comes after the other: each waits for the one
        before of its own.
        """
        blocks = range(len(factors[0]))
        operands = self.pairs(weights.p, weights.g * self.config.query_terms)

        def products(terms: slice) -> list[tuple]:
            """(dtype, A of each block, B)"""
            found = []
            for octets, of_blocks in zip(operands, factors, strict=True):
                for b in zip(*[octet.terms[terms] for octet in octets], strict=True):
                    found.append((octets[0].dtype, of_blocks, b))
            return found

        sums: list[list] = [[None for _ in blocks] for _ in range(2)]
        for pair in itertools.zip_longest(products(slice(1)), products(slice(1, None))):
            for total, (dtype, a, b) in ((total, found) for total, found in zip(sums, pair, strict=True) if found):
                total[:] = [self.product(dtype, a[i], b, total[i]) for i in blocks]
        return [[high + other for high, other in zip(*totals, strict=True)] for totals in zip(*sums, strict=True)]

    def product(self, dtype: type[Numeric], a: tuple[Pair, ...], b: tuple[Pair, ...], total) -> list[Float32]:
        """Adds 16 columns of one or two octets' rows times one term of their weights."""
        if len(b) == 1:
            return mma_k8(dtype, a, b[0], total)
        return mma(dtype, (a[::2], a[1::2]), b, total)

    def source_terms(self, matrix: Pair) -> tuple[Pair, ...]:
        """A tile of sources in the gradients' dtype."""
        if not self.mixed:
            return (matrix,)
        return tuple(split_pair(self.dtype, *unpack(Float16, matrix), 2))

    def add_products(self, weights: Weights, rows: list, r_du: cute.Tensor, tiles: range, item: Item) -> None:
        """Adds to du what a step's tiles of sources give.

        Where fp32 gradients are wanted, products start from zero and are added in fp32 registers: the tensor core's
        own sums are truncated, by 5e-6 over a hundred tokens. (And fp16 products have a scale of their own.)
        """
        config, alone = self.config, len(item.octets) == 1
        # Of rows 0 to 7 and rows 8 to 15. (Where du has more octets than one, they would have to be moved beside zeros.)
        octets = [0, config.du_octets - 1] if alone else item.octets
        apart = config.adds_apart or (alone and config.octets > 1)
        totals: list[list[Float32] | None] = [None] * len(rows)
        if not apart:
            totals = [[r_du[e, k, octet] for octet in octets for e in range(2)] for k in tiles]
        for a in weights.of_sources:
            for part in range(len(rows[0])):
                totals = [mma_k8(self.dtype, a, row[part], total) for row, total in zip(rows, totals, strict=True)]
        for k, total in zip(tiles, totals, strict=True):
            if not apart:
                for i, octet in enumerate(octets):
                    r_du[0, k, octet], r_du[1, k, octet] = total[2 * i : 2 * i + 2]
                continue
            if alone:
                total = [total[e] + total[2 + e] for e in range(2)]
            if weights.value_unscale is not None:
                total = [value * weights.value_unscale for value in total]
            for i, octet in enumerate(item.octets):
                for e in range(2):
                    r_du[e, k, octet] = r_du[e, k, octet] + total[2 * i + e]

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
                value = [r_du[e, k, octet] for e in range(2)]
                if config.du_octets > config.octets:
                    value = [value[e] + r_du[e, k, 1] for e in range(2)]
                store_pair(address, offset, value, inside)


def by_twos(terms: list[Pair]) -> list[tuple[Pair, Pair]]:
    """One term after the other, and zero beside the last of an odd number."""
    return list(zip(terms[::2], [*terms[1::2], Int32(0)], strict=False))


def masked(numbers: list[Float32], there: list[Boolean] | None) -> list[Float32]:
    """Zero where there is none: what nobody has copied may be anything. None: all are there."""
    return (
        numbers if there is None else [select(c, value, Float32(0.0)) for c, value in zip(there, numbers, strict=True)]
    )


def multiply(numbers: list[Float32], factors: list[Float32] | None = None) -> list[Float32]:
    return numbers if factors is None else [a * b for a, b in zip(numbers, factors, strict=True)]
