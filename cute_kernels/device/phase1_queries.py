"""The queries of the phase 1 kernels: query * key_weight over a warp's columns, as operands of mma; sums of products with them.

A query that the storage dtype cannot hold is split into two or three terms (config_phase1.query_terms). `kernel` is that of
phase 1's forward or backward, `lane` a consumer thread's place in it.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64, Numeric

from cute_kernels.config import ITEM_BYTES, LANES, VECTOR
from cute_kernels.config_phase1 import BLOCK, OCTET
from cute_kernels.device.mma import (
    Octet,
    ldmatrix,
    load_vector,
    mma,
    power_of_two_scale,
    select,
    split_vector,
    store_shared,
    unpack,
)
from cute_kernels.device.rows import add, tree

TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}
ITEM = ITEM_BYTES
K_STEP = 16  # columns of one mma of the logits
# Accumulators of the logits, for steps in turn, which halves the latency.
CHAINS = 2
# Steps that a chain adds up in the tensor core, which truncates every sum, before fp32 additions take over. With 16, gradients from
# the saved logits were 2 to 3 times as far off as with fp32 products.
CHAIN_STEPS = 4


class Queries(NamedTuple):
    """operands[step][i]: two octets of rows; octets of first terms come first, then those of second terms.

    An odd last octet has an operand for every two steps, with the next step's fragment as the second octet: what mixes
    one step's fragment with the other's columns is left out of the sums, and no register is a mere zero. (Operands take
    four registers in a row, so that a zero would cost as much as a fragment.)
    """

    operands: list[list[tuple[Octet, Octet]]]
    # per octet of queries: undoes the power of two of fp16 terms, where a query is not the stored one
    unscale: list[Float32]
    # addresses that this lane gives to ldmatrix for third terms: of an odd first octet, of the first pair after it
    third_octet: Int32
    third_pairs: Int32


def load_queries(kernel, memory, lane, queries: Int64, query_stride, key_weights, weight_stride) -> Queries:
    """Operand fragments of the queries over the warp's columns, kept in registers; rows past the last are zero.

    By way of the staging buffer: read straight into fragments, 8 rows and 16 or 32 bytes of each per request, they
    took a few microseconds. Third terms, which no register is left for, stay in shared memory.
    """
    shape, tile = kernel.shape, kernel.tile
    # As rows of output: see Shape.octet_tokens
    period = shape.octet_queries if shape.octet_tokens > 1 else None
    reader = QueryReader(kernel, lane, queries, query_stride, key_weights, weight_stride, period)
    stage = memory.stage + lane.warp * shape.stage_bytes(tile)
    stage_row, third_row = shape.stage_row_bytes(tile), shape.third_row_bytes(tile)
    third = memory.third + lane.warp * shape.third_bytes(tile)
    terms: list[list[list[Octet]]] = [[[] for _ in range(kernel.warp_columns // K_STEP)] for _ in range(2)]
    scales: list[tuple[Float32, Float32]] = []
    if not kernel.plain_queries and kernel.dtype is Float16:
        scales = [power_of_two_scale(reader.peak(octet)) for octet in range(shape.octets)]
    # Half a store's columns at a time where a vector takes 16 registers: fp32 queries with fp32 weights spilled.
    segment = tile.segment if reader.vector_words <= VECTOR else -(-tile.segment // 2)
    pieces = [(octet, first) for octet in range(shape.octets) for first in range(0, tile.blocks, segment)]

    def load(octet: int, first: int) -> list[tuple[Int32, Int32, list]]:
        """(row, column, what is there) of this lane's vectors."""
        per_row = min(segment, tile.blocks - first) * BLOCK // VECTOR
        places = [
            ((index + lane.lane) // per_row, (index + lane.lane) % per_row)
            for index in range(0, OCTET * per_row, LANES)
        ]
        places = [(row, first * BLOCK + vector * VECTOR) for row, vector in places]
        return [(row, column, reader.load(octet * OCTET + row, column)) for row, column in places]

    # Two pieces at a time where their registers are few
    ahead = 2 if shape.terms == 1 else 1
    loaded = [load(*piece) for piece in pieces[:ahead]]
    for i, (octet, first) in enumerate(pieces):
        parts = []
        for row, column, given in loaded.pop(0):
            values = given
            if not kernel.plain_queries:
                product = reader.product(given)
                if scales:
                    of_row = cute.arch.shuffle_sync(scales[octet][0], row * 4)
                    product = [value * of_row for value in product]
                values = split_vector(kernel.dtype, product, shape.terms)
            if shape.terms == 3:
                store_shared(third + (octet * OCTET + row) * third_row + column * ITEM, 0, values[2])
            parts.append((stage + row * stage_row + (column - first * BLOCK) * ITEM, values))
        for term in range(min(shape.terms, 2)):
            for address, values in parts:
                store_shared(address, 0, values[term])
            cute.arch.sync_warp()
            for half_block in range(2 * min(segment, tile.blocks - first)):
                rows = stage + (lane.lane % 8) * stage_row + (lane.lane // 8) * 16
                four = ldmatrix(rows, half_block * 2 * K_STEP * ITEM)
                step = first * (BLOCK // K_STEP) + half_block * 2
                terms[term][step].append((four[0], four[1]))
                terms[term][step + 1].append((four[2], four[3]))
            cute.arch.sync_warp()
        loaded += [load(*piece) for piece in pieces[i + ahead : i + ahead + 1]]
    fragments = [high + low for high, low in zip(*terms, strict=True)]
    operands = []
    for step, fragment in enumerate(fragments):
        pairs = [(fragment[i], fragment[i + 1]) for i in range(0, len(fragment) - 1, 2)]
        if len(fragment) % 2:
            even = step - step % 2
            pairs.append((fragments[even][-1], fragments[even + 1][-1]))
        operands.append(pairs)
    # As rows of sources; and a pair's matrices are columns 0 to 7 of both octets, then columns 8 to 15 of both.
    third_octet = third + (lane.lane % 8) * third_row + (lane.lane // 8) * 16
    third_pairs = third + (shape.octets % 2 * OCTET + lane.lane % 16) * third_row + (lane.lane // 16) * 16
    return Queries(operands, [inverse for _, inverse in scales], third_octet, third_pairs)


class ChainedSum:
    """A sum of products over steps, in chains of a few tensor-core accumulations that fp32 additions join.

    alternating: the first octet of even steps and the second octet of odd steps make up the one result (see Queries).
    """

    def __init__(self, dtype: type[Numeric], alternating: bool = False):
        self.dtype, self.alternating, self.steps = dtype, alternating, 0
        self.chains: list[list[Float32] | None] = [None] * CHAINS
        self.joined: list[Float32] | None = None

    def add(self, a: tuple[Octet, Octet | None], b: Octet) -> None:
        chain = self.steps % CHAINS
        self.chains[chain] = mma(self.dtype, a, b, self.chains[chain])
        self.steps += 1
        if self.steps % (CHAINS * CHAIN_STEPS) == 0:
            self.join()

    def join(self) -> None:
        found = [chain for chain in self.chains if chain is not None]
        if self.alternating:
            found = [found[0][:2], found[1][2:]]
        if self.joined is not None:
            found.append(self.joined)
        self.joined = [tree(add, list(values)) for values in zip(*found, strict=True)]
        self.chains = [None] * CHAINS

    def octets(self) -> list[list[Float32]]:
        """This lane's two numbers of each octet of rows; call it last."""
        if self.steps % (CHAINS * CHAIN_STEPS):
            self.join()
        return [self.joined[i : i + 2] for i in range(0, len(self.joined), 2)]


class QueryReader:
    """Queries and key weights, 8 of the warp's columns at a time; zeros past the last query and the last column.

    period: rows from one occurrence of a query to the next, where tokens share an octet of rows.
    """

    def __init__(self, kernel, lane, queries, query_stride, key_weights, weight_stride, period: int | None = None):
        self.kernel, self.config, self.lane, self.period = kernel, kernel.config, lane, period
        self.tensors = [(TYPES[self.config.query], queries, query_stride)]
        if self.config.key_weight is not None:
            self.tensors.append((TYPES[self.config.key_weight], key_weights, weight_stride))

    @property
    def vector_words(self) -> int:
        """Of what `load` loads."""
        return sum(VECTOR * kind.width // 32 for kind, _, _ in self.tensors)

    def load(self, query: Int32 | int, column: Int32) -> list[list[Numeric]]:
        """The 16 or 32 bytes of the query, and of its key weight if there is one."""
        column = self.lane.column + column
        if self.period is not None:
            query = query % self.period
        inside = Boolean(query < self.config.num_queries)
        if self.kernel.ragged:
            inside = inside & (column < self.config.hidden_size)
        loaded = []
        for kind, tensor, stride in self.tensors:
            address = tensor + (Int64(query) * stride + column) * (kind.width // 8)
            if kind is Float32:
                loaded.append(load_vector(kind, address, 0, inside) + load_vector(kind, address, 16, inside))
            else:
                loaded.append(load_vector(Int32, address, 0, inside))
        return loaded

    def product(self, loaded: list[list[Numeric]]) -> list[Float32]:
        """query * key_weight in fp32."""
        factors = [
            words if kind is Float32 else [value for word in words for value in unpack(kind, word)]
            for words, (kind, _, _) in zip(loaded, self.tensors, strict=True)
        ]
        return factors[0] if len(factors) == 1 else [q * w for q, w in zip(*factors, strict=True)]

    @cute.jit
    def peak(self, octet: cutlass.Constexpr) -> Float32:
        """The largest magnitude in the warp's part of row c of the octet. A loop: all rows' loads at once spilled."""
        peak = Float32(0.0)
        for row in cutlass.range(OCTET, unroll=2):
            highest = self.row_peak(octet * OCTET + row)
            peak = select(self.lane.c == row, highest, peak)
        return peak

    def row_peak(self, query: Int32) -> Float32:
        vectors = self.kernel.warp_columns // VECTOR
        magnitudes = []
        for index in range(0, vectors, LANES):
            # A lane past the end repeats the last vector
            column = cutlass.min(index + self.lane.lane, vectors - 1) * VECTOR
            magnitudes += [cute.arch.fmax(value, -value) for value in self.product(self.load(query, column))]
        highest = tree(cute.arch.fmax, magnitudes)
        for offset in (16, 8, 4, 2, 1):
            highest = cute.arch.fmax(highest, cute.arch.shuffle_sync_bfly(highest, offset=offset))
        return highest
