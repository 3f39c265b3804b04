"""The kernel behind phase1_fwd: for every token, S queries attend to the same N source rows, on tensor cores.

    logit_sn = scale * rstd_n * <u_s, v_n>      rstd_n = (mean(v_n^2) + eps)^(-1/2)      u = query * key_weight
    out_s    = sum_n softmax_n(logit_s) v_n     lse_s  = log sum_n exp(logit_sn)

An *item* is what fills the 8 columns of an mma: the source rows of one token, by eights, or of 2, 4 or 8 tokens when
N <= 4 and S <= 8. (Those share mma tiles, where each has weights of zero for the others' rows: a row that is not finite
reaches the other tokens of its item.) The hidden dimension is split over the CTAs of a cluster, then over consumer
warps; all walk the same items. Per item, a warp does

    logits     queries [16 x D-slice] times rows^T [D-slice x 8], and rows times rows^T, whose diagonal are the squares
    exchange   sums of these over all warps and CTAs: each warp adds up one share and sends it to every CTA; or, direct,
               each sends its own sums to every CTA, where every warp adds them up
    softmax    in every warp, from the sums; weights become mma operands in place
    mix        weights [16 x 8 high and 8 low] times rows [8 x D-slice]: both halves of K see the same rows
    store      rows staged in shared memory, read back in the order of their bytes

in the order logits(k + 1), softmax(k), mix(k), exchange(k + 1), so that no warp waits for a sum that was sent just
before. One producer thread keeps a ring of slots full: up to 8 row pieces each, of all columns of the CTA or of half of
them (a *slab*).

Where out is scaled fp16, a row's scale must be known before its first element is rounded: it is that of a bound of the
row, sum_n p_sn max|v_n|. The largest magnitudes of the sources are found beside the squares, and exchanged with them.

Where out is rounded stochastically, weights have a third term, for fp32's accuracy.

Clusters draw their items from a counter in device memory. SMs differ in speed: with a fixed share of the items each, the
first was done 60 to 120 us of 430 before the median (measured on an H200), and the others drifted apart.

Rows are read from device memory once. Deterministic: every sum has a fixed order.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float16, Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from cute_kernels.config import ITEM_BYTES, LANES, VECTOR
from cute_kernels.config_phase1 import (
    BLOCK,
    CONSUMER_REGISTERS,
    OCTET,
    PRODUCER_REGISTERS,
    QUERY_REGISTERS,
    Phase1Config,
    Phase1Outputs,
)
from cute_kernels.device.cluster import Queue, cluster_queue, sync_cluster
from cute_kernels.device.mma import (
    Octet,
    Pair,
    bulk_load,
    copy_scalar,
    fetch_increment,
    larger_magnitudes,
    ldmatrix,
    load_shared,
    mma,
    mma_k8,
    opaque,
    pack,
    power_of_two_scale,
    select,
    split_pair,
    store_cluster,
    store_scalar,
    store_shared,
    store_vector,
    unpack,
    zip_pairs,
)
from cute_kernels.device.phase1_queries import K_STEP, TYPES, ChainedSum, Queries, load_queries
from cute_kernels.device.pipelines import EVICT_FIRST, RowTable, producer_state
from cute_kernels.device.rounding import (
    PHASE_1_OUT,
    RowBits,
    finite_magnitude,
    inverse,
    row_bits,
    scale_from,
    stochastic,
)
from cute_kernels.device.rows import add, exp_difference, log, reciprocal_root, tree

ITEM = ITEM_BYTES
# 16-byte reads of the staging buffer on their way at once
STORE_BATCH = 4


class Memory:
    """Byte addresses in shared memory, and the mbarriers."""

    def __init__(self, config: Phase1Config, base: cute.Pointer):
        self.base = base
        shape, tile = config.shape, config.tile
        ring_bytes = shape.ring_bytes(tile)
        stage_bytes = tile.warps * shape.stage_bytes(tile)
        third_bytes = tile.warps * shape.third_bytes(tile)
        partial_bytes = 0 if tile.direct else 2 * tile.warps * shape.partial_bytes
        # [slots, slot_rows, row_bytes]
        self.ring = Int32(base.toint())
        # [warps, 8 or 16 rows, stage_row_bytes]
        self.stage = self.ring + ring_bytes
        # [warps, 8 per octet of queries, third_row_bytes]
        self.third = self.stage + stage_bytes
        # [2 buffers, warps, partial_bytes], when the exchange has two steps
        self.partial = self.third + third_bytes
        # [2 buffers, CTAs of the cluster, partial_bytes], or [4 buffers, CTAs, warps, partial_bytes]
        self.reduced = self.partial + partial_bytes
        scales_at = ring_bytes + stage_bytes + third_bytes + shape.exchange_bytes(tile)
        # [2 buffers, warps, 32 rows], where sources are scaled fp16
        self.scales = self.ring + scales_at
        table_at = scales_at + shape.scales_bytes(tile)
        # Of the sources' scales
        table = cute.recast_ptr(base + table_at, dtype=Int64)
        self.table = RowTable(cute.make_tensor(table, cute.make_layout((2, config.num_sources))))
        barriers_at = table_at + shape.table_bytes
        barriers = cute.recast_ptr(base + barriers_at, dtype=Int64)
        # [slots]: the slot's bytes have landed; every warp that reads it is done
        self.full, self.empty = barriers, barriers + tile.slots
        # [2 buffers], when the exchange has two steps: every warp's partial sums are there
        self.partial_ready = barriers + 2 * tile.slots
        # [2 or 4 buffers]: every share of the totals is there
        self.reduced_ready = self.partial_ready + (0 if tile.direct else 2)
        self.reduced_ready_address = Int32(self.reduced_ready.toint())
        # [places]: the first CTA's producer has drawn an item for this CTA's
        self.drawn_ready = self.reduced_ready + (4 if tile.direct else 2)
        self.drawn_ready_address = Int32(self.drawn_ready.toint())
        # [slots]: the item in the slot; [places]: items drawn
        self.items = self.drawn_ready_address + 8 * shape.places(tile)
        self.drawn = self.items + 4 * tile.slots


class Lane(NamedTuple):
    """A consumer thread's place: c and q are the mma coordinates of device/mma.py."""

    warp: Int32
    lane: Int32
    c: Int32
    q: Int32
    slab: Int32
    column: Int32  # first column of the warp's slice, in the whole row


class Weights(NamedTuple):
    """Of an item's rows.

    Where sources are scaled fp16, a row's weight is its share times its scale, divided by a power of two of the query and
    token, the *unit*, so that the largest one fills fp16. The mixes are then in this unit.
    """

    # terms of mma operands [octet of queries][group]: high and low; where out is rounded stochastically, bf16 has a third
    operands: list[list[list[Pair]]]
    # what makes results of mixes [octet of queries][2], of the tokens of columns 2q and 2q + 1: units over scales of out
    factors: list[list[Float32]]
    bits: list[RowBits]  # those of `random_bits`, where out is rounded stochastically


class Phase1Kernel:
    def __init__(self, config: Phase1Config):
        self.config, self.shape, self.tile = config, config.shape, config.tile
        self.dtype = TYPES[config.dtype]
        self.out_dtype = Float16 if self.shape.scaled_out else TYPES[config.out]
        # Whether queries are read as they are
        self.plain_queries = config.key_weight is None and config.query == config.dtype
        self.warp_columns = self.tile.blocks * BLOCK
        self.slab_warps = self.tile.warps // self.tile.slabs
        # Whether the last columns of the last warps lie beyond the row's end
        self.ragged = self.tile.cluster * self.shape.cta_columns(self.tile) != config.hidden_size
        # Blocks that the mix loads ahead: none where queries fill the registers
        self.ahead = 1 if self.shape.operand_registers(self.tile) < QUERY_REGISTERS else 0
        # Of totals, and the shares that make one up
        self.buffers = 4 if self.tile.direct else 2
        self.shares = self.tile.cluster * (self.tile.warps if self.tile.direct else 1)
        # Whether some rows of a slot have no source
        self.vacant_rows = config.num_sources % self.shape.rows_per_token != 0

    @cute.jit
    def __call__(
        self,
        sources: list,  # N addresses of [T, D]; then of scales [T], where there are any
        strides: list,  # elements from one token to the next
        queries: Int64,  # [S, D]
        query_stride: Int64,
        key_weights: Int64,  # [S, D], when there are any
        key_weight_stride: Int64,
        outputs: Phase1Outputs,
        counter: Int64,  # int32, zero before a launch and after it
        tokens: Int32,
        eps: Float32,
        scale: Float32,
        grid: Int32,
        stream: cuda.CUstream,
    ):
        cluster = self.tile.cluster
        self.kernel(
            sources,
            strides,
            queries,
            query_stride,
            key_weights,
            key_weight_stride,
            outputs,
            counter,
            tokens,
            eps,
            scale,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[cluster, 1, 1] if cluster > 1 else None,
            smem=self.config.shared_bytes,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        sources: list,
        strides: list,
        queries: Int64,
        query_stride: Int64,
        key_weights: Int64,
        key_weight_stride: Int64,
        outputs: Phase1Outputs,
        counter: Int64,
        tokens: Int32,
        eps: Float32,
        scale: Float32,
    ):
        tile = self.tile
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cute.arch.griddepcontrol_launch_dependents()
        base = SmemAllocator().allocate(self.shape.shared_bytes(tile), 1024)
        memory = Memory(self.config, base)

        if thread == 0:
            self.init_barriers(memory)
            self.fill_table(memory, sources, strides)
        if const_expr(self.ragged):
            self.clear(memory, thread)
        cute.arch.mbarrier_init_fence()
        sync_cluster(tile.cluster)
        # The launch overlaps the kernel before, up to here.
        cute.arch.griddepcontrol_wait()

        if warp >= tile.warps:
            if const_expr(self.config.producer_warps > 1):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp == tile.warps:
                with cute.arch.elect_one():
                    work = cluster_queue(tile.cluster, tokens, self.shape.tokens)
                    self.produce(self.anew(memory), work, counter, sources, strides)
                cute.arch.sync_warp()
        else:
            if const_expr(self.config.producer_warps > 1):
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            work = cluster_queue(tile.cluster, tokens, self.shape.tokens)
            lane, own = self.place(memory, work, warp, thread % LANES), self.anew(memory)
            given = load_queries(self, own, lane, queries, query_stride, key_weights, key_weight_stride)
            self.consume(own, work, warp, lane.lane, given, outputs, eps, scale)
        if const_expr(tile.cluster > 1):
            # No CTA may leave while another can still write to its shared memory.
            sync_cluster(tile.cluster)

    def anew(self, memory: Memory) -> Memory:
        """The same, for one role: addresses made before the roles part spilled."""
        address = opaque(Int32(memory.base.toint()))
        base = cute.make_ptr(memory.base.dtype, address, cute.AddressSpace.smem, assumed_align=1024)
        return Memory(self.config, base)

    def init_barriers(self, memory: Memory) -> None:
        tile = self.tile
        for slot in range(tile.slots):
            cute.arch.mbarrier_init(memory.full + slot, 1)
            cute.arch.mbarrier_init(memory.empty + slot, self.slab_warps)
        # Every lane arrives for its own stores: racecheck does not see that one lane's arrival covers its warp's.
        for buffer in range(0 if tile.direct else 2):
            cute.arch.mbarrier_init(memory.partial_ready + buffer, tile.warps * LANES)
        for buffer in range(self.buffers):
            # Over a cluster, shares arrive as bytes; the one arrival announces how many.
            cute.arch.mbarrier_init(memory.reduced_ready + buffer, tile.warps * LANES if tile.cluster == 1 else 1)
        for place in range(self.shape.places(tile)):
            cute.arch.mbarrier_init(memory.drawn_ready + place, 1)

    def fill_table(self, memory: Memory, sources: list, strides: list) -> None:
        if self.config.scaled_sources:
            count = self.config.num_sources
            memory.table.fill(sources[count:], strides[count:], 4)

    @cute.jit
    def clear(self, memory: Memory, thread: Int32):
        """Zeros where no copy writes: they enter the products, and what shared memory holds at first may be a NaN."""
        end = self.shape.ring_bytes(self.tile)
        zero = Int32(0)
        for offset in cutlass.range(thread * 16, end, self.config.threads * 16, unroll=1):
            store_shared(memory.ring + offset, 0, [zero, zero, zero, zero])
        cute.arch.fence_view_async_shared()

    # Producer

    @cute.jit
    def produce(self, memory: Memory, work: Queue, counter: Int64, sources: list, strides: list):
        """Fills the ring with the items' rows: slots in order of item, group of 8 sources, slab; then one that says stop."""
        state = producer_state(self.tile.slots)
        turn, item = Int32(0), work.first
        while item < work.items:
            # Before the copies, which its latency hides behind.
            drawn = fetch_increment(counter, work.rank == 0)
            token = item * self.shape.tokens
            for group in cutlass.range_constexpr(self.shape.groups):
                for slab in cutlass.range_constexpr(self.tile.slabs):
                    self.acquire(memory, state, item)
                    slot = self.slot_address(memory, state.index, group, slab)
                    self.fill(memory, work, state, slot, self.group_rows(group, token, work), slab, sources, strides)
                    state.advance()
            item = self.next_item(memory, work, counter, turn, drawn)
            turn += 1
        for _ in cutlass.range_constexpr(self.tile.slabs):
            self.acquire(memory, state, item)
            cute.arch.mbarrier_arrive(memory.full + state.index)
            state.advance()

    @cute.jit
    def next_item(self, memory: Memory, work: Queue, counter: Int64, turn: Int32, drawn: Int32) -> Int32:
        """The item after that of `turn`: what the first CTA has drawn. Whoever draws last leaves the counter at zero.

        A place is used again `places` turns later. The first CTA gets no further ahead than its ring is long, since
        every item needs sums from all CTAs.
        """
        item = work.clusters + drawn
        store_scalar(counter, Int32(0), (work.rank == 0) & (drawn == work.items - 1))
        if const_expr(self.tile.cluster > 1):
            place = turn % self.shape.places(self.tile)
            address, barrier = memory.drawn + place * 4, memory.drawn_ready_address + place * 8
            if work.rank == 0:
                for cta in cutlass.range_constexpr(1, self.tile.cluster):
                    store_cluster(address, barrier, Int32(cta), [item])
            else:
                ready = memory.drawn_ready + place
                cute.arch.mbarrier_arrive_and_expect_tx(ready, 4)
                cute.arch.mbarrier_wait(ready, (turn // self.shape.places(self.tile)) & 1)
                (item,) = load_shared(Int32, address, 0, 1)
        return item

    def acquire(self, memory: Memory, state, item: Int32) -> None:
        """Waits until the slot is free, and notes the item in it."""
        cute.arch.mbarrier_wait(memory.empty + state.index, state.phase)
        store_shared(memory.items + state.index * 4, 0, [item])

    def group_rows(self, group: int, token: Int32, work: Queue) -> list[tuple[int, int, Int32]]:
        """(row of the slot, source, token) of a group's rows. Tokens past the end repeat the last one."""
        shape = self.shape
        present = range(group * OCTET, min((group + 1) * OCTET, shape.num_sources))
        if shape.tokens == 1:
            return [(source % OCTET, source, token) for source in present]
        last = work.tokens - 1
        return [
            (k * shape.num_sources + source, source, cutlass.min(token + k, last))
            for k in range(shape.tokens)
            for source in present
        ]

    def slot_address(self, memory: Memory, index: Int32, group: int, slab: Int32) -> Int32:
        shape, tile = self.shape, self.tile
        row_bytes = shape.row_bytes(tile)
        if shape.even_slots:
            return memory.ring + index * (shape.slot_rows(0) * row_bytes)
        item = index // shape.slots_per_item(tile) * shape.item_bytes(tile)
        return memory.ring + item + (group * OCTET * tile.slabs + slab * shape.slot_rows(group)) * row_bytes

    def slot_row(self, group: int, row: Int32) -> Int32:
        """Where a slot has the row that is in column `row` of an mma; another one where there is none, of weight zero."""
        shape = self.shape
        if not self.vacant_rows:
            return row
        if shape.tokens == 1:
            return cutlass.min(row, shape.slot_rows(group) - 1)
        source = cutlass.min(row % shape.rows_per_token, shape.num_sources - 1)
        return row // shape.rows_per_token * shape.num_sources + source

    def fill(self, memory, work: Queue, state, slot: Int32, rows: list, slab: Int32, sources, strides) -> None:
        shape, tile = self.shape, self.tile
        slab_columns = self.slab_warps * self.warp_columns
        column = work.rank * shape.cta_columns(tile) + slab * slab_columns
        size, some = Int32(slab_columns * ITEM), None
        if self.ragged:
            size = cutlass.max(cutlass.min(size, (self.config.hidden_size - column) * ITEM), 0)
            some = size > 0
        cute.arch.mbarrier_arrive_and_expect_tx(memory.full + state.index, size * len(rows))
        barrier = Int32((memory.full + state.index).toint())
        for row, source, token in rows:
            address = sources[source] + (Int64(token) * strides[source] + column) * ITEM
            bulk_load(slot + row * shape.row_bytes(tile), address, size, barrier, EVICT_FIRST, some)

    # Consumers

    def place(self, memory: Memory, work: Queue, warp: Int32, lane: Int32) -> Lane:
        shape, tile = self.shape, self.tile
        c, q = lane // 4, lane % 4
        slab = warp // self.slab_warps
        return Lane(
            warp=warp,
            lane=lane,
            c=c,
            q=q,
            slab=slab,
            column=work.rank * shape.cta_columns(tile) + warp * self.warp_columns,
        )

    def row_address(self, memory: Memory, lane: Lane, index: Int32, group: int, row: Int32) -> Int32:
        """Of the warp's columns of the row that is in column `row` of an mma."""
        slot = self.slot_address(memory, index, group, lane.slab)
        in_slab = lane.warp % self.slab_warps * (self.warp_columns * ITEM)
        return slot + in_slab + self.slot_row(group, row) * self.shape.row_bytes(self.tile)

    @cute.jit
    def consume(self, memory, work, warp, thread_lane, queries, outputs, eps: Float32, scale: Float32):
        # One turn more than there are items: each part of the code is there once, and nothing spills before the loop.
        turn, before, going = Int32(0), Int32(0), Boolean(True)
        while going:
            # Opaque: what follows from a lane's place was made before the loop, and spilled.
            lane = self.place(memory, work, warp, opaque(thread_lane))
            item = self.item(memory, lane, turn)
            going = item < work.items
            if const_expr(self.config.scaled_sources):
                if going:
                    self.fetch_scales(memory, work, lane, turn, item)
                cute.arch.cp_async_commit_group()
            if going:
                self.logits(memory, work, lane, queries, turn)
            if turn > 0:
                weights = self.softmax(memory, work, lane, outputs, turn - 1, before, eps, scale)
                self.mix(memory, work, lane, outputs, turn - 1, before, weights)
                self.release(memory, lane, turn - 1)
            if const_expr(not self.tile.direct) and going:
                self.exchange(memory, work, lane, turn)
            before = item
            turn += 1

    def item(self, memory: Memory, lane: Lane, turn: Int32) -> Int32:
        """What the producer has put into the turn's slots; no item if it is past the last."""
        slot, parity = self.slot(lane, turn, 0)
        cute.arch.mbarrier_wait(memory.full + slot, parity)
        return load_shared(Int32, memory.items + slot * 4, 0, 1)[0]

    def fetch_scales(self, memory: Memory, work: Queue, lane: Lane, turn: Int32, item: Int32) -> None:
        """Starts copying the scales of an item's rows, for this warp: lane r that of row r, or any where there is none."""
        shape = self.shape
        row, token = lane.lane, item * shape.tokens
        if shape.tokens > 1:
            token = cutlass.min(token + row % OCTET // shape.rows_per_token, work.tokens - 1)
            row = row % shape.rows_per_token
        source = cutlass.min(row, shape.num_sources - 1)
        copy_scalar(self.scales(memory, lane, turn) + lane.lane * 4, memory.table.start(source, token))

    def scales(self, memory: Memory, lane: Lane, turn: Int32) -> Int32:
        """This warp's buffer for an item."""
        return memory.scales + (turn % 2 * self.tile.warps + lane.warp) * (LANES * 4)

    def slot(self, lane: Lane, turn: Int32, group: int) -> tuple[Int32, Int32]:
        """(slot, parity of its full barrier) of this warp's slab of a group.

        A warp passes over the other slabs' slots, so a slot may be two laps further the next time it comes round, which
        parity cannot tell from none. No warp is that far ahead: it needs every warp's sums of item k - 2 before it
        begins item k, so each slot of item k - 2 has been seen full by then, and the ring is at least two items long.
        """
        index = turn * self.shape.slots_per_item(self.tile) + group * self.tile.slabs + lane.slab
        return index % self.tile.slots, (index // self.tile.slots) & 1

    def logits(self, memory: Memory, work: Queue, lane: Lane, queries: Queries, turn: Int32) -> None:
        """This warp's share of an item's products and squares, to its partial buffer; or, when the exchange is direct,
        to every CTA.
        """
        shape, tile = self.shape, self.tile
        buffer = turn % self.buffers
        if tile.direct:
            index = (buffer * tile.cluster + work.rank) * tile.warps + lane.warp
            share = memory.reduced + index * shape.partial_bytes
            if tile.cluster > 1:
                self.announce_totals(memory, lane, buffer)
        else:
            share = memory.partial + (buffer * tile.warps + lane.warp) * shape.partial_bytes
        for group in range(shape.groups):
            slot, parity = self.slot(lane, turn, group)
            cute.arch.mbarrier_wait(memory.full + slot, parity)
            # Matrix m of ldmatrix is columns 8m to 8m + 7 of the eight rows.
            rows = self.row_address(memory, lane, slot, group, lane.lane % 8) + lane.lane // 8 * 16
            products, squares, largest = self.products(rows, queries)
            at = group * shape.group_bytes
            for octet, pair in enumerate(products):
                self.send(memory, buffer, share + (lane.lane * 8 + at + octet * 256), pair, None)
            # The square of row n is element (n, n) of its octet: in lane 4n + n // 2, the first or second number.
            square = select(lane.c % 2 == 0, squares[0], squares[1])
            at_square = share + (lane.c * 4 + at + shape.octets * 256)
            self.send(memory, buffer, at_square, [square], lane.q == lane.c // 2)
            if shape.scaled_out:
                self.send(memory, buffer, at_square + 32, [self.row_peak(largest)], lane.q == 0)
        if tile.cluster == 1 or not tile.direct:
            ready = memory.reduced_ready if tile.direct else memory.partial_ready
            cute.arch.mbarrier_arrive(ready + buffer)

    def row_peak(self, largest: Pair) -> Float32:
        """Of row c, from what each lane found in it."""
        peak = tree(cute.arch.fmax, [cute.arch.fmax(value, -value) for value in unpack(self.dtype, largest)])
        for offset in (1, 2):
            peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, offset=offset))
        return peak

    def send(self, memory: Memory, buffer: Int32, address: Int32, values: list[Float32], predicate) -> None:
        """Part of a warp's sums to their place here; or, when the exchange is direct, in every CTA."""
        if self.tile.cluster == 1 or not self.tile.direct:
            store_shared(address, 0, values, predicate)
            return
        for cta in range(self.tile.cluster):
            store_cluster(address, memory.reduced_ready_address + buffer * 8, Int32(cta), values, predicate)

    def products(self, rows: Int32, queries: Queries) -> tuple[list[list[Float32]], list[Float32], Pair]:
        """Over the warp's columns: (this lane's two products per octet of queries, its two of rows times rows^T, the
        largest of row c that it has seen, if out is scaled fp16).

        Third terms add to the sums of second terms; those of an odd first octet fill the idle half of the squares' mma.
        """
        shape, tile = self.shape, self.tile
        third, odd = shape.terms == 3, shape.octets % 2
        count = shape.operand_octets
        sums = [ChainedSum(self.dtype) for _ in range(count // 2)]
        if count % 2:
            sums.append(ChainedSum(self.dtype, alternating=True))
        squares, largest = ChainedSum(self.dtype), Int32(0)
        for pair_of_steps in range(self.warp_columns // (2 * K_STEP)):
            # Columns 32i to 32i + 31 of the eight rows: operands of two steps
            columns = ldmatrix(rows, pair_of_steps * 2 * K_STEP * ITEM)
            if shape.scaled_out:
                largest = tree(functools.partial(larger_magnitudes, self.dtype), [largest, *columns])
            beside = [None, None]
            if third and odd:
                four = ldmatrix(queries.third_octet, pair_of_steps * 2 * K_STEP * ITEM)
                beside = [(four[0], four[1]), (four[2], four[3])]
            for half in range(2):
                step = 2 * pair_of_steps + half
                source: Octet = (columns[2 * half], columns[2 * half + 1])
                for i, operand in enumerate(queries.operands[step]):
                    sums[i].add(operand, source)
                for i in range(shape.octets // 2 if third else 0):
                    at = i * 2 * OCTET * shape.third_row_bytes(tile) + step * K_STEP * ITEM
                    a0, a1, a2, a3 = ldmatrix(queries.third_pairs, at)
                    second = (shape.octets + odd) // 2 + i
                    sums[second].add(((a0, a2), (a1, a3)), source)
                squares.add((source, beside[half]), source)
            # See mix_segment.
            if pair_of_steps % 2:
                cute.arch.sync_warp()
        by_octet = [half for chained in sums for half in chained.octets()]
        r_squares = squares.octets()
        products = by_octet[: shape.octets]
        if shape.terms > 1:
            low = by_octet[shape.octets : 2 * shape.octets]
            if third and odd:
                low[0] = [a + b for a, b in zip(low[0], r_squares[1], strict=True)]
            products = [[h + l for h, l in zip(*both, strict=True)] for both in zip(products, low, strict=True)]
        for octet, unscale in enumerate(queries.unscale):
            products[octet] = [value * unscale for value in products[octet]]
        return products, r_squares[0], largest

    def exchange(self, memory: Memory, work: Queue, lane: Lane, turn: Int32) -> None:
        """Adds this warp's share of the partial sums up and sends it to every CTA of the cluster.

        Two buffers of each are enough. A warp writes partial sums of item k + 2 after it has seen all totals of k, when
        every warp is past its reads of partial sums k. It sends totals of k + 2 after it has seen all totals of k + 1,
        when every warp of every CTA has sent its share of them (none is empty), so is past its reads of totals k.

        A direct exchange has no such step and needs four: a warp sends sums of item k + 2 after it has seen all of k;
        a warp that has sent its sums of k may still read those of k - 1.
        """
        shape, tile = self.shape, self.tile
        buffer = turn & 1
        cute.arch.mbarrier_wait(memory.partial_ready + buffer, (turn >> 1) & 1)
        vectors = shape.partial_bytes // 16
        warp = opaque(lane.warp)
        begin, end = warp * vectors // tile.warps, (warp + 1) * vectors // tile.warps
        partial = memory.partial + buffer * (tile.warps * shape.partial_bytes)
        reduced = memory.reduced + (buffer * tile.cluster + work.rank) * shape.partial_bytes
        if tile.cluster > 1:
            self.announce_totals(memory, lane, buffer)
        for first in range(0, -(-vectors // tile.warps), LANES):
            vector = begin + lane.lane + first
            mine = vector < end
            at = cutlass.min(vector, vectors - 1) * 16
            total = None
            for other in range(tile.warps):
                share = load_shared(Float32, partial + at, other * shape.partial_bytes, 4)
                total = share if total is None else self.join_shares(vector, total, share)
            if tile.cluster == 1:
                store_shared(reduced + at, 0, total, mine)
            else:
                barrier = memory.reduced_ready_address + buffer * 8
                for cta in range(tile.cluster):
                    store_cluster(reduced + at, barrier, Int32(cta), total, mine)
        if tile.cluster == 1:
            cute.arch.mbarrier_arrive(memory.reduced_ready + buffer)

    def join_shares(self, vector: Int32, total: list[Float32], share: list[Float32]) -> list[Float32]:
        """Sums; of a group's last two vectors, where it has peaks, the largest."""
        shape = self.shape
        sums = [t + s for t, s in zip(total, share, strict=True)]
        if not shape.scaled_out:
            return sums
        is_peak = vector % (shape.group_bytes // 16) >= shape.group_bytes // 16 - 2
        return [select(is_peak, cute.arch.fmax(t, s), both) for t, s, both in zip(total, share, sums, strict=True)]

    def announce_totals(self, memory: Memory, lane: Lane, buffer: Int32) -> None:
        announce(lane, memory.reduced_ready + buffer, self.shares * self.shape.partial_bytes)

    def softmax(self, memory, work, lane, outputs, turn: Int32, item: Int32, eps, scale) -> Weights:
        """Weights of an item; every warp computes them all.

        Lane (c, q) holds query c of each octet and the item's columns 2q and 2q + 1: the layout of products and of
        operand A alike.
        """
        shape = self.shape
        buffer = turn % self.buffers
        cute.arch.mbarrier_wait(memory.reduced_ready + buffer, (turn // self.buffers) & 1)
        totals = memory.reduced + buffer * (self.shares * shape.partial_bytes)
        at = [group * shape.group_bytes for group in range(shape.groups)]
        if shape.scaled_sources:
            cute.arch.cp_async_wait_group(1)
            cute.arch.sync_warp()
        scales = self.row_scales(memory, lane, turn)
        # keys: what makes logits of products
        rstd, keys = [], []
        for group in range(shape.groups):
            squares = self.total(totals + lane.q * 8, at[group] + shape.octets * 256)
            means = [square * Float32(1.0 / shape.hidden_size) for square in squares]
            if scales is None:
                rstd.append([reciprocal_root(mean + eps) for mean in means])
                keys.append(rstd[-1])
            else:
                found = [self.scaled_rstd(*pair, eps) for pair in zip(means, scales[group], strict=True)]
                rstd.append([r for r, _ in found])
                keys.append([key for _, key in found])
                # A row of zeros has a scale of one, beside which others may be nothing.
                scales[group] = [
                    select(mean > 0.0, s, Float32(0.0)) for mean, s in zip(means, scales[group], strict=True)
                ]
        if self.config.rstd:
            self.store_rstd(work, lane, outputs, item, rstd)
        peaks = []
        if shape.scaled_out:
            address = totals + lane.q * 8
            peaks = [self.total(address, first + shape.octets * 256 + 32, cute.arch.fmax) for first in at]
        # Before what they are worked out beside
        bits = self.random_bits(work, lane, outputs, item) if self.config.stochastic else []
        operands, factors, numbers = [], [], []
        for octet in range(shape.octets):
            logits = []
            for group in range(shape.groups):
                products = self.total(totals + lane.lane * 8, at[group] + octet * 256)
                logits.append([scale * (key * product) for key, product in zip(keys[group], products, strict=True)])
            r_weights, r_lse, units = self.normalise(lane, logits, scales)
            operands.append([split_pair(self.dtype, *pair, self.config.weight_terms) for pair in r_weights])
            out_scales = []
            if shape.scaled_out:
                found = [[w * p for w, p in zip(*pairs, strict=True)] for pairs in zip(r_weights, peaks, strict=True)]
                bounds = [bound * unit for bound, unit in zip(self.over_sources(add, found), units, strict=True)]
                out_scales = [scale_from(finite_magnitude(bound)) for bound in bounds]
                units = [inverse(s) * unit for s, unit in zip(out_scales, units, strict=True)]
            factors.append(units)
            numbers += [value == value for value in r_lse]
            self.store_statistics(work, lane, outputs, item, octet, logits, r_lse, out_scales)
            if shape.scaled_sources or shape.scaled_out:
                # One octet after the other: four together spilled.
                cute.arch.sync_warp()
        if self.config.stochastic:
            # Nothing random where results are NaN: those of an item share its columns of the mma.
            present = cute.arch.vote_all_sync(functools.reduce(operator.and_, numbers))
            bits = [RowBits(*(select(present, word, Int32(0)) for word in words)) for words in bits]
        return Weights(operands, factors, bits)

    def row_scales(self, memory: Memory, lane: Lane, turn: Int32) -> list[list[Float32]] | None:
        """[group][2], of the lane's columns."""
        if not self.config.scaled_sources:
            return None
        own = self.scales(memory, lane, turn) + lane.q * 8
        return [load_shared(Float32, own, group * OCTET * 4, 2) for group in range(self.shape.groups)]

    def scaled_rstd(self, mean: Float32, scale: Float32, eps: Float32) -> tuple[Float32, Float32]:
        """(rstd, rstd * scale) of a row from the mean square of its values as stored; a scale above one divides eps."""
        low, down = cute.arch.fmin(scale, Float32(1.0)), inverse(cute.arch.fmax(scale, Float32(1.0)))
        root = reciprocal_root(mean * low * low + eps * down * down)
        return root * down, root * low

    def total(self, address: Int32, offset: int, combine: Callable[[Float32, Float32], Float32] = add) -> list[Float32]:
        """Two numbers combined over their shares."""
        size = self.shape.partial_bytes
        shares = [load_shared(Float32, address, offset + share * size, 2) for share in range(self.shares)]
        return [tree(combine, [share[e] for share in shares]) for e in range(2)]

    def source(self, lane: Lane, group: int, e: int) -> Int32:
        """The source in column 2q + e of a group."""
        return group * OCTET + (lane.q * 2 + e) % self.shape.rows_per_token

    def columns(self, group: int) -> list[int]:
        """Those e for which column 2q + e is a source for some lane."""
        per_token = self.shape.rows_per_token
        return [e for e in range(2) if group * OCTET + e % per_token < self.config.num_sources]

    def normalise(self, lane: Lane, logits: list, scales: list | None) -> tuple[list, list[Float32], list]:
        """(weights [group][2], lse [2], units [2]: see Weights) of one query per lane."""
        shape = self.shape
        if self.vacant_rows:
            absent = Float32(-math.inf)
            logits = [
                [select(self.source(lane, g, e) < shape.num_sources, pair[e], absent) for e in range(2)]
                for g, pair in enumerate(logits)
            ]
        highest = self.over_sources(cute.arch.fmax, logits)
        powers = [[exp_difference(pair[e], highest[e]) for e in range(2)] for pair in logits]
        denominator = self.over_sources(add, powers)
        factors = [cute.arch.rcp_approx(value) for value in denominator]
        units = [Float32(1.0)] * 2
        if scales is not None:
            powers = [[p * s for p, s in zip(*pairs, strict=True)] for pairs in zip(powers, scales, strict=True)]
            found = [power_of_two_scale(peak) for peak in self.over_sources(cute.arch.fmax, powers)]
            units = [unit for _, unit in found]
            powers = [[pair[e] * found[e][0] for e in range(2)] for pair in powers]
        weights = [[pair[e] * factors[e] for e in range(2)] for pair in powers]
        return weights, [highest[e] + log(denominator[e]) for e in range(2)], units

    def over_sources(self, combine: Callable[[Float32, Float32], Float32], values: list) -> list[Float32]:
        """[group][2] of a query and the lane's columns, combined over a token's sources: for the tokens of either column,
        which are one unless N is 1.
        """
        per_token = self.shape.rows_per_token
        if per_token == 1:
            return values[0]
        result = tree(combine, [value for pair in values for value in pair])
        for offset in (1, 2):
            if 2 * offset < per_token:
                result = combine(result, cute.arch.shuffle_sync_bfly(result, offset=offset))
        return [result, result]

    def store_statistics(
        self, work, lane, outputs, item: Int32, octet: int, logits: list, r_lse: list, out_scales: list
    ) -> None:
        """lse, and logits and scales of out if wanted, of one octet of queries: by the first CTA, the octets by different
        warps.

        Here and in store_rows an address is one 64-bit number of the lane and a sum that is the same for all of them,
        which takes no vector registers: with every address written out, the compiler kept a dozen of them and spilled.
        """
        shape = self.shape
        query = octet * OCTET + lane.c
        chosen = (work.rank == 0) & (lane.warp == octet % self.tile.warps) & (query < shape.num_queries)
        tokens = Int64(work.tokens)
        first, in_item = item * shape.tokens, lane.q * 2 // shape.rows_per_token
        for e in range(2 if shape.rows_per_token == 1 else 1):
            present = chosen & (first + in_item + e < work.tokens)
            if shape.rows_per_token > 2:
                present = present & (lane.q % (shape.rows_per_token // 2) == 0)
            position = (lane.c * tokens + in_item) + (octet * OCTET * tokens + first + e)
            store_scalar(outputs.lse + position * 4, r_lse[e], present)
            if out_scales:
                store_scalar(outputs.out_scale + position * 4, out_scales[e], present)
        if not self.config.logits:
            return
        row = lane.c * shape.num_sources + self.source(lane, 0, 0)
        for group, pair in enumerate(logits):
            for e in self.columns(group):
                source, token = self.source(lane, group, e), e // shape.rows_per_token
                present = chosen & (first + in_item + token < work.tokens) & (source < shape.num_sources)
                rows = (octet * shape.num_sources + group) * OCTET + e % shape.rows_per_token
                position = (row * tokens + in_item) + (rows * tokens + first + token)
                store_scalar(outputs.logits + position * 4, pair[e], present)

    def store_rstd(self, work: Queue, lane: Lane, outputs: Phase1Outputs, item: Int32, rstd: list) -> None:
        shape = self.shape
        chosen = (work.rank == 0) & (lane.warp == 0) & (lane.c == 0)
        tokens = Int64(work.tokens)
        first, in_item = item * shape.tokens, lane.q * 2 // shape.rows_per_token
        for group, pair in enumerate(rstd):
            for e in self.columns(group):
                source, token = self.source(lane, group, e), e // shape.rows_per_token
                present = chosen & (first + in_item + token < work.tokens) & (source < shape.num_sources)
                rows = group * OCTET + e % shape.rows_per_token
                position = (self.source(lane, 0, 0) * tokens + in_item) + (rows * tokens + first + token)
                store_scalar(outputs.rstd + position * 4, pair[e], present)

    def output_pairs(self) -> list[list[tuple[int, int]]]:
        """The item's octets of output rows (first token, octet of queries) by twos."""
        shape = self.shape
        tokens = range(0, shape.tokens, shape.octet_tokens)
        octets = [(token, octet) for token in tokens for octet in range(shape.octets)]
        return [octets[i : i + 2] for i in range(0, len(octets), 2)]

    def mix(self, memory, work: Queue, lane: Lane, outputs: Phase1Outputs, turn: Int32, item: Int32, weights) -> None:
        """Output rows of an item, over the warp's columns, two octets (token, octet of queries) of them at a time."""
        shape, tile = self.shape, self.tile
        rows = self.item_rows(memory, lane, turn)
        stage = memory.stage + lane.warp * shape.stage_bytes(tile)
        for pair, both in enumerate(self.output_pairs()):
            operands = [self.weight_terms(lane, weights.operands, both, group) for group in range(shape.groups)]
            factors = self.row_factors(lane, weights.factors, both)
            bits = [self.octet_bits(lane, weights.bits, 2 * pair + k) for k in range(len(both))] if weights.bits else []
            for first in range(0, tile.blocks, tile.segment):
                segment = range(first, min(first + tile.segment, tile.blocks))
                self.mix_segment(lane, rows, operands, factors, bits, segment, stage)
                cute.arch.sync_warp()
                self.store_rows(work, lane, outputs, item, both, segment, stage)
                cute.arch.sync_warp()

    def item_rows(self, memory: Memory, lane: Lane, turn: Int32) -> list[list[Int32]]:
        """This lane's pieces of an item's rows 2q and 2q + 1, for each group of sources."""
        return [
            [
                self.row_address(memory, lane, self.slot(lane, turn, group)[0], group, lane.q * 2 + e) + lane.c * 16
                for e in range(2)
            ]
            for group in range(self.shape.groups)
        ]

    def row_factors(self, lane: Lane, factors: list, both: list) -> list[Float32 | None]:
        """Of row c of some octets of output rows (see Weights); None: one."""
        shape = self.shape
        if not shape.scaled_out and not shape.scaled_sources:
            return [None] * len(both)
        if shape.tokens == 1:
            return [factors[octet][0] for _, octet in both]
        found = []
        for token, octet in both:
            column = (lane.c // shape.octet_queries + token) * shape.rows_per_token
            source = lane.c * 4 + column // 2
            even, odd = (cute.arch.shuffle_sync(factor, source) for factor in factors[octet])
            found.append(select(column % 2 == 0, even, odd))
        return found

    def random_bits(self, work, lane: Lane, outputs: Phase1Outputs, item: Int32) -> list[RowBits]:
        """Of row c of the item's octets of output rows, by fours: lane (c, q) makes those of the q-th of each four."""
        shape, found = self.shape, []
        for first in range(0, shape.out_octets, 4):
            place = lane.q + first
            query = place % shape.octets * OCTET + lane.c % shape.octet_queries
            token = place // shape.octets * shape.octet_tokens + lane.c // shape.octet_queries
            row = Int32(outputs.first_row) + query * work.tokens + (item * shape.tokens + token)
            found.append(row_bits(outputs.seed, row, PHASE_1_OUT))
        return found

    def octet_bits(self, lane: Lane, bits: list[RowBits], octet: int) -> RowBits:
        """Of row c of the item's octet of output rows, from the lane's first column on."""
        words = (cute.arch.shuffle_sync(word, lane.c * 4 + octet % 4) for word in bits[octet // 4])
        return RowBits(*words).after(lane.column + lane.q * (2 * VECTOR))

    def weight_terms(self, lane: Lane, weights: list, both: list, group: int) -> list[list[Pair]]:
        """Of one or two octets of output rows, for the group's rows."""
        found = []
        for token, octet in both:
            terms = weights[octet][group]
            if self.shape.tokens > 1:
                mask = self.token_mask(lane, lane.c // self.shape.octet_queries + token)
                terms = [term & mask for term in terms]
            found.append(terms)
        return found

    def token_mask(self, lane: Lane, token: Int32) -> Int32:
        """Keeps those of a lane's two columns that are rows of the item's token."""
        per_token = self.shape.rows_per_token
        if per_token == 1:
            return select(lane.q == token // 2, select(token % 2 == 0, Int32(65535), Int32(-65536)), Int32(0))
        return select(lane.q // (per_token // 2) == token, Int32(-1), Int32(0))

    def block_sums(self, rows: list, operands: list, blocks: range) -> Iterator[tuple[int, list[list[Float32]]]]:
        """(block, weights times rows over its columns) for some blocks of columns.

        Lane (c, q) loads columns 8c to 8c + 7 of rows 2q and 2q + 1. Column e of all these pieces is one B
        operand [8 rows x 8], so mma e makes columns e, 8 + e, ..., 56 + e of the block, and the lane's results for all
        e are 16 neighbouring columns.
        """
        shape = self.shape
        steps = [(block, group) for block in blocks for group in range(shape.groups)]

        def load(block: int, group: int) -> tuple[list[Pair], list[Pair]]:
            offset = block * BLOCK * ITEM
            even, odd = (load_shared(Int32, row, offset, 4) for row in rows[group])
            return even, odd

        loaded = [load(*step) for step in steps[: self.ahead]]
        sums: list[list[Float32] | None] = [None] * 8
        for i, (block, group) in enumerate(steps):
            loaded += [load(*step) for step in steps[i + self.ahead : i + self.ahead + 1]]
            even, odd = loaded.pop(0)
            pieces = [zip_pairs(even[e // 2], odd[e // 2], e % 2) for e in range(8)]
            sums = self.weighted(operands[group], pieces, [None] * 8 if group == 0 else sums)
            if group == shape.groups - 1:
                yield block, sums
            # Keeps the compiler from hoisting every block's loads and products, which spilled
            # (measured on an H200: 0.779 -> 0.814 of copy bandwidth).
            cute.arch.sync_warp()

    def weighted(self, octets: list[list[Pair]], rows: list[Pair], totals: list) -> list[list[Float32]]:
        """Adds weights times rows, for eight mmas' columns: K 0 to 7 of an mma are the high terms, K 8 to 15 the low ones.

        Third terms come after all of these, since each would wait for the mma before it.
        """
        (high, low, *third), other = octets[0], octets[1] if len(octets) > 1 else None
        a = ((high, low), None if other is None else (other[0], other[1]))
        totals = [mma(self.dtype, a, (row, row), total) for row, total in zip(rows, totals, strict=True)]
        if third:
            a = (third[0], Int32(0) if other is None else other[2])
            totals = [mma_k8(self.dtype, a, row, total) for row, total in zip(rows, totals, strict=True)]
        return totals

    def mix_segment(self, lane, rows: list, operands: list, factors: list, bits, segment: range, stage: Int32) -> None:
        """weights times rows for some blocks of columns, rounded, into the staging buffer."""
        stage_row = self.shape.stage_row_bytes(self.tile)
        at = stage + lane.c * stage_row + lane.q * (2 * VECTOR * ITEM)
        for block, sums in self.block_sums(rows, operands, segment):
            for k in range(2 * len(factors)):
                octet, half = k // 2, k % 2
                offset = octet * OCTET * stage_row + ((block - segment.start) * BLOCK + half * VECTOR) * ITEM
                factor, vector = factors[octet], [values[k] for values in sums]
                if factor is not None:
                    vector = [value * factor for value in vector]
                if bits:
                    of_vector = bits[octet].after(block * BLOCK + half * VECTOR)
                    packed = stochastic(vector, self.out_dtype, of_vector, guard=False)
                else:
                    packed = [pack(self.out_dtype, *pair) for pair in zip(vector[::2], vector[1::2], strict=True)]
                store_shared(at, offset, packed)

    def store_rows(self, work, lane, outputs, item: Int32, both: list, segment: range, stage: Int32) -> None:
        """Staged rows to device memory, 16 bytes a lane, whole rows one after the other.

        Bulk copies out of the staging buffer were slower: copies alone, 8 rows in and 16 out, reached .89 of copy
        bandwidth with them and .915 so (measured on an H200).
        """
        shape = self.shape
        vectors = len(segment) * BLOCK // VECTOR
        # Lanes of a row at a time
        width = min(1 << (vectors - 1).bit_length(), LANES)
        at_once, lane_row, lane_vector = LANES // width, lane.lane // width, lane.lane % width
        # Row r of an octet, at r - lane_row a multiple of at_once: query and token are sums of the lane's and of what r has.
        per_token = shape.octet_queries
        lane_query, lane_token = (
            (lane_row, 0) if at_once <= per_token else (lane_row % per_token, lane_row // per_token)
        )
        column = lane.column + segment.start * BLOCK + lane_vector * VECTOR
        first, tokens = item * shape.tokens, Int64(work.tokens)
        for half, (token, octet) in enumerate(both):
            count = shape.octet_tokens * per_token
            if shape.octet_tokens == 1:
                count = min(count, shape.num_queries - octet * OCTET)
            row = lane_query * tokens + lane_token + (octet * OCTET * tokens + first + token)
            address = outputs.out + (row * shape.hidden_size + column) * ITEM
            staged = stage + lane_row * shape.stage_row_bytes(self.tile) + lane_vector * 16
            places = [(r, v) for r in range(0, count, at_once) for v in range(0, vectors, width)]
            for batch in range(0, len(places), STORE_BATCH):
                moved = []
                for r, v in places[batch : batch + STORE_BATCH]:
                    offset = (half * OCTET + r) * shape.stage_row_bytes(self.tile) + v * 16
                    moved.append((r, v, load_shared(Int32, staged, offset, 4)))
                for r, v, values in moved:
                    conditions = []
                    if v + width > vectors:
                        conditions.append(lane_vector + v < vectors)
                    if r + at_once > count:
                        conditions.append(lane_row + r < count)
                    if shape.octet_tokens > 1 and shape.num_queries % per_token:
                        conditions.append(lane_query + r % per_token < shape.num_queries)
                    if self.ragged:
                        conditions.append(column + v * VECTOR < shape.hidden_size)
                    if shape.tokens > 1:
                        conditions.append(first + token + lane_token + r // per_token < work.tokens)
                    present = functools.reduce(operator.and_, conditions) if conditions else None
                    further = r % per_token * tokens + r // per_token
                    store_vector(address + further * (shape.hidden_size * ITEM), v * 16, values, present)
                if self.config.scaled_sources:
                    # One batch after the other: together, addresses spilled.
                    cute.arch.sync_warp()

    def release(self, memory: Memory, lane: Lane, turn: Int32) -> None:
        """Gives the item's slots back to the producer."""
        cute.arch.sync_warp()
        for group in range(self.shape.groups):
            slot, _ = self.slot(lane, turn, group)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(memory.empty + slot)


@cute.jit
def announce(lane: Lane, barrier: cute.Pointer, size: cutlass.Constexpr[int]):
    """The barrier's one arrival. Bytes that come before it are counted too; the phase cannot end without it."""
    if lane.warp == 0:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, size)
