"""What phase 1's backward kernel takes, and with which tiles: cluster, warps, ring, staging, the bytes they need.

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
from cute_kernels.config_phase1 import OCTET, ceil_div, query_terms

MAX_SOURCES = 8
MAX_QUERIES = 32

STEP = 32  # columns that one ldmatrix covers
PIECE = 16  # a warp's columns are a multiple of it
MAX_WARPS = 8
OTHER_WARPS = 4  # a warpgroup: loads, stores, loads of what is added to, weights
# Of a consumer and of another warp, after setmaxnreg: of what eight of those and four of these leave each other, the pairs with
# which ptxas spills least, where rows are loaded ahead and where they are not
AHEAD_SPLIT, SPLIT = (208, 88), (192, 120)
# Of a consumer, for gradients, and columns of one warp: more spilled. Fewer where du is added apart from the tensor core;
# those shapes that fit no other way spill a little (S = 24 at D = 7168, fp32 queries: 40 bytes).
GRADIENT_REGISTERS = 112
APART_REGISTERS = 64
MAX_COLUMNS = 256
# Of gradients, that leave some for the rows of a mix's next step
AHEAD_REGISTERS = 72
APART_AHEAD_REGISTERS = 40
MAX_SLOTS = 4  # of tokens
SCRATCH_BYTES = 128  # alignment of the allocation

# Of an item, up to two octets of a token's queries; fp32, what a lane reads at once side by side: logits [8 queries, 4, octets,
# 2 sources], lse and its gradients [8 queries, 2, octets], of the sources rstd [8] and scales of scaled fp16 [8]
LOGITS_AT, LSE_AT, RSTD_AT, SCALES_AT, STATISTICS_BYTES = 0, 512, 640, 672, 704
STATISTICS_BUFFERS = 4
BUFFERS = 2  # of partial sums, totals and weights; device/phase1_bwd.py says why


class Statistics(NamedTuple):
    """Addresses of what the forward saved and of lse's gradient, fp32; a seed. (One argument: a list alone may not be
    empty.)
    """

    lse: Any  # [S, T]
    logits: Any  # [S, N, T]
    rstd: Any  # [N, T]
    d_lse: Any  # [S, T], when there is one
    scales: Any  # of scaled fp16: N of [T]
    scale_strides: Any  # elements from one token to the next
    seeds: Any  # of the sources' gradients' rounding: one or none


@dataclass(frozen=True)
class Phase1BwdTile:
    """How a cluster works on a token: the hidden dimension is split over its CTAs, then over consumer warps."""

    cluster: int
    warps: int
    columns: int  # of one warp
    item_octets: int  # 1 or 2 octets of queries that are worked on together
    source_slots: int  # a slot holds one token's sources
    output_slots: int  # a slot holds the gradients of one octet of outputs
    stages: int  # a stage holds the gradients of one token's sources

    @property
    def cta_columns(self) -> int:
        return self.warps * self.columns

    @property
    def row_bytes(self) -> int:
        """A row in shared memory. With 16 bytes more than the columns have, eight rows start in different banks."""
        return self.cta_columns * ITEM_BYTES + 16

    @property
    def consumer_warps(self) -> int:
        """With idle ones: setmaxnreg works on warpgroups."""
        return ceil_div(self.warps, 4) * 4

    @property
    def moves_registers(self) -> bool:
        """Twelve warps would cap every thread at 168 registers."""
        return self.consumer_warps > 4


@dataclass(frozen=True)
class Phase1BwdConfig:
    """Static configuration of phase1_bwd; its repr is the key of the disk cache. dtypes are "bf16", "fp16", "fp32"."""

    dtype: str
    query: str
    key_weight: str | None
    hidden_size: int
    num_sources: int
    num_queries: int
    d_lse: bool
    accumulate: bool
    scaled: bool  # the sources are scaled fp16; dtype is that of the gradients
    stochastic: bool  # the sources' gradients are rounded stochastically
    tile: Phase1BwdTile

    @property
    def octets(self) -> int:
        """Of queries."""
        return ceil_div(self.num_queries, OCTET)

    @property
    def scales_queries(self) -> bool:
        """Whether effective queries that the storage dtype cannot hold are fp16 terms of a query times a power of two.

        Two of them have the 23 bits that stochastic rounding needs (see mix_terms). bf16 terms would have to be three;
        without the power of two, second fp16 terms are subnormal.
        """
        return self.stochastic and (self.query != self.dtype or self.key_weight is not None)

    @property
    def query_dtype(self) -> str:
        """Of the terms of an effective query."""
        return "fp16" if self.scales_queries else self.dtype

    @property
    def query_terms(self) -> int:
        """Numbers that an effective query is: two are more than the sources' gradients can show."""
        return min(query_terms(self.query_dtype, self.query, self.key_weight, self.scales_queries), 2)

    def mix_terms(self, dtype: str) -> int:
        """Numbers of the dtype that a weight of the sources' gradients is.

        Stochastic rounding needs fp32's accuracy: with the 16 bits of two bf16 numbers, what lies beside a number that
        the gradient's dtype has may come out on its other side, and be rounded to neither of its neighbours.
        """
        return 3 if self.stochastic and dtype == "bf16" else 2

    @property
    def weight_terms(self) -> int:
        """Numbers of the storage dtype that a weight of the query gradient is. With two bf16 numbers (17 bits), fp32
        gradients would be off by 2e-6.
        """
        return 3 if self.dtype == "bf16" and "fp32" in (self.query, self.key_weight) else 2

    @property
    def scales_weights(self) -> bool:
        """Whether weights are times a power of two: those of fp16."""
        return "fp16" in (self.dtype, self.query_dtype)

    @property
    def weight_numbers(self) -> int:
        """fp32 numbers that a lane takes of an item's weights: two sources' pulls and what undoes powers of two."""
        return 4 if self.scales_weights else 2

    def weight_words(self, octets: int) -> int:
        """Pairs that a lane takes of an item's weights as mma operands: p, g and, for du, g again by twos."""
        terms = self.mix_terms(self.dtype) + self.mix_terms(self.query_dtype)
        return octets * terms + ceil_div(octets * self.weight_terms, 2) * 2

    @property
    def weight_vectors(self) -> int:
        """16-byte vectors that a lane takes of an item's weights: its numbers, its pairs."""
        return 1 + ceil_div(self.weight_words(min(self.octets, self.tile.item_octets)), 4)

    @property
    def weight_bytes(self) -> int:
        """An item's weights; behind them, for stochastic rounding, what random bits of the gradients are made of, [8, 2]."""
        return self.weight_vectors * LANES * 16 + (OCTET * 8 if self.stochastic else 0)

    @property
    def adds_apart(self) -> bool:
        """Whether du is added up apart from the tensor core, whose sums are truncated: by 5e-6 over a hundred tokens.

        (And fp16 products have a scale of their own.)
        """
        return self.dtype == "fp16" or self.weight_terms > 2

    @property
    def du_octets(self) -> int:
        """Of the tensor core's sums that are du: two at least, since high and low weights of one octet add up side by side."""
        return self.octets if self.adds_apart else max(self.octets, 2)

    def octet_rows(self, octet: int) -> int:
        """Queries in an octet."""
        return min(self.num_queries - octet * OCTET, OCTET)

    @property
    def source_slot_rows(self) -> int:
        """Sources and, when they are added to, their gradients."""
        return self.num_sources * (2 if self.accumulate else 1)

    @property
    def source_slot_bytes(self) -> int:
        return self.source_slot_rows * self.tile.row_bytes

    @property
    def output_slot_bytes(self) -> int:
        return self.octet_rows(0) * self.tile.row_bytes

    @property
    def ring_bytes(self) -> int:
        return self.tile.source_slots * self.source_slot_bytes + self.tile.output_slots * self.output_slot_bytes

    @property
    def stage_bytes(self) -> int:
        """Of a token's rows and, where they are fewer than a matrix has, of what warps store beyond them."""
        return self.num_sources * self.tile.row_bytes + self.tile.warps * (OCTET - self.num_sources) * STEP * ITEM_BYTES

    @property
    def query_bytes(self) -> int:
        return self.query_terms * self.num_queries * self.tile.row_bytes

    @property
    def query_scale_bytes(self) -> int:
        return self.octets * OCTET * 4 if self.scales_queries else 0

    @property
    def items(self) -> int:
        """Of a token."""
        return ceil_div(self.octets, self.tile.item_octets)

    @property
    def partial_bytes(self) -> int:
        """One warp's products of an item: [16, 8]."""
        return min(self.octets, self.tile.item_octets) * 256

    @property
    def exchange_bytes(self) -> int:
        """Statistics, each warp's sums, over a cluster each CTA's, and weights."""
        shares = self.tile.warps + (self.tile.cluster if self.tile.cluster > 1 else 0)
        return STATISTICS_BUFFERS * STATISTICS_BYTES + BUFFERS * (shares * self.partial_bytes + self.weight_bytes)

    @property
    def shared_bytes(self) -> int:
        tile = self.tile
        barriers = 8 * (2 * (tile.source_slots + tile.output_slots + tile.stages) + 3 * BUFFERS)
        rows = self.ring_bytes + self.query_bytes + tile.stages * self.stage_bytes + self.query_scale_bytes
        return rows + self.exchange_bytes + barriers + SCRATCH_BYTES

    @property
    def gradient_registers(self) -> int:
        """Of a consumer: for du and, where they are added up over items, the sources' gradients."""
        return (self.octets + (self.items > 1)) * self.tile.columns // 4

    @property
    def loads_ahead(self) -> bool:
        """Whether a mix loads rows one step ahead: not where gradients fill the registers."""
        return self.gradient_registers <= (APART_AHEAD_REGISTERS if self.adds_apart else AHEAD_REGISTERS)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a consumer and of another warp."""
        return AHEAD_SPLIT if self.loads_ahead else SPLIT

    @property
    def threads(self) -> int:
        return (self.tile.consumer_warps + OTHER_WARPS) * LANES

    @property
    def ragged(self) -> bool:
        """Whether the last columns of the last warps lie beyond the row's end."""
        return self.tile.cluster * self.tile.cta_columns != self.hidden_size


def phase1_bwd_config(
    *,
    dtype: str,
    query: str,
    key_weight: str | None,
    hidden_size: int,
    num_sources: int,
    num_queries: int,
    d_lse: bool = True,
    accumulate: bool = False,
    scaled: bool = False,
    stochastic: bool = False,
) -> Phase1BwdConfig | None:
    """The configuration of a launch, or None where a token's rows or the queries' gradients do not fit a cluster of 8."""
    tile = Phase1BwdTile(1, 1, PIECE, 1, 2, 2, 1)
    options = (d_lse, accumulate, scaled, stochastic)
    config = Phase1BwdConfig(dtype, query, key_weight, hidden_size, num_sources, num_queries, *options, tile)
    # Two tokens are in work at once, so a third is what loads go to meanwhile (measured on an H200, with two: 0.848 ->
    # 0.507 of copy bandwidth); of more than one octet, some are free earlier.
    octets, registers = config.octets, APART_REGISTERS if config.adds_apart else GRADIENT_REGISTERS
    pair = min(octets, 2)
    # Octets of two items, the least that a ring must hold
    least = 2 * pair - (octets > 2) * octets % 2
    for item_octets, sources, outputs, most in (
        (pair, 3, 3 * octets, registers),
        (pair, 2, 2 * octets + 1, registers),
        (pair, 2, least, registers),
        (pair, 2, least, GRADIENT_REGISTERS),
        (1, 2, 2, GRADIENT_REGISTERS),
    ):
        for cluster, warps, columns in _splits(hidden_size):
            tile = Phase1BwdTile(cluster, warps, columns, item_octets, sources, outputs, 1)
            found = dataclasses.replace(config, tile=tile)
            if found.shared_bytes <= SHARED_BYTES and found.gradient_registers <= most:
                return _fill(found)
    return None


def _splits(hidden_size: int) -> Iterator[tuple[int, int, int]]:
    """(cluster, warps, columns of a warp): the smallest clusters first; of one size, the least padding, then the most
    warps.
    """
    pieces = ceil_div(hidden_size, PIECE)
    for cluster in (1, 2, 4, 8):
        per_cta = ceil_div(pieces, cluster)
        if (cluster - 1) * per_cta >= pieces:
            continue  # a CTA without columns
        fewest = ceil_div(per_cta, MAX_WARPS)
        for per_warp in sorted((fewest, fewest + 1), key=lambda k: (ceil_div(per_cta, k) * k, k)):
            if per_warp * PIECE <= MAX_COLUMNS:
                yield cluster, ceil_div(per_cta, per_warp), per_warp * PIECE


def _fill(config: Phase1BwdConfig) -> Phase1BwdConfig:
    """With more slots, sources and outputs in step, while they fit."""
    while config.tile.output_slots < MAX_SLOTS * config.octets:
        tile = config.tile
        if tile.source_slots * config.octets < tile.output_slots:
            tile = dataclasses.replace(tile, source_slots=tile.source_slots + 1)
        else:
            tile = dataclasses.replace(tile, output_slots=tile.output_slots + 1)
        more = dataclasses.replace(config, tile=tile)
        if more.shared_bytes > SHARED_BYTES:
            break
        config = more
    return config


def phase1_bwd_refusal(
    *, dtype: torch.dtype, hidden_size: int, num_sources: int, num_queries: int, byte_alignment: int
) -> str | None:
    """Why the kernel cannot take this call, or None."""
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} is not supported by phase1_bwd: use bfloat16 or float16"
    if hidden_size % VECTOR or not VECTOR <= hidden_size <= MAX_HIDDEN_SIZE:
        return f"hidden size {hidden_size} must be a multiple of {VECTOR} and at most {MAX_HIDDEN_SIZE}"
    if not 1 <= num_sources <= MAX_SOURCES:
        return f"{num_sources} sources: phase1_bwd takes 1 to {MAX_SOURCES}"
    if not 1 <= num_queries <= MAX_QUERIES:
        return f"{num_queries} queries: phase1_bwd takes 1 to {MAX_QUERIES}"
    if byte_alignment < ALIGNMENT:
        return f"every row must start at a multiple of {ALIGNMENT} bytes, not of {byte_alignment}"
    if not _largest_fits(DTYPES[dtype], hidden_size, num_sources, num_queries):
        return f"{num_sources} sources and {num_queries} queries of hidden size {hidden_size} do not fit in a cluster"
    return None


def _largest_fits(dtype: str, hidden_size: int, num_sources: int, num_queries: int) -> bool:
    shape: dict[str, Any] = {"hidden_size": hidden_size, "num_sources": num_sources, "num_queries": num_queries}
    return phase1_bwd_config(dtype=dtype, query="fp32", key_weight="fp32", accumulate=True, **shape) is not None


def phase1_bwd_configs() -> Iterator[tuple[str, Callable[[Any], Any], Phase1BwdConfig]]:
    """(op, build, config) of shapes that together take every path through the kernel."""
    from cute_kernels.phase1_bwd import build

    def config(hidden_size: int, num_sources: int, num_queries: int, **given: Any) -> Phase1BwdConfig:
        given = {"dtype": "bf16", "query": "bf16", "key_weight": None} | given
        found = phase1_bwd_config(hidden_size=hidden_size, num_sources=num_sources, num_queries=num_queries, **given)
        assert found is not None
        return found

    yield "phase1_bwd", build, config(2048, 4, 8)
    yield "phase1_bwd", build, config(4096, 8, 16)
    yield "phase1_bwd", build, config(7168, 8, 24)
    yield "phase1_bwd", build, config(2048, 8, 16, query="fp32", key_weight="bf16", accumulate=True)
    yield "phase1_bwd", build, config(2304, 5, 12, dtype="fp16", query="fp16", d_lse=False)
    yield "phase1_bwd", build, config(384, 8, 32, dtype="fp16", query="fp32", key_weight="fp32", accumulate=True)
    yield "phase1_bwd", build, config(8, 1, 1)
    yield "phase1_bwd", build, config(4096, 8, 16, scaled=True)
    yield "phase1_bwd", build, config(7168, 8, 24, scaled=True)
    yield "phase1_bwd", build, config(2048, 4, 8, query="fp32", scaled=True, accumulate=True)
    yield "phase1_bwd", build, config(2304, 8, 16, dtype="fp16", query="fp32", scaled=True)
    for shape in ((2048, 4, 8), (4096, 8, 16), (7168, 8, 16), (7168, 8, 24)):
        yield "phase1_bwd", build, config(*shape, stochastic=True)
    yield "phase1_bwd", build, config(4096, 8, 16, query="fp32", key_weight="fp32", accumulate=True, stochastic=True)
    yield "phase1_bwd", build, config(2304, 5, 12, dtype="fp16", query="fp16", accumulate=True, stochastic=True)
    yield "phase1_bwd", build, config(7168, 8, 24, scaled=True, stochastic=True)
    yield "phase1_bwd", build, config(2304, 8, 16, dtype="fp16", query="fp32", scaled=True, stochastic=True)
