"""The row kernel for many bytes a token: producer warps keep rings of row copies in flight, consumer groups mix tokens in turn.

A consumer moves its part of a row from shared memory to registers, packed as stored, and frees the slot at once: rows cross
shared memory once and the ring is never held up by a token's reductions. When the rows of a token do not fit the registers they
come in chunks joined by an online softmax.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator
from cutlass.pipeline import PipelineState

from cute_kernels.config import ITEM_BYTES, SCALED_FP16
from cute_kernels.config_rows import PRODUCER_REGISTERS, Operands, RowConfig
from cute_kernels.device.mix import TYPES, RowMix, Scalars
from cute_kernels.device.pipelines import (
    RowRing,
    RowRings,
    RowTable,
    await_barriers,
    consumer_state,
    producer_state,
    publish_barriers,
)
from cute_kernels.device.rows import LANES, GroupExchange, RowTile, vector_fp32


class RingKernel(RowMix):
    scale_first = True

    @property
    def columns(self) -> int:
        """Of a row that a CTA works on."""
        return self.config.hidden_size

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
        """One CTA per SM, or per token when there are fewer."""
        self.kernel(rows, strides, operands, Scalars(tokens, eps, output_eps, scale)).launch(
            grid=[cutlass.min(tokens, multiprocessors), 1, 1],
            block=[self.tile.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, rows: list, strides: list, operands: Operands, scalars: Scalars):
        config, tile = self.config, self.tile
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cute.arch.griddepcontrol_launch_dependents()
        smem = SmemAllocator()
        scaled = config.num_scales > 0
        rings = RowRings.allocate(
            smem,
            self.row_types[0],
            groups=tile.groups,
            slots=tile.slots,
            rows=tile.rows,
            pitch=config.pitch,
            elements=config.hidden_size,
            consumer_warps=tile.warps,
            scaled=scaled,
        )
        table = RowTable.allocate(smem, config.table_entries, tile.producer_warps)
        s_partials = GroupExchange.allocate(smem, config.exchange_words, tile.warps, tile.groups)
        s_weight = None
        if const_expr(config.output_weight is not None):
            # (pitch,) fp32: every token needs it, and the registers are full of rows
            s_weight = smem.allocate_tensor(Float32, cute.make_layout((config.pitch,)), 16)
        if warp >= tile.consumer_warps:
            producer = warp - tile.consumer_warps
            with cute.arch.elect_one():
                rings.init_barriers(producer, tile.producer_warps)
            publish_barriers(tile.threads)
            if const_expr(tile.consumer_registers > 0):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            cute.arch.griddepcontrol_wait()
            with cute.arch.elect_one():
                self.fill_table(table.of(producer), rows, strides)
                self.produce(producer, rings, table.of(producer), scalars)
        else:
            if const_expr(config.pitch > config.hidden_size):
                rings.clear_padding(tid, tile.consumer_warps * LANES)
            cute.arch.griddepcontrol_wait()
            if const_expr(config.output_weight is not None):
                self.stage_weight(tid, s_weight, operands)
            await_barriers(tile.threads)
            if const_expr(tile.consumer_registers > 0):
                cute.arch.setmaxregister_increase(tile.consumer_registers)
            self.consume(tid, warp, rings, s_partials, s_weight, operands, scalars)

    def fill_table(self, table: RowTable, rows: list, strides: list) -> None:
        """With scales, entry rows_per_token + i is for the scale of row i; for a row without one, it is another's."""
        count = self.config.rows_per_token
        table.fill(rows[:count], strides[:count], ITEM_BYTES)
        if self.config.num_scales:
            found = iter(range(count, len(rows)))
            places = [next(found) if name == SCALED_FP16 else count for name in self.formats]
            table.fill([rows[i] for i in places], [strides[i] for i in places], 4, count)

    @cute.jit
    def stage_weight(self, tid: Int32, s_weight: cute.Tensor, operands: Operands):
        """The output norm's weight to shared memory, by the first group."""
        if tid < self.tile.warps * LANES:
            part = RowTile(self.columns, self.tile.warps, tid)
            r_stored = self.load_parameter(part, self.config.output_weight, operands.output_weight)
            r_weight = part.fragment(Float32)
            r_weight.store(r_stored.load().to(Float32))
            cute.autovec_copy(r_weight, part.view(s_weight))

    def turns(self) -> tuple[Int32, Int32]:
        """(first token, tokens from one turn to the next) of this CTA."""
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        return block, grid

    def token_count(self, scalars: Scalars) -> Int32:
        first, step = self.turns()
        return (scalars.tokens - first + step - 1) // step

    def token(self, turn: Int32) -> Int32:
        first, step = self.turns()
        return first + turn * step

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
                ring.copy(state, r, table.row(ring.dtype, first + r, token, self.columns))
                if const_expr(ring.s_scales is not None):
                    ring.copy_scale(state, r, table.start(count + first + r, token))
        if const_expr(ring.s_scales is not None):
            ring.commit_scales(state)

    @cute.jit
    def consume(self, tid, warp, rings, s_partials, s_weight, operands: Operands, scalars: Scalars):
        """Mixes the tokens of one group: group, group + groups, ... of this CTA's."""
        config, tile = self.config, self.tile
        group, lane = warp // tile.warps, tid % LANES
        part = RowTile(config.hidden_size, tile.warps, tid - group * (tile.warps * LANES))
        ring = rings.of(group)
        r_u = self.load_key(part, operands)
        count = self.token_count(scalars)
        weight = part.view(s_weight) if const_expr(s_weight is not None) else None
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
            reader = RowReader(config, ring, state, part, formats=self.formats)
            exchange = GroupExchange(s_partials, group, warp % tile.warps, lane, tile.warps, turn)
            self.mix_token(token, reader, exchange, r_u, r_given, weight, operands, scalars)
            state, turn = reader.state, exchange.turn

    def load_given(self, operands: Operands, scalars: Scalars, turn: Int32) -> Float32:
        """The given logit of the group's token at `turn`, or of the last token when there is none."""
        token = cutlass.min(self.token(turn), scalars.tokens - 1)
        return vector_fp32(operands.given_logit, scalars.tokens)[token]


class RowReader:
    """The rows of one token from a ring, one after the other, each in registers as stored; `keep` leaves them in the ring.

    formats: of the rows, where they have formats of their own.
    """

    def __init__(
        self,
        config: RowConfig,
        ring: RowRing,
        state: PipelineState,
        part: RowTile,
        keep: bool = False,
        formats: tuple[str, ...] = (),
    ):
        self.config, self.ring, self.state, self.part, self.keep, self.count = config, ring, state, part, keep, 0
        self.formats = formats
        self.scale: Float32 | None = None  # of the last row, if it has one
        self.finished: PipelineState | None = None

    def next(self) -> cute.Tensor:
        """This thread's (VECTOR, vectors) of the next row.

        A slot is given back only after the next row's loads have been issued (`release` does it at the end of a chunk): an arrive
        waits for the loads before it, and so would the arithmetic.
        """
        # For a slot's later rows the wait is over already, but its branch keeps the compiler from loading them all up front,
        # which spilled.
        self.ring.wait(self.state)
        place = self.count % self.config.tile.rows
        r_row = self.part.fragment(self.ring.dtype)
        cute.autovec_copy(self.part.view(self.ring.row(self.state, place)), r_row)
        if self.formats:
            name = self.formats[self.count]
            r_row = cute.recast_tensor(r_row, TYPES[name])
            self.scale = self.ring.scale(self.state, place) if name == SCALED_FP16 else None
        self.release()
        self.skip()
        return r_row

    def skip(self) -> None:
        """Goes on to the next row."""
        self.count += 1
        if self.count % self.config.tile.rows == 0 or self.count == self.config.rows_per_token:
            self.finished = None if self.keep else self.state.clone()
            self.state.advance()

    def release(self) -> None:
        """Gives back the slot whose last row has been read, if there is one."""
        if self.finished is not None:
            self.ring.release(self.finished)
            self.finished = None
