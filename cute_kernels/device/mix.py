"""The row kernel behind mix_fwd, serve_step and phase2_fwd: reads every row once, mixes it in registers, writes once.

    x_i        source i of a token; the last one may arrive as two rows whose sum, rounded to the storage dtype, is x_L
    logit_i  = scale * rstd_i * <u, x_i>,  rstd_i = (mean(x_i^2) + eps)^(-1/2),  u = query * key_weight
    m        = sum_i softmax(logit)_i x_i;  merging, one more row (phase 1's mix) takes part with a given logit (its lse)
    out      = m, or RMSNorm(m) * output_weight

Warp roles: producer threads keep each consumer group's ring full of row copies in flight; the groups take the CTA's tokens in
turn. A consumer moves its part of a row from shared memory to registers, packed as stored, and frees the slot at once: rows cross
shared memory once and the ring is never held up by a token's reductions. When the rows of a token do not fit the registers they
come in chunks joined by an online softmax. Deterministic: every sum has a fixed order.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator
from cutlass.pipeline import PipelineState

from cute_kernels.config import PRODUCER_REGISTERS, Operands, RowConfig, exchange_bytes
from cute_kernels.device.pipelines import (
    RowRing,
    RowRings,
    RowTable,
    await_barriers,
    consumer_state,
    global_row,
    producer_state,
    publish_barriers,
)
from cute_kernels.device.rows import (
    LANES,
    VECTOR,
    GroupExchange,
    RowSums,
    RowTile,
    add,
    add_products,
    exp_difference,
    log,
    pack,
    reciprocal_root,
    store_by_owner,
    store_scalar,
    tree,
    unpack_again,
    vector_fp32,
    warp_sum,
)

TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}


class Scalars(NamedTuple):
    """Run-time numbers of a launch."""

    tokens: Int32
    eps: Float32
    output_eps: Float32
    scale: Float32


class RowKernel:
    def __init__(self, config: RowConfig):
        self.config, self.tile, self.dtype = config, config.tile, TYPES[config.dtype]

    @cute.jit
    def __call__(
        self,
        rows: list,  # addresses of the rows of token 0 in ring order: (merged row), sources, (delta)
        strides: list,  # elements from one token to the next
        operands: Operands,
        tokens: Int32,
        eps: Float32,
        output_eps: Float32,
        scale: Float32,
        grid: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(rows, strides, operands, Scalars(tokens, eps, output_eps, scale)).launch(
            grid=[grid, 1, 1], block=[self.config.threads, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, rows: list, strides: list, operands: Operands, scalars: Scalars):
        config, tile = self.config, self.tile
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()
        rings = RowRings.allocate(
            smem,
            self.dtype,
            groups=tile.groups,
            slots=tile.slots,
            rows=tile.rows,
            pitch=config.pitch,
            elements=config.hidden_size,
            consumer_warps=tile.warps,
        )
        table = RowTable.allocate(smem, config.rows_per_token, tile.producer_warps)
        s_partials = None
        if const_expr(tile.warps > 1):
            # (LANES * depth, warps, 2, groups)
            words = exchange_bytes(tile.chunk, tile.warps, tile.groups) // 4
            depth = words // (tile.warps * 2 * tile.groups)
            s_partials = smem.allocate_tensor(Float32, cute.make_layout((depth, tile.warps, 2, tile.groups)), 16)
        s_weight = None
        if const_expr(config.output_weight is not None):
            # (pitch,) fp32: every token needs it, and the registers are full of rows
            s_weight = smem.allocate_tensor(Float32, cute.make_layout((config.pitch,)), 16)
        if warp >= tile.consumer_warps:
            producer = warp - tile.consumer_warps
            with cute.arch.elect_one():
                rings.init_barriers(producer, tile.producer_warps)
            publish_barriers(config.threads)
            if const_expr(tile.consumer_registers > 0):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            with cute.arch.elect_one():
                table.of(producer).fill(rows, strides, self.dtype.width // 8)
                self.produce(producer, rings, table.of(producer), scalars)
        else:
            if const_expr(config.pitch > config.hidden_size):
                rings.clear_padding(tid, tile.consumer_warps * LANES)
            if const_expr(config.output_weight is not None):
                self.stage_weight(tid, s_weight, operands)
            await_barriers(config.threads)
            if const_expr(tile.consumer_registers > 0):
                cute.arch.setmaxregister_increase(tile.consumer_registers)
            self.consume(tid, warp, rings, s_partials, s_weight, operands, scalars)

    @cute.jit
    def stage_weight(self, tid: Int32, s_weight: cute.Tensor, operands: Operands):
        """The output norm's weight to shared memory, by the first group."""
        if tid < self.tile.warps * LANES:
            part = RowTile(self.config.hidden_size, self.tile.warps, tid)
            r_weight = part.load_global(TYPES[self.config.output_weight], operands.output_weight)
            cute.autovec_copy(r_weight, part.view(s_weight))

    def token_count(self, scalars: Scalars) -> Int32:
        """Tokens of this CTA: block, block + grid, block + 2 grid, ..."""
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        return (scalars.tokens - block + grid - 1) // grid

    def token(self, turn: Int32) -> Int32:
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        return block + turn * grid

    @cute.jit
    def produce(self, producer: Int32, rings: RowRings, table: RowTable, scalars: Scalars):
        """Fills the rings of groups producer, producer + producers, ... with the rows of their tokens."""
        groups, slots = self.tile.groups, self.config.slots_per_token
        count = self.token_count(scalars)
        # Rings are filled alike: `state` is where the round's tokens start in each of them.
        state = producer_state(self.tile.slots)
        for first in cutlass.range(0, count, groups, unroll=1):
            for group in cutlass.range(producer, groups, self.tile.producer_warps, unroll=1):
                if first + group < count:
                    at = state.clone()
                    for slot in cutlass.range(slots, unroll=1):
                        self.load_slot(rings.of(group), at, table, slot * self.tile.rows, self.token(first + group))
                        at.advance()
            state.advance(slots)

    @cute.jit
    def load_slot(self, ring: RowRing, state: PipelineState, table: RowTable, first: Int32, token: Int32):
        """A slot's rows of a token: first, first + 1, ..., fewer in the last slot."""
        rows, count = self.tile.rows, self.config.rows_per_token
        ring.acquire(state, rows if const_expr(count % rows == 0) else cutlass.min(rows, count - first))
        for r in cutlass.range_constexpr(rows):
            if const_expr(count % rows == 0) or first + r < count:
                ring.copy(state, r, table.row(self.dtype, first + r, token, self.config.hidden_size))

    @cute.jit
    def consume(self, tid, warp, rings, s_partials, s_weight, operands: Operands, scalars: Scalars):
        """Mixes the tokens of one group: group, group + groups, ... of this CTA's."""
        config, tile = self.config, self.tile
        group, lane = warp // tile.warps, tid % LANES
        part = RowTile(config.hidden_size, tile.warps, tid - group * (tile.warps * LANES))
        ring = rings.of(group)
        r_u = part.load_global(TYPES[config.query], operands.query)
        if const_expr(config.key_weight is not None):
            r_weight = part.load_global(TYPES[config.key_weight], operands.key_weight)
            r_u.store(r_u.load() * r_weight.load())
        count = self.token_count(scalars)
        state = consumer_state(tile.slots)
        turn = Int32(0)
        given = Float32(0.0)
        if const_expr(config.merge):
            given = self.load_given(operands, scalars, group)
        for i in cutlass.range(group, count, tile.groups, unroll=1):
            token = self.token(i)
            r_given = given
            if const_expr(config.merge):
                # The next token's, a token ahead: its latency would otherwise sit between two reductions.
                given = self.load_given(operands, scalars, i + tile.groups)
            reader = RowReader(config, ring, state, part)
            exchange = GroupExchange(s_partials, group, warp % tile.warps, lane, tile.warps, turn)
            self.mix_token(token, reader, exchange, r_u, r_given, s_weight, operands, scalars)
            state, turn = reader.state, exchange.turn

    def load_given(self, operands: Operands, scalars: Scalars, turn: Int32) -> Float32:
        """The given logit of the group's token at `turn`, or of the last token when there is none."""
        token = cutlass.min(self.token(turn), scalars.tokens - 1)
        return vector_fp32(operands.given_logit, scalars.tokens)[token]

    def mix_token(self, token, reader, exchange, r_u, r_given, s_weight, operands: Operands, scalars: Scalars):
        config, part = self.config, reader.part
        softmax = OnlineSoftmax()
        r_mix = None
        held = []
        for chunk in self.tile.chunks(config.num_sources):
            r_rows, logits = [], []
            if config.merge and chunk.start == 0:
                r_rows.append(reader.next())
                logits.append(r_given)
            squares, products = [], []
            for source in chunk:
                # A row's arithmetic follows the loads of the next one, so that it covers their latency.
                r_rows.append(self.read_source(source, token, reader, operands))
                if source > chunk.start:
                    add_products(squares, products, r_rows[-2], r_u)
            reader.release()
            add_products(squares, products, r_rows[-1], r_u)
            sums = RowSums(len(chunk))
            lane_logits = self.finish_logits(sums, exchange, squares, products, chunk.start, token, operands, scalars)
            held.append((chunk.start, sums, lane_logits))
            rescale, shares = softmax.join(logits + sums.spread(lane_logits))
            r_mix = self.accumulate(r_mix, rescale, r_rows, shares, part)
        self.store_softmax(softmax, held, token, exchange, operands, scalars)
        self.store_mix(r_mix, softmax, token, exchange, part, s_weight, operands, scalars)

    def read_source(self, source: int, token, reader, operands: Operands) -> cute.Tensor:
        """The next source in registers; the last one after its delta is added, and stored where it is wanted."""
        config, part = self.config, reader.part
        r_row = reader.next()
        if source < config.num_sources - 1:
            return r_row
        if config.delta:
            r_delta = reader.next()
            r_row.store((r_row.load().to(Float32) + r_delta.load().to(Float32)).to(self.dtype))
            self.store_row(r_row, operands.sum, operands.sum_stride, token, part)
        if config.write_block:
            self.store_row(r_row, operands.block, operands.block_stride, token, part)
        return r_row

    def store_row(self, r_row: cute.Tensor, address: Int64, stride: Int64, token: Int32, part: RowTile) -> None:
        g_row = global_row(self.dtype, address, stride, token, self.config.hidden_size)
        for v in range(part.vectors):
            part.store_vector(r_row[None, v], g_row, v)

    def finish_logits(
        self,
        sums: RowSums,
        exchange: GroupExchange,
        squares: list,
        products: list,
        first: int,
        token,
        operands,
        scalars,
    ) -> list[Float32]:
        """Logits of a chunk's rows in the lanes that own them (RowSums); stores the statistics that are wanted."""
        config = self.config
        partial = sums.reduce(squares, products, exchange.lane)
        lane_logits, lane_rstd = [], []
        for total in exchange.sum(partial):
            square, product = sums.pair(total, exchange.lane)
            rstd = reciprocal_root(square * Float32(1.0 / config.hidden_size) + scalars.eps)
            lane_rstd.append(rstd)
            lane_logits.append(scalars.scale * (rstd * product))
        if config.logits:
            store_by_owner(operands.logits, lane_logits, sums, first, token, exchange, scalars.tokens)
        if config.rstd:
            store_by_owner(operands.rstd, lane_rstd, sums, first, token, exchange, scalars.tokens)
        return lane_logits

    def accumulate(self, r_mix, rescale, r_rows: list, shares: list, part: RowTile) -> list[list[Float32]]:
        """r_mix * rescale + sum_i shares_i * row_i, as [vectors][VECTOR] fp32."""
        result = []
        for v in range(part.vectors):
            rows = [unpack_again(r_row, v) for r_row in r_rows]
            vector = []
            for e in range(VECTOR):
                value = r_mix[v][e] * rescale if r_mix is not None else None
                for share, row in zip(shares, rows, strict=True):
                    value = share * row[e] if value is None else value + share * row[e]
                vector.append(value)
            result.append(vector)
        return result

    def store_softmax(self, softmax, held: list, token, exchange: GroupExchange, operands, scalars) -> None:
        if self.config.lse:
            store_scalar(operands.lse, softmax.lse(), token, exchange, scalars.tokens)
        if self.config.weights:
            for first, sums, lane_logits in held:
                lane_weights = [softmax.weight(logit) for logit in lane_logits]
                store_by_owner(operands.weights, lane_weights, sums, first, token, exchange, scalars.tokens)

    def store_mix(self, r_mix, softmax, token, exchange: GroupExchange, part: RowTile, s_weight, operands, scalars):
        config = self.config
        inverse = softmax.inverse()
        mix = [[value * inverse for value in vector] for vector in r_mix]
        g_out = global_row(self.dtype, operands.out, config.hidden_size, token, config.hidden_size)
        if config.mixed:
            g_mixed = global_row(Float32, operands.mixed, config.hidden_size, token, config.hidden_size)
            for v, vector in enumerate(mix):
                part.store_vector(pack(vector, Float32), g_mixed, v)
        if config.output_weight is not None:
            square = tree(add, [tree(add, [value * value for value in vector]) for vector in mix])
            (square,) = exchange.sum([warp_sum(square)])
            rstd = reciprocal_root(square * Float32(1.0 / config.hidden_size) + scalars.output_eps)
            s_part = part.view(s_weight)
            for v, vector in enumerate(mix):
                r_weight = cute.make_rmem_tensor((VECTOR,), Float32)
                cute.autovec_copy(s_part[None, v], r_weight)
                mix[v] = [value * rstd * r_weight[e] for e, value in enumerate(vector)]
        for v, vector in enumerate(mix):
            part.store_vector(pack(vector, self.dtype), g_out, v)


class RowReader:
    """The rows of one token from a ring, one after the other, each in registers as stored."""

    def __init__(self, config: RowConfig, ring: RowRing, state: PipelineState, part: RowTile):
        self.config, self.ring, self.state, self.part, self.count = config, ring, state, part, 0
        self.finished: PipelineState | None = None

    def next(self) -> cute.Tensor:
        """This thread's (VECTOR, vectors) of the next row.

        A slot is given back only after the next row's loads have been issued (`release` does it at the end of a chunk): an arrive
        waits for the loads before it, and so would the arithmetic.
        """
        in_slot = self.count % self.config.tile.rows
        self.count += 1
        # For a slot's later rows the wait is over already, but its branch keeps the compiler from loading them all up front,
        # which spilled.
        self.ring.wait(self.state)
        r_row = self.part.fragment(self.ring.dtype)
        cute.autovec_copy(self.part.view(self.ring.row(self.state, in_slot)), r_row)
        self.release()
        if in_slot == self.config.tile.rows - 1 or self.count == self.config.rows_per_token:
            self.finished = self.state.clone()
            self.state.advance()
        return r_row

    def release(self) -> None:
        """Gives back the slot whose last row has been read, if there is one."""
        if self.finished is not None:
            self.ring.release(self.finished)
            self.finished = None


class OnlineSoftmax:
    """Running maximum and denominator of a softmax whose logits come in chunks."""

    def __init__(self):
        self.highest = self.denominator = None

    def join(self, logits: list[Float32]) -> tuple[Float32 | None, list[Float32]]:
        """(factor for what was accumulated before, unnormalised shares of the new rows)."""
        before = self.highest
        self.highest = tree(cute.arch.fmax, logits if before is None else [before, *logits])
        rescale = None if before is None else exp_difference(before, self.highest)
        shares = [exp_difference(logit, self.highest) for logit in logits]
        total = tree(add, shares)
        self.denominator = total if before is None else self.denominator * rescale + total
        return rescale, shares

    def inverse(self) -> Float32:
        return cute.arch.rcp_approx(self.denominator)

    def lse(self) -> Float32:
        return self.highest + log(self.denominator)

    def weight(self, logit: Float32) -> Float32:
        return exp_difference(logit, self.highest) * self.inverse()
