"""A row spread over the warps of a consumer group: vector access, reductions, softmax scalars.

Thread t of a group of W warps owns the 16-byte vectors t, t + 32 W, t + 64 W, ... of every row, so that each access of a warp is
one run of 512 bytes: free of bank conflicts in shared memory, whole sectors in device memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Numeric, const_expr
from cutlass.memory import SmemAllocator

from cute_kernels.device.mma import ptx, store_cluster
from cute_kernels.device.pipelines import NamedBarrier
from cute_kernels.device.rounding import INFINITE_BITS, finite_magnitude

LANES = 32
VECTOR = 8  # elements of a 16-byte vector of a 2-byte type
LINE_BYTES = 128
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowTile:
    """Which elements of a row a thread owns."""

    elements: int
    warps: int
    thread: Int32

    @property
    def threads(self) -> int:
        return self.warps * LANES

    @property
    def vectors(self) -> int:
        """Per thread."""
        return -(-self.elements // (self.threads * VECTOR))

    @property
    def pitch(self) -> int:
        """The row rounded up to whole vectors for every thread."""
        return self.vectors * self.threads * VECTOR

    def view(self, row: cute.Tensor) -> cute.Tensor:
        """This thread's (VECTOR, vectors) of a row (pitch,)."""
        shape, stride = (VECTOR, self.threads, self.vectors), (1, VECTOR, VECTOR * self.threads)
        return cute.make_tensor(row.iterator, cute.make_layout(shape, stride=stride))[None, self.thread, None]

    def fragment(self, dtype: type[Numeric]) -> cute.Tensor:
        return cute.make_rmem_tensor((VECTOR, self.vectors), dtype)

    def is_partial(self, v: int) -> bool:
        """Whether vector v of some threads lies beyond the row's end."""
        return (v + 1) * self.threads * VECTOR > self.elements

    def inside(self, v: int) -> Boolean:
        return (v * self.threads + self.thread) * VECTOR < self.elements

    def load(self, dtype: type[Numeric], row: cute.Tensor) -> cute.Tensor:
        """This thread's part of a row in device memory, as stored; zeros beyond the end."""
        r_part = self.fragment(dtype)
        vector_bytes = VECTOR * dtype.width // 8
        start = row.iterator.toint() + Int64(self.thread) * vector_bytes
        for v in range(self.vectors):
            words = cute.recast_tensor(r_part[None, v], Int32)
            inside = self.inside(v) if self.is_partial(v) else None
            for first in range(0, vector_bytes, 16):
                found = load_16_bytes(start, v * self.threads * vector_bytes + first, inside)
                for i, word in enumerate(found):
                    words[first // 4 + i] = word
        return r_part

    def prefetch(self, row: cute.Tensor) -> None:
        """Starts bringing this thread's part of a row in device memory into L2, a thread for each line of 128 bytes."""
        vector_bytes = VECTOR * row.element_type.width // 8
        start = row.iterator.toint() + Int64(self.thread) * vector_bytes
        first = self.thread % (LINE_BYTES // vector_bytes) == 0
        for v in range(self.vectors):
            chosen = first & self.inside(v) if self.is_partial(v) else first
            prefetch_line(start, v * self.threads * vector_bytes, chosen)

    @cute.jit
    def store_vector(self, r_vector: cute.Tensor, row: cute.Tensor, v: cutlass.Constexpr) -> None:
        """Vector v of this thread, (VECTOR,) registers, into a row in device memory."""
        g_vector = self.view(row)[None, v]
        if const_expr(self.is_partial(v)):
            if self.inside(v):
                cute.autovec_copy(r_vector, g_vector)
        else:
            cute.autovec_copy(r_vector, g_vector)


def load_16_bytes(address: Int64, offset: int, inside: Boolean | None) -> list[Int32]:
    """Four words of device memory; zeros, and no access, where `inside` is false.

    A predicate and not a branch, so that all loads of a token are under way before the first is waited for. No cache hint: on an
    H200, phase 2 at D 2048 lost 5 points of copy bandwidth by L1::no_allocate, and as many by an L2 policy of evict_first.
    """
    if inside is None:
        return ptx(f"ld.global.v4.b32 {{$0,$1,$2,$3}},[$4+{offset}];", [Int32] * 4, [address], effects=True)
    text = (
        "{.reg .b32 t<4>; mov.b32 t0,0; mov.b32 t1,0; mov.b32 t2,0; mov.b32 t3,0; "
        f"@$5 ld.global.v4.b32 {{t0,t1,t2,t3}},[$4+{offset}]; "
        "mov.b32 $0,t0; mov.b32 $1,t1; mov.b32 $2,t2; mov.b32 $3,t3;}"
    )
    return ptx(text, [Int32] * 4, [address, inside], effects=True)


def prefetch_line(address: Int64, offset: int, wanted: Boolean) -> None:
    """Starts bringing a line of device memory into L2."""
    ptx(f"@$1 prefetch.global.L2 [$0+{offset}];", [], [address, wanted], effects=True)


def tree(combine: Callable[[Item, Item], Item], items: list[Item]) -> Item:
    """Combines a list pairwise, which keeps chains short."""
    while len(items) > 1:
        pairs = [combine(items[i], items[i + 1]) for i in range(0, len(items) - 1, 2)]
        items = pairs + items[len(pairs) * 2 :]
    return items[0]


def add(a: Float32, b: Float32) -> Float32:
    return a + b


def select(condition: Boolean, a: Item, b: Item) -> Item:
    return type(a)(cutlass.select_(condition, a, b))


def warp_max(value: Float32) -> Float32:
    """The largest of the warp's numbers, none of them negative or NaN, in every lane: by one reduction of integers, whose order
    is theirs."""
    return cute.arch.warp_redux_sync(value.bitcast(Int32), "max").bitcast(Float32)


@cute.jit
def largest_finite(values: list) -> Float32:
    """The largest magnitude of the warp's numbers, infinity and NaN left out, in every lane."""
    peak = warp_max(tree(cute.arch.fmax, [cute.math.absf(value) for value in values]))  # NaN has no say in it
    if peak.bitcast(Int32) >= INFINITE_BITS:
        peak = warp_max(tree(cute.arch.fmax, [finite_magnitude(value) for value in values]))
    return peak


def warp_sum(value: Float32) -> Float32:
    """The sum over the warp, in every lane."""
    for offset in (16, 8, 4, 2, 1):
        value = value + cute.arch.shuffle_sync_bfly(value, offset=offset)
    return value


def halve(values: list[Float32], offset: int, lane: Int32) -> list[Float32]:
    """One level of a transposing reduction: lanes with bit `offset` clear keep the sums of the first half, the others of the rest.

    n values cost ceil(n / 2) shuffles, where reducing each by itself costs n.
    """
    half = (len(values) + 1) // 2
    upper = (lane & offset) != 0
    kept = []
    for low, high in zip(values[:half], values[half:], strict=False):
        send = select(upper, low, high)
        keep = select(upper, high, low)
        kept.append(keep + cute.arch.shuffle_sync_bfly(send, offset=offset))
    for odd in values[len(kept) : half]:
        kept.append(odd + cute.arch.shuffle_sync_bfly(odd, offset=offset))
    return kept


class RowSums:
    """Sums over a warp of two numbers for each of `count` rows: 2 * count values reduced together, each in one lane.

    After `reduce`, lane l < 16 holds the first number and lane l + 16 the second number of the rows that `owner` gives to lane l,
    up to `depth` of them (one up to 16 rows). With more lanes than values, several lanes hold the same one.
    """

    def __init__(self, count: int):
        self.count, self.depth = count, -(-count // 16)

    def owner(self, row: int) -> tuple[int, int]:
        """(lane < 16, index) that holds `row`: `halve`'s mapping followed by hand."""
        lane, size = 0, self.count
        for offset in (8, 4, 2, 1):
            half = (size + 1) // 2
            if row >= half:
                lane, row = lane + offset, row - half
            size = half
        return lane, row

    def rows_of(self, lane: Int32) -> list[Int32]:
        """The rows this lane holds in each of its `depth` places, -1 for none; lanes 16 to 31 have none."""
        rows = [Int32(-1)] * self.depth
        for row in range(self.count):
            holder, place = self.owner(row)
            rows[place] = select(lane == holder, Int32(row), rows[place])
        return rows

    def reduce(self, first: list[Float32], second: list[Float32], lane: Int32) -> list[Float32]:
        """`depth` sums over the warp in each lane."""
        values = first + second
        for offset in (16, 8, 4, 2, 1):
            values = halve(values, offset, lane)
        return values

    def pair(self, value: Float32, lane: Int32) -> tuple[Float32, Float32]:
        """(first, second) sums of the row whose either sum this lane holds."""
        other = cute.arch.shuffle_sync_bfly(value, offset=16)
        upper = lane >= 16
        return select(upper, other, value), select(upper, value, other)

    def gather(self, values: list[Float32 | None], lane: Int32) -> list[Float32]:
        """One value per row that is in every lane, in the `depth` places of its owner; 1 for None."""
        held = [Float32(1.0)] * self.depth
        for row, value in enumerate(values):
            if value is not None:
                holder, place = self.owner(row)
                held[place] = select(lane == holder, value, held[place])
        return held

    def spread(self, values: list[Float32]) -> list[Float32]:
        """What the owners hold, one value per row, in every lane."""
        return [self.spread_one(values, row) for row in range(self.count)]

    def spread_one(self, values: list[Float32], row: int) -> Float32:
        lane, place = self.owner(row)
        return cute.arch.shuffle_sync(values[place], lane)


class Exchange:
    """Sums over the warps that share a token."""

    lane: Int32
    warp: Int32  # among the token's warps

    def gather(self, values: list[Float32]) -> Iterator[list[Float32]]:
        """For each of a lane's values, those of the same lane of all warps."""
        raise NotImplementedError

    def sum(self, values: list[Float32]) -> list[Float32]:
        """Each lane's values summed over the same lane of all warps."""
        return [tree(add, found) for found in self.gather(values)]


class GroupExchange(Exchange):
    """Over the W warps of a group through shared memory: every warp writes, one named barrier, every warp reads.

    Two buffers in turn: a warp can write buffer b again only after the barrier that follows its neighbours' reads of b. `turn`
    counts the exchanges; a loop over tokens carries it.
    """

    def __init__(
        self,
        s_partials: cute.Tensor | None,
        group: Int32 | int,
        warp: Int32,
        lane: Int32,
        warps: int,
        turn: Int32 | int,
    ):
        # (words, warps, 2 buffers, groups); None for one warp
        self.s_partials, self.group, self.warp, self.lane, self.warps = s_partials, group, warp, lane, warps
        self.turn = turn

    @staticmethod
    def allocate(smem: SmemAllocator, words: int, warps: int, groups: int) -> cute.Tensor | None:
        """For so many words a warp at once."""
        if warps == 1:
            return None
        return smem.allocate_tensor(Float32, cute.make_layout((words, warps, 2, groups)), 16)

    def gather(self, values: list[Float32]) -> Iterator[list[Float32]]:
        if self.warps == 1:
            return iter([value] for value in values)
        s_buffer = self.s_partials[None, None, self.turn % 2, self.group]
        self.turn = self.turn + 1
        for k, value in enumerate(values):
            s_buffer[k * LANES + self.lane, self.warp] = value
        cute.arch.barrier(barrier_id=NamedBarrier.GROUP + self.group, number_of_threads=self.warps * LANES)
        return of_warps(s_buffer, len(values), self.lane)


class ClusterExchange(Exchange):
    """Over all warps of a cluster, for its one token: every warp sends its sums to every CTA and adds all of them up itself.

    One trip through distributed shared memory for each exchange: of many rows' sums, then of one number. What is sent completes a
    transaction count of the receiver's mbarrier; a CTA waits for all that comes to it, so that none leaves too early. Storing and
    then meeting at a cluster barrier took 0.5 to 1 us longer on an H200.
    """

    def __init__(
        self,
        smem: SmemAllocator,
        words: int,
        cluster: int,
        warps: int,
        rank: Int32,
        warp: Int32,
        lane: Int32,
    ):
        self.cluster, self.warp, self.lane = cluster, rank * warps + warp, lane
        self.sent = (words, LANES)  # by a warp: of many rows, then of one
        # (words, warps of the cluster, exchanges)
        self.s_partials = smem.allocate_tensor(Float32, cute.make_layout((words, cluster * warps, len(self.sent))), 16)
        self.arrived = smem.allocate_array(Int64, len(self.sent))  # mbarriers
        self.turn = 0

    @cute.jit
    def start(self, thread: Int32):
        """By all threads, early: nothing can be sent before all CTAs of the cluster have done this."""
        warps = self.s_partials.shape[1]
        if thread == 0:
            for turn, sent in enumerate(self.sent):
                cute.arch.mbarrier_init(self.arrived + turn, 1)
                cute.arch.mbarrier_arrive_and_expect_tx(self.arrived + turn, sent * warps * 4)
            cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive_relaxed()

    def gather(self, values: list[Float32]) -> Iterator[list[Float32]]:
        if self.turn == 0:
            cute.arch.cluster_wait()
        s_buffer, arrived = self.s_partials[None, None, self.turn], self.arrived + self.turn
        self.turn += 1
        for k, value in enumerate(values):
            place = s_buffer.iterator.toint() + (self.warp * s_buffer.shape[0] + k * LANES + self.lane) * 4
            for cta in range(self.cluster):
                store_cluster(place, arrived.toint(), Int32(cta), [value])
        cute.arch.mbarrier_wait(arrived, 0)
        return of_warps(s_buffer, len(values), self.lane)


def of_warps(s_buffer: cute.Tensor, count: int, lane: Int32) -> Iterator[list[Float32]]:
    """(LANES * count, warps) -> each lane's `count` values of all warps; each is read when it is its turn."""
    for k in range(count):
        yield [s_buffer[k * LANES + lane, w] for w in range(cute.size(s_buffer, mode=[1]))]


def reciprocal_root(x: Float32) -> Float32:
    """x ** -0.5 to about one ulp: the approximation (2 ulp) and one Newton step; these are per-row scalars."""
    y = cute.math.rsqrt(x, fastmath=True)
    return y + y * Float32(0.5) * (Float32(1.0) - x * y * y)


def exp_difference(a: Float32, b: Float32) -> Float32:
    """exp(a - b). Subtracting in natural units first: for large logits, scaling before would lose what the difference needs."""
    return cute.math.exp2((a - b) * Float32(LOG2_E), fastmath=True)


def sigmoids(x: Float32) -> tuple[Float32, Float32]:
    """sigmoid(x) and sigmoid(-x), each to a few ulps: 1 - p would be 0 for a large x."""
    small = exp_difference(-cute.arch.fmax(x, -x), Float32(0.0))
    large = cute.arch.rcp_approx(Float32(1.0) + small)
    small = small * large
    return select(x >= 0.0, large, small), select(x >= 0.0, small, large)


def log(x: Float32) -> Float32:
    return cute.math.log2(x, fastmath=True) * Float32(LN_2)


def add_products(squares: list[Float32], products: list[Float32], r_row: cute.Tensor, r_u: cute.Tensor) -> None:
    """Appends this thread's part of <x, x> and <x, u>; two accumulators each keep a lone warp's FMA pipe busy."""
    square, product = [Float32(0.0)] * 2, [Float32(0.0)] * 2
    for v in range(cute.size(r_row, mode=[1])):
        x = unpack(r_row, v)
        for e in range(VECTOR):
            square[e % 2] = square[e % 2] + x[e] * x[e]
            product[e % 2] = product[e % 2] + x[e] * r_u[e, v]
    squares.append(square[0] + square[1])
    products.append(product[0] + product[1])


def unpack(r_row: cute.Tensor, v: int) -> list[Float32]:
    """Vector v as fp32, one instruction an element (the compiler's own conversion takes two for every upper bf16 half)."""
    if r_row.element_type is BFloat16:
        words = cute.recast_tensor(r_row[None, v], Int32)
        halves = [(words[i] << 16, words[i] & -0x10000) for i in range(VECTOR // 2)]
        return [half.bitcast(Float32) for pair in halves for half in pair]
    x = r_row[None, v].load().to(Float32)
    return [x[e] for e in range(VECTOR)]


def unpack_again(r_row: cute.Tensor, v: int) -> list[Float32]:
    """The same by other instructions.

    The compiler would otherwise see that a row's second use wants the values of its first, keep them alive in between, at twice
    the registers of the packed row, and spill.
    """
    words = cute.recast_tensor(r_row[None, v], Int32)
    if r_row.element_type is BFloat16:
        halves = [(permute(words[i], 0x1044), permute(words[i], 0x3244)) for i in range(VECTOR // 2)]
        return [half.bitcast(Float32) for pair in halves for half in pair]
    r_swapped = cute.make_rmem_tensor((VECTOR,), r_row.element_type)
    swapped = cute.recast_tensor(r_swapped, Int32)
    for i in range(VECTOR // 2):
        swapped[i] = permute(words[i], 0x1032)
    x = r_swapped.load().to(Float32)
    return [x[e ^ 1] for e in range(VECTOR)]


def permute(word: Int32, selector: int) -> Int32:
    """Bytes of `word` (0 to 3) and of zero (4 to 7) as the selector's digits say."""
    code = f"prmt.b32 {{$w0}}, {{$r0}}, 0, {selector:#x};"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[word])


def pack(values: list[Float32], dtype: type[Numeric]) -> cute.Tensor:
    """Rounds fp32 values to (VECTOR,) registers of the storage type."""
    r_values = cute.make_rmem_tensor((VECTOR,), Float32)
    for e, value in enumerate(values):
        r_values[e] = value
    r_packed = cute.make_rmem_tensor((VECTOR,), dtype)
    r_packed.store(r_values.load().to(dtype))
    return r_packed


def vector_fp32(address: Int64, length: Int32) -> cute.Tensor:
    return cute.make_tensor(
        cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=4), cute.make_layout((length,))
    )


def number_at(address: Int64, i: Int32, stride: Int64 | int = 1) -> Int64:
    """The address of element i of a vector of fp32 numbers `stride` apart."""
    return address + Int64(i) * (stride * 4)


def strided_fp32(address: Int64, stride: Int64, i: Int32) -> Float32:
    """Element i of a vector of that stride."""
    return vector_fp32(number_at(address, i, stride), Int32(1))[0]


@cute.jit
def store_scalar(address: Int64, value: Float32, exchange: GroupExchange) -> None:
    """One number, by one thread of the group."""
    if (exchange.lane == 0) & (exchange.warp == 0):
        vector_fp32(address, Int32(1))[0] = value


@cute.jit
def store_by_owner(
    address: Int64, values: list, sums: RowSums, first: int, token: Int32, exchange: GroupExchange, tokens: Int32
) -> None:
    """One number per row and token into [rows, tokens], from the lanes that own the rows, by one warp of the group."""
    for place, row in enumerate(sums.rows_of(exchange.lane)):
        if (row >= 0) & (exchange.warp == 0):
            vector_fp32(address + Int64(first + row) * tokens * 4, tokens)[token] = values[place]
