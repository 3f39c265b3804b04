"""Rows from device memory into a ring of shared-memory slots: bulk copies, full/empty mbarriers, barrier ids.

One elected thread of a producer warp fills slots in order, one bulk copy (cp.async.bulk, the TMA engine without a tensor map) per
row; consumer warps wait for a slot, read it, and give it back. Positions in a ring are `cutlass.pipeline.PipelineState`s:

    state = producer_state(slots)                    state = consumer_state(slots)
    for each token:                                  for each token:
        ring.acquire(state, rows)                        ring.wait(state)
        ring.copy(state, r, row) for each row            ... ring.row(state, r), ring.scale(state, r) ...
        state.advance()                                  ring.release(state); state.advance()

The scales of scaled rows travel with them: 4 bytes each (cp.async), which arrive at the same mbarrier.

A ring has exactly one consumer group. Several groups have one ring each rather than turns at a common one: a parity tells a phase
only from its neighbours, so a group that skipped other groups' slots could take an older lap of a slot for its own.
"""

import enum
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Numeric
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator
from cutlass.pipeline import PipelineState, PipelineUserType, make_pipeline_state

from cute_kernels.device.mma import copy_scalar

# createpolicy.fractional.L2::evict_first: rows are read once, so they should leave L2 before anything that is reused.
EVICT_FIRST = 0x12F0000000000000


class NamedBarrier(enum.IntEnum):
    """Hardware barrier ids (16 per thread block); one per consumer group from GROUP on."""

    CTA = 0
    START = 1
    GROUP = 2


def wait_all(barriers: list[tuple[cute.Pointer, Int32]]) -> None:
    """Waits for phases of several mbarriers. All are asked before the first is waited for: an answer takes some 25 cycles."""
    there = [cute.arch.mbarrier_try_wait(*barrier) for barrier in barriers]
    for found, barrier in zip(there, barriers, strict=True):
        wait_unless(found, *barrier)


@cute.jit
def wait_unless(there: Boolean, barrier: cute.Pointer, phase: Int32):
    if not there:
        cute.arch.mbarrier_wait(barrier, phase)


def global_row(dtype: type[Numeric], address: Int64, stride: Int64 | int, row: Int32, elements: int) -> cute.Tensor:
    """Row `row` of a row-strided matrix at `address`, as a tensor (elements,).

    The address is computed in 64 bits and asserted to be 16-byte aligned: a pointer plus an offset, or a dynamic stride, loses the
    alignment, and the stores become 2 bytes wide.
    """
    start = address + Int64(row) * (stride * (dtype.width // 8))
    pointer = cute.make_ptr(dtype, start, cute.AddressSpace.gmem, assumed_align=16)
    return cute.make_tensor(pointer, cute.make_layout((elements,)))


@dataclass(frozen=True)
class RowTable:
    """Addresses of the rows of token 0, and of scales, and bytes from one token to the next, in shared memory.

    A producer that loops over it needs few registers; with all rows unrolled, it spills the few that setmaxnreg leaves it.
    """

    s_entries: cute.Tensor  # (address and stride, rows), of all producers (2, rows, producers)

    @staticmethod
    def allocate(smem: SmemAllocator, rows: int, producers: int) -> "RowTable":
        return RowTable(smem.allocate_tensor(Int64, cute.make_layout((2, rows, producers)), byte_alignment=16))

    def of(self, producer: Int32) -> "RowTable":
        return RowTable(self.s_entries[None, None, producer])

    def fill(self, addresses: list, strides: list, item_bytes: int, first: int = 0) -> None:
        """Entries first, first + 1, ... by the thread that reads them; strides in elements."""
        for i, (address, stride) in enumerate(zip(addresses, strides, strict=True)):
            self.s_entries[0, first + i] = address
            self.s_entries[1, first + i] = stride * item_bytes

    def start(self, i: Int32, token: Int32) -> Int64:
        """The address of entry i for a token."""
        return self.s_entries[0, i] + token * self.s_entries[1, i]

    def row(self, dtype: type[Numeric], i: Int32, token: Int32, elements: int) -> cute.Tensor:
        """Row i of a token: global (elements,)."""
        pointer = cute.make_ptr(dtype, self.start(i, token), cute.AddressSpace.gmem, assumed_align=16)
        return cute.make_tensor(pointer, cute.make_layout((elements,)))


def producer_state(slots: int) -> PipelineState:
    return make_pipeline_state(PipelineUserType.Producer, slots)


def consumer_state(slots: int) -> PipelineState:
    return make_pipeline_state(PipelineUserType.Consumer, slots)


@dataclass(frozen=True)
class RowRing:
    """Slots of a few rows in shared memory, filled by bulk copies and read by the warps of one consumer group.

    A row holds `elements` elements and starts every `pitch` elements (pitch * itemsize a multiple of 16); what lies between is
    never written by a copy. A fill may bring fewer rows than a slot holds. (Frozen: the DSL carries mutable
    objects through dynamic control flow.)
    """

    s_rows: cute.Tensor  # (pitch, rows, slots)
    full: cute.Pointer  # [slots] mbarriers: the slot's bytes have landed
    empty: cute.Pointer  # [slots] mbarriers: every consumer warp has read the slot
    elements: int
    s_scales: cute.Tensor | None = None  # (rows, slots)

    @property
    def dtype(self) -> type[Numeric]:
        return self.s_rows.element_type

    def acquire(self, state: PipelineState, rows: Int32 | int) -> None:
        """By one thread: waits until the slot is free and announces that many rows."""
        cute.arch.mbarrier_wait(self.empty + state.index, state.phase)
        cute.arch.mbarrier_arrive_and_expect_tx(self.full + state.index, rows * (self.elements * self.dtype.width // 8))

    def copy(self, state: PipelineState, r: int, row: cute.Tensor) -> None:
        """By one thread: starts copying `row`, global (elements,), into row r of the slot acquired."""
        whole = cute.make_layout((self.elements, 1))
        g_row = cute.make_tensor(row.iterator, whole)
        s_row = cute.make_tensor(self.row(state, r).iterator, whole)
        atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), self.dtype)
        cute.copy(atom, g_row, s_row, mbar_ptr=self.full + state.index, cache_policy=Int64(EVICT_FIRST))

    def copy_scale(self, state: PipelineState, r: int, address: Int64) -> None:
        """By the same thread: starts copying the scale of row r; after all rows, `commit_scales`."""
        place = (self.s_scales.iterator + (state.index * self.s_scales.shape[0] + r)).toint()
        copy_scalar(Int32(place), address)

    def commit_scales(self, state: PipelineState) -> None:
        """Lets the slot's scales arrive at `full` when they have landed."""
        cute.arch.cp_async_mbarrier_arrive_noinc(self.full + state.index)

    def wait(self, state: PipelineState) -> None:
        """By every consumer thread, before its first read of the slot."""
        cute.arch.mbarrier_wait(self.full + state.index, state.phase)

    def row(self, state: PipelineState, r: int) -> cute.Tensor:
        """Row r of the slot: shared (pitch,)."""
        return self.s_rows[None, r, state.index]

    def scale(self, state: PipelineState, r: int) -> Float32:
        return self.s_scales[r, state.index]

    def release(self, state: PipelineState) -> None:
        """By every consumer warp, after its last read of the slot. Orders those reads before the copy that overwrites them."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.empty + state.index)


@dataclass(frozen=True)
class RowRings:
    """One ring for each consumer group; `slot_bytes` in config_rows.py has the size."""

    s_rows: cute.Tensor  # (pitch, rows, slots, groups)
    barriers: cute.Pointer  # [groups, 2, slots] mbarriers: full, then empty
    elements: int
    consumer_warps: int  # of a group
    s_scales: cute.Tensor | None  # (rows, slots, groups)

    @staticmethod
    def allocate(
        smem: SmemAllocator,
        dtype: type[Numeric],
        *,
        groups: int,
        slots: int,
        rows: int,
        pitch: int,
        elements: int,
        consumer_warps: int,
        scaled: bool = False,
    ) -> "RowRings":
        s_rows = smem.allocate_tensor(dtype, cute.make_layout((pitch, rows, slots, groups)), byte_alignment=128)
        barriers = smem.allocate_array(Int64, groups * 2 * slots)
        s_scales = smem.allocate_tensor(Float32, cute.make_layout((rows, slots, groups)), 16) if scaled else None
        return RowRings(s_rows, barriers, elements, consumer_warps, s_scales)

    def of(self, group: Int32 | int) -> RowRing:
        slots = self.s_rows.shape[2]
        full = self.barriers + group * (2 * slots)
        s_scales = None if self.s_scales is None else self.s_scales[None, None, group]
        return RowRing(self.s_rows[None, None, None, group], full, full + slots, self.elements, s_scales)

    @cute.jit
    def init_barriers(self, producer: Int32, producers: cutlass.Constexpr) -> None:
        """By the thread that will fill groups producer, producer + producers, ...: their barriers; then `publish_barriers`.

        One thread: racecheck does not see the warp's synchronisation between lanes that share the work and the lane that
        uses the barriers.
        """
        _, _, slots, groups = self.s_rows.shape
        # Unrolled: with a loop here, the consumers' code spilled.
        for group in cutlass.range_constexpr(groups):
            if producer == group % producers:
                full = self.barriers + group * (2 * slots)
                for slot in cutlass.range_constexpr(slots):
                    cute.arch.mbarrier_init(full + slot, 1 if self.s_scales is None else 2)
                    cute.arch.mbarrier_init(full + slots + slot, self.consumer_warps)

    def clear_padding(self, thread: Int32, threads: int) -> None:
        """By all consumers, before `await_barriers`: zeros between a row's end and the next row, where no copy ever writes."""
        pitch, rows, slots, groups = self.s_rows.shape
        padding = pitch - self.elements
        words = padding * rows * slots * groups // 8
        s_padding = cute.make_tensor(
            self.s_rows.iterator + self.elements,
            cute.make_layout((8, padding // 8, rows * slots * groups), stride=(1, 8, pitch)),
        )
        zeros = cute.make_rmem_tensor((8,), self.s_rows.element_type)
        zeros.fill(0.0)
        for first in range(0, words, threads):
            _clear(s_padding, zeros, first + thread, words)


@cute.jit
def _clear(s_padding: cute.Tensor, zeros: cute.Tensor, index: Int32, words: cutlass.Constexpr[int]) -> None:
    per_row = cute.size(s_padding, mode=[1])
    if index < words:
        cute.autovec_copy(zeros, s_padding[None, index % per_row, index // per_row])


def publish_barriers(threads: int) -> None:
    """By a producer warp after its barriers' init: it may fill their slots at once, without waiting for the consumers.

    Makes the init visible to bulk copies, to the warp's other lanes, and to the consumers, which `await_barriers`.
    """
    cute.arch.mbarrier_init_fence()
    cute.arch.fence_view_async_shared()
    cute.arch.sync_warp()
    cute.arch.barrier_arrive(barrier_id=NamedBarrier.START, number_of_threads=threads)


def await_barriers(threads: int) -> None:
    """By every consumer thread, before its first use of a ring and after what consumers prepare for each other."""
    cute.arch.barrier(barrier_id=NamedBarrier.START, number_of_threads=threads)
