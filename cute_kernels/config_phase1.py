"""What the phase 1 kernel takes, and with which tiles: cluster, warps, ring, staging, the bytes they need.

A function of the static shape alone (T never matters), so nothing is tuned in a user's call. Imports neither the DSL
nor the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cute_kernels.config import ALIGNMENT, DTYPES, ITEM_BYTES, LANES, MAX_HIDDEN_SIZE, SHARED_BYTES, VECTOR

MAX_SOURCES = 32
MAX_QUERIES = 32

OCTET = 8  # rows of half an mma operand: sources in a slot, queries in a fragment
BLOCK = 64  # columns that one step of the mix covers: 8 mma tiles of 8
MAX_WARPS = 8
# Of a consumer's 232 to 255 registers, what query fragments may take; the rest holds accumulators, weights and
# addresses.
QUERY_REGISTERS = 128
WEIGHT_REGISTERS = 16  # of an item, beside as many query fragments; those of 32 queries over 24 sources spilled
# What is few rows of an item, where they have 4096 columns (measured on an H200, shares of copy bandwidth with two tokens an item
# for one: N = 3, S = 9 0.730 -> 0.864; with one CTA for two: N = 5, S = 2 0.587 -> 0.818; N = 5, S = 9, 14 rows, 0.834 -> 0.876).
FEW_ROWS = 14
RUN_BYTES = 512  # of a row that is stored at a time, where there is room: one instruction of a warp
# A ring holds three or four tokens (measured on an H200: more did not help), and at least this much, which hides the
# latency of device memory.
RING_BYTES = 64 * 1024
SCRATCH_BYTES = 1024  # alignment of the allocation

MANTISSA_BITS = {"bf16": 8, "fp16": 11, "fp32": 24}

PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = 232


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def query_terms(dtype: str, query: str, key_weight: str | None, scaled: bool = False) -> int:
    """How many numbers of the storage dtype add up to an effective query, query * key_weight.

    Two bf16 numbers have 17 bits (each has 8, the second a sign of its own), enough for a product of two bf16 numbers;
    with 17 of fp32's 24 bits, logits were off by 2.5e-6 (measured on an H200), lse past its budget. Two fp16 numbers
    have 23. scaled: fp16 terms are those of a query times a power of two, which takes bf16's 8 bits into one of them.
    """
    bits = MANTISSA_BITS[query] + (MANTISSA_BITS[key_weight] if key_weight else 0)
    if (key_weight is None and query == dtype) or (scaled and dtype == "fp16" and bits <= MANTISSA_BITS["fp16"]):
        return 1
    return 3 if dtype == "bf16" and bits > 17 else 2


class Phase1Outputs(NamedTuple):
    """Device addresses; 0: not wanted."""

    out: Any  # [S, T, D]
    out_scale: Any  # [S, T] fp32, of scaled fp16
    lse: Any  # [S, T] fp32
    logits: Any  # [S, N, T] fp32
    rstd: Any  # [N, T] fp32
    # Of out's rounding, themselves: the seed, and how many rows of it are other launches'
    seed: Any
    first_row: Any


@dataclass(frozen=True)
class Phase1Tile:
    """How a cluster works on an item: the tokens whose source rows fill the 8 columns of an mma.

    The hidden dimension is split over `cluster` CTAs, then over `warps` consumer warps of `blocks` blocks of 64 columns
    each.
    """

    cluster: int
    warps: int
    blocks: int
    # A slot of the ring holds up to 8 of an item's rows, those of one group of sources, over the columns of warps / slabs
    # warps.
    slabs: int
    slots: int
    segment: int  # blocks that are staged at a time
    # How sums cross warps. False: each warp adds up one share of them and sends it to every CTA. True: each warp sends
    # its partial sums to every CTA, and every warp adds all of them up: more reads, one wait less.
    direct: bool = False


@dataclass(frozen=True)
class Phase1Config:
    """Static configuration of phase1_fwd; its repr is the key of the disk cache. dtypes are "bf16", "fp16", "fp32"."""

    dtype: str
    query: str
    key_weight: str | None
    hidden_size: int
    num_sources: int
    num_queries: int  # of one launch
    logits: bool
    rstd: bool
    out: str  # "bf16", "fp16" or "fp16_scaled"
    scaled_sources: bool
    stochastic: bool  # out is rounded stochastically
    tile: Phase1Tile

    @property
    def shape(self) -> Shape:
        terms = query_terms(self.dtype, self.query, self.key_weight, scaled=True)
        sizes = (self.hidden_size, self.num_sources, self.num_queries, terms)
        return Shape(*sizes, self.out == "fp16_scaled", self.scaled_sources, self.stochastic)

    @property
    def weight_terms(self) -> int:
        """How many numbers of the storage dtype add up to a weight. Two bf16 terms have 16 bits: too few for a result to be
        always rounded to a neighbour of the exact one (on an H200, a few elements in 100 000 were not).
        """
        return 3 if self.stochastic and self.dtype == "bf16" else 2

    @property
    def threads(self) -> int:
        return (self.tile.warps + self.producer_warps) * LANES

    @property
    def producer_warps(self) -> int:
        """One, or a warpgroup where registers have to be moved to the consumers (setmaxnreg works on warpgroups).

        Nine warps would cap every thread at 168 registers.
        """
        return 4 if self.tile.warps == MAX_WARPS else 1

    @property
    def shared_bytes(self) -> int:
        return self.shape.shared_bytes(self.tile) + SCRATCH_BYTES


@dataclass(frozen=True)
class Shape:
    """A problem, and the sizes that follow from it and a tile."""

    hidden_size: int
    num_sources: int
    num_queries: int
    terms: int  # of a query: see query_terms
    scaled_out: bool
    scaled_sources: bool
    stochastic: bool

    @property
    def octets(self) -> int:
        """Of queries."""
        return ceil_div(self.num_queries, OCTET)

    @property
    def operand_octets(self) -> int:
        """Of query fragments held in registers: first terms, then second terms. Third terms are in shared memory."""
        return self.octets * min(self.terms, 2)

    @property
    def groups(self) -> int:
        """Of 8 sources."""
        return ceil_div(self.num_sources, OCTET)

    @property
    def tokens(self) -> int:
        """Of one item. With few sources and at most 8 queries, several share the 8 columns of an mma; with more queries
        one token is work enough, unless it brings few rows.
        """
        few = self.num_sources <= 4 and self.num_sources + self.num_queries < FEW_ROWS
        if self.octets == 2 and (self.num_sources <= 2 or few):
            return 2
        # A power of two of columns each, so that a token's softmax sums stay within a quarter of a warp's lanes.
        columns = min(1 << (self.num_sources - 1).bit_length(), OCTET)
        return OCTET // columns if self.octets == 1 else 1

    @property
    def item_rows(self) -> int:
        """Read and written."""
        return self.tokens * (self.num_sources + self.num_queries)

    @property
    def rows_per_token(self) -> int:
        return OCTET // self.tokens

    @property
    def octet_queries(self) -> int:
        """Of an octet of output rows, with those that are vacant: a power of two if several tokens share it."""
        return OCTET if self.tokens == 1 else min(1 << (self.num_queries - 1).bit_length(), OCTET)

    @property
    def octet_tokens(self) -> int:
        """Whose output rows share an octet: row c is query c % octet_queries of token c // octet_queries of them."""
        return min(OCTET // self.octet_queries, self.tokens)

    @property
    def out_octets(self) -> int:
        """Of output rows of one item."""
        return self.tokens // self.octet_tokens * self.octets

    @property
    def partial_bytes(self) -> int:
        """One warp's share of an item's sums."""
        return self.groups * self.group_bytes

    @property
    def group_bytes(self) -> int:
        """Logits [octets, 8 queries, 8 columns], squares [8]; if out is scaled fp16, the rows' largest magnitudes [8]."""
        return self.octets * 256 + 32 * (1 + self.scaled_out)

    def operand_registers(self, tile: Phase1Tile) -> int:
        """Per thread, for query fragments."""
        return self.operand_octets * tile.blocks * BLOCK // 8

    def cta_columns(self, tile: Phase1Tile) -> int:
        return tile.warps * tile.blocks * BLOCK

    def row_bytes(self, tile: Phase1Tile) -> int:
        """A slot's row. With 16 bytes more than the columns have, eight rows start in different banks."""
        return self.cta_columns(tile) // tile.slabs * ITEM_BYTES + 16

    def slot_rows(self, group: int) -> int:
        """Those that an item has of a group of sources: 8 but where sources are too few, and in the last of several."""
        return self.tokens * min(self.num_sources - group * OCTET, OCTET)

    @property
    def even_slots(self) -> bool:
        """Whether all slots are of one size."""
        return self.slot_rows(0) == self.slot_rows(self.groups - 1)

    def item_bytes(self, tile: Phase1Tile) -> int:
        return self.tokens * self.num_sources * tile.slabs * self.row_bytes(tile)

    def ring_bytes(self, tile: Phase1Tile) -> int:
        return tile.slots * self.item_bytes(tile) // self.slots_per_item(tile)

    def slots_per_item(self, tile: Phase1Tile) -> int:
        return self.groups * tile.slabs

    def fixed_places(self, tile: Phase1Tile) -> bool:
        """Whether each slot must hold the same part of every item: when parts differ in their rows (the last group), or in
        their columns (the last slab of a row that ends early), so that what no copy writes stays zero there.
        """
        ragged = tile.cluster * self.cta_columns(tile) != self.hidden_size
        return (ragged and tile.slabs > 1) or not self.even_slots

    def stage_row_bytes(self, tile: Phase1Tile) -> int:
        return tile.segment * BLOCK * ITEM_BYTES + 16

    def stage_bytes(self, tile: Phase1Tile) -> int:
        """One warp's staging buffer: the two octets of rows that an mma makes."""
        return min(self.out_octets, 2) * OCTET * self.stage_row_bytes(tile)

    def third_row_bytes(self, tile: Phase1Tile) -> int:
        return tile.blocks * BLOCK * ITEM_BYTES + 16

    def third_bytes(self, tile: Phase1Tile) -> int:
        """The queries' third terms over one warp's columns."""
        return self.octets * OCTET * self.third_row_bytes(tile) if self.terms == 3 else 0

    def exchange_bytes(self, tile: Phase1Tile) -> int:
        """Four buffers of every warp's sums, or two of this CTA's warps' and two of every CTA's."""
        sums = 4 * tile.warps * tile.cluster if tile.direct else 2 * (tile.warps + tile.cluster)
        return sums * self.partial_bytes

    def places(self, tile: Phase1Tile) -> int:
        """Of items drawn by a cluster's first CTA for the others': one more than its ring can hold."""
        return tile.slots + 1 if tile.cluster > 1 else 0

    def scales_bytes(self, tile: Phase1Tile) -> int:
        """Each warp's two buffers of a scale for each lane."""
        return 2 * tile.warps * LANES * 4 * self.scaled_sources

    @property
    def table_bytes(self) -> int:
        """Address and stride of each source's scales."""
        return self.num_sources * 16 * self.scaled_sources

    def fixed_bytes(self, tile: Phase1Tile) -> int:
        """All but the ring: staging, third terms, buffers of sums and scales, barriers and items of the longest ring."""
        return (
            tile.warps * (self.stage_bytes(tile) + self.third_bytes(tile))
            + self.exchange_bytes(tile)
            + self.scales_bytes(tile)
            + self.table_bytes
            + 8 * (2 * MAX_SLOTS + 6)
            + 4 * MAX_SLOTS
            + 12 * (MAX_SLOTS + 1) * (tile.cluster > 1)
        )

    def shared_bytes(self, tile: Phase1Tile) -> int:
        return self.fixed_bytes(tile) + self.ring_bytes(tile)


MAX_SLOTS = 32


def phase1_config(
    *,
    dtype: str,
    query: str,
    key_weight: str | None,
    hidden_size: int,
    num_sources: int,
    num_queries: int,
    logits: bool = False,
    rstd: bool = False,
    out: str | None = None,
    scaled_sources: bool = False,
    stochastic: bool = False,
) -> Phase1Config:
    """The configuration of one launch. It may take fewer queries than asked for: the launcher then runs it in turn on
    each part.

    Sources are then read once per part, which only problems do whose queries exceed the registers of a cluster of four.
    """
    terms = query_terms(dtype, query, key_weight, scaled=True)
    out = out or dtype
    parts = [min(ceil_div(ceil_div(num_queries, n), OCTET) * OCTET, num_queries) for n in (1, 2, 4)]
    parts[0] = num_queries
    for queries, clusters in [*((part, (1, 2, 4)) for part in parts), *((part, (8,)) for part in parts)]:
        shape = Shape(hidden_size, num_sources, queries, terms, out == "fp16_scaled", scaled_sources, stochastic)
        tiles = [tile for tile in (_tile(shape, cluster) for cluster in clusters) if tile]
        if tiles:
            # The smallest cluster, unless a larger one has a much better ring and stores.
            tile = min(tiles, key=lambda t: shortfall(shape, t) + tiles.index(t))
            options = (logits, rstd, out, scaled_sources, stochastic)
            return Phase1Config(dtype, query, key_weight, hidden_size, num_sources, queries, *options, tile)
    raise ValueError(f"no tile for hidden size {hidden_size}, {num_sources} sources, {num_queries} queries")


def shortfall(shape: Shape, tile: Phase1Tile) -> int:
    """How much worse than the best a tile's ring and stores are.

    Measured on an H200, with rows stored by bulk copies, at D = 7168, S = 16: three tokens and 256 bytes a store 0.842,
    two and a half and 512 bytes 0.816, two and 512 bytes 0.798, three and 128 bytes 0.780; at D = 4096, N = 12, S = 16:
    two tokens 0.630.
    """
    run = min(RUN_BYTES // (BLOCK * ITEM_BYTES), tile.blocks)
    two = tile.slots < 2.5 * shape.slots_per_item(tile)
    return 2 * two + (tile.segment < run) + 2 * (tile.segment < min(run, 2))


def _tile(shape: Shape, cluster: int) -> Phase1Tile | None:
    """The best tile with this cluster, or None when queries or rows do not fit."""
    # From 4096 columns on, two CTAs are faster than one (measured on an H200: 0.819 -> 0.853 of copy bandwidth), but for items
    # of few rows: whatever its columns, an item takes a CTA 1.5 us. (With third terms of queries, 8 bytes spilled.)
    # Four were slower (they leave SMs idle), so larger clusters only come where queries or rows need their space.
    few = shape.item_rows * shape.hidden_size <= FEW_ROWS * 4096 and shape.terms < 3
    if shape.hidden_size >= 4096 and cluster == 1 and not few:
        return None
    blocks_needed = ceil_div(shape.hidden_size, BLOCK)
    per_cta = ceil_div(blocks_needed, cluster)
    if (cluster - 1) * per_cta >= blocks_needed:
        return None
    # Four warps and a direct exchange, where columns and registers allow: 1 KB a store (measured on an H200, N = 8 and
    # S = 16 at D = 4096: 0.805 -> 0.854 of copy bandwidth; N = 4 and S = 8 at D = 2048: 0.828 -> 0.844).
    # Stochastic rounding is more for a warp to do: eight hide it better (N = 8, S = 16, of the time of rounding to nearest:
    # D = 4096 1.062 -> 1.035, D = 2048 1.025 -> 1.005).
    if 2 * MAX_WARPS < per_cta <= 4 * MAX_WARPS and not shape.stochastic:
        tile = _ring(shape, cluster, 4, ceil_div(per_cta, 4))
        if tile and tile.direct:
            return tile
    fewest = ceil_div(per_cta, MAX_WARPS)
    # Among equals the fewer warps: seven of 8 blocks were faster than eight of 7 (D = 7168: 0.816 -> 0.842).
    for blocks in sorted((fewest, fewest + 1), key=lambda b: (ceil_div(per_cta, b) * b, -b)):
        tile = _ring(shape, cluster, ceil_div(per_cta, blocks), blocks)
        if tile:
            return tile
    return None


def _ring(shape: Shape, cluster: int, warps: int, blocks: int) -> Phase1Tile | None:
    """The best ring, stores and exchange for these warps, or None when queries or rows do not fit."""
    queries = shape.operand_octets * blocks * BLOCK // 8
    weights = (2 + shape.stochastic) * shape.octets * shape.groups
    if queries > QUERY_REGISTERS or queries + weights > QUERY_REGISTERS + WEIGHT_REGISTERS:
        return None
    run = min(RUN_BYTES // (BLOCK * ITEM_BYTES), blocks)
    halves = 2 if warps % 2 == 0 else 1
    # Two tokens are the least that a ring holds: logits of one are made before the mix of the last. A ring of half rows
    # (two slabs) can hold two and a half.
    choices = [
        (slabs, tokens, segment, False)
        for tokens in (3.0, 2.5, 2.0)
        for segments in ([blocks, run], [s for s in (2, 1) if s < run])
        for segment in segments
        for slabs in (1, halves)
        if tokens > 2.0 or slabs == 1
    ]
    # A direct exchange was faster wherever it left room for whole rows and three tokens, with up to 16 warps' sums to
    # add up; with shorter stores it was slower.
    if shape.groups == 1 and warps * cluster <= 16:
        choices.insert(0, (1, 3.0, blocks, True))
    fitting = []
    for slabs, tokens, segment, exchange in choices:
        tile = Phase1Tile(cluster, warps, blocks, slabs, 0, segment, exchange)
        per_item, item_bytes = shape.slots_per_item(tile), shape.item_bytes(tile)
        fit = (SHARED_BYTES - SCRATCH_BYTES - shape.fixed_bytes(tile)) * per_item // item_bytes
        # Over a cluster, the fourth token was no gain
        wanted = max((4 if cluster == 1 else 3) * per_item, ceil_div(RING_BYTES * per_item, item_bytes))
        slots = min(fit, wanted, MAX_SLOTS)
        if shape.fixed_places(tile):
            slots -= slots % per_item
        if slots >= tokens * per_item:
            fitting.append(dataclasses.replace(tile, slots=slots))
    return min(fitting, key=lambda tile: shortfall(shape, tile), default=None)


def phase1_refusal(
    *, dtype: torch.dtype, hidden_size: int, num_sources: int, num_queries: int, byte_alignment: int
) -> str | None:
    """Why the phase 1 kernel cannot take this call, or None."""
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} is not supported by phase1_fwd: use bfloat16 or float16"
    if hidden_size % VECTOR or not VECTOR <= hidden_size <= MAX_HIDDEN_SIZE:
        return f"hidden size {hidden_size} must be a multiple of {VECTOR} and at most {MAX_HIDDEN_SIZE}"
    if not 1 <= num_sources <= MAX_SOURCES:
        return f"{num_sources} sources: phase1_fwd takes 1 to {MAX_SOURCES}"
    if not 1 <= num_queries <= MAX_QUERIES:
        return f"{num_queries} queries: phase1_fwd takes 1 to {MAX_QUERIES}"
    if byte_alignment < ALIGNMENT:
        return f"every row must start at a multiple of {ALIGNMENT} bytes, not of {byte_alignment}"
    return None


def phase1_configs() -> Iterator[tuple[str, Callable[[Any], Any], Phase1Config]]:
    """(op, build, config) of shapes that together take every path through the kernel."""
    from cute_kernels.phase1_fwd import build

    def config(hidden_size: int, num_sources: int, num_queries: int, **given: Any) -> Phase1Config:
        given = {"dtype": "bf16", "query": "bf16", "key_weight": None} | given
        return phase1_config(hidden_size=hidden_size, num_sources=num_sources, num_queries=num_queries, **given)

    yield "phase1_fwd", build, config(2048, 4, 8)
    yield "phase1_fwd", build, config(4096, 8, 16)
    yield "phase1_fwd", build, config(2048, 8, 16)
    yield "phase1_fwd", build, config(7168, 8, 16)
    yield "phase1_fwd", build, config(2048, 8, 24)
    yield "phase1_fwd", build, config(7168, 8, 24)
    yield "phase1_fwd", build, config(4096, 16, 32, query="fp32", key_weight="bf16", logits=True, rstd=True)
    yield "phase1_fwd", build, config(2304, 9, 12, dtype="fp16", query="fp16")
    yield "phase1_fwd", build, config(8192, 32, 32, dtype="fp16", query="fp32", key_weight="fp32")
    yield "phase1_fwd", build, config(72, 1, 2, logits=True, rstd=True)
    yield "phase1_fwd", build, config(4104, 3, 8, query="fp32")
    yield "phase1_fwd", build, config(2048, 8, 16, query="fp32")
    yield "phase1_fwd", build, config(7168, 8, 24, key_weight="fp32")
    yield (
        "phase1_fwd",
        build,
        config(1024, 9, 32, dtype="fp16", query="bf16", key_weight="bf16", logits=True, rstd=True),
    )
    yield "phase1_fwd", build, config(2048, 1, 16, query="fp32", key_weight="fp32", logits=True, rstd=True)
    yield "phase1_fwd", build, config(4096, 12, 16)
    yield "phase1_fwd", build, config(8192, 8, 16)
    for shape in ((2048, 4, 8), (4096, 8, 16), (2048, 8, 16), (7168, 8, 16), (7168, 8, 24)):
        yield "phase1_fwd", build, config(*shape, out="fp16_scaled")
    given: dict[str, Any] = {"query": "fp32", "logits": True, "rstd": True, "out": "fp16_scaled"}
    yield "phase1_fwd", build, config(4096, 16, 32, dtype="fp16", **given)
    yield "phase1_fwd", build, config(2312, 1, 16, key_weight="fp32", **given)
    for shape in ((2048, 4, 8), (4096, 8, 16), (2048, 8, 16), (7168, 8, 16), (7168, 8, 24)):
        for out in ("bf16", "fp16_scaled"):
            yield "phase1_fwd", build, config(*shape, dtype="fp16", out=out, scaled_sources=True)
    given |= {"dtype": "fp16", "scaled_sources": True}
    yield "phase1_fwd", build, config(4096, 16, 32, **given)
    yield "phase1_fwd", build, config(2312, 1, 16, key_weight="fp32", **given)
    for shape in ((2048, 4, 8), (4096, 8, 16), (7168, 8, 16), (7168, 8, 24)):
        yield "phase1_fwd", build, config(*shape, stochastic=True)
    yield "phase1_fwd", build, config(2304, 9, 12, **given, stochastic=True)
    # Tokens that share an octet of output rows
    yield "phase1_fwd", build, config(4096, 1, 2)
    yield "phase1_fwd", build, config(4096, 3, 2, key_weight="fp32", logits=True, rstd=True)
    yield "phase1_fwd", build, config(2048, 2, 3, **given)
    yield "phase1_fwd", build, config(72, 3, 1, key_weight="bf16", **given | {"out": "fp16"})
    # Items of few rows
    yield "phase1_fwd", build, config(4096, 5, 2, logits=True, rstd=True)
    yield "phase1_fwd", build, config(4096, 4, 9)
