"""Launch shapes of the Triton kernels: block sizes, warps, programs, and what the backend can take.

Everything here is a function of the problem's shape alone: no timing, no device query, so that the same input gives
the same bits on every run and the first call never waits for a tuner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HIDDEN_SIZE = 32768
MAX_SOURCES = 64
MAX_QUERIES = 256

MAX_WARPS = 16
# A thread holds 16 elements of each live row. For a row of 8192 that makes one program of 512 threads an SM, idle in
# its own reductions; kernels with few live rows (light) then take 32 elements on 256 threads held to 128 registers, two
# programs an SM, for a few spilled values (compiled for sm_90 at D = 7168: at most 112 bytes a thread).
ROW_ELEMENTS = 16
MIN_ROW = 8  # elements that share a draw of random bits
LIGHT_ROW = 8192
LIGHT_WARPS = 8
LIGHT_REGISTERS = 128
# Persistent programs that accumulate parameter gradients: two on each of an H200's 132 SMs for a row of 8192, more for
# shorter rows. Not the device's own count, so that the order of the sums never depends on the device.
PROGRAM_ELEMENTS = 132 * 2 * 8192
MIN_PROGRAMS = 132
MAX_PROGRAMS = 2112
TILE_PROGRAMS = 264
# Elements of a [queries, D] block that one thread keeps in registers, of the 128 that four live values leave room for.
QUERY_ELEMENTS = 64
QUERY_REGISTERS = 128
MIN_TILE = 16
DU_WARPS = 8


class RowConfig(NamedTuple):
    """A program works on whole rows: D padded to block_d; at most maxnreg registers a thread where set."""

    block_d: int
    num_warps: int
    maxnreg: int | None


class QueriesConfig(NamedTuple):
    """A program takes whole rows [block_s, block_d], a few queries at a time, then tiles [tile_s, tile_d]."""

    block_s: int
    block_d: int
    tile_s: int
    tile_d: int
    num_warps: int
    maxnreg: int


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def row_config(hidden_size: int, *, light: bool) -> RowConfig:
    """light: at most four live rows; a backward through an output norm has seven."""
    block_d = max(MIN_ROW, next_power_of_2(hidden_size))
    if light and block_d == LIGHT_ROW:
        return RowConfig(block_d, LIGHT_WARPS, LIGHT_REGISTERS)
    return RowConfig(block_d, max(1, min(MAX_WARPS, block_d // (32 * ROW_ELEMENTS))), None)


def queries_config(hidden_size: int, num_queries: int, *, live_tiles: int) -> QueriesConfig:
    """live_tiles: how many [tile_s, tile_d] blocks the second part keeps at once."""
    block_d = next_power_of_2(hidden_size)
    tile_s = next_power_of_2(num_queries)
    num_warps = max(1, min(MAX_WARPS, block_d // (32 * ROW_ELEMENTS)))
    elements = 32 * num_warps * QUERY_ELEMENTS
    block_s = max(1, min(tile_s, elements // block_d))
    tile_d = max(MIN_TILE, min(block_d, elements // live_tiles // tile_s))
    return QueriesConfig(block_s, block_d, tile_s, tile_d, num_warps, QUERY_REGISTERS)


def num_programs(num_tokens: int, hidden_size: int) -> int:
    """Persistent programs over tokens: each writes one fp32 row of partial parameter gradients."""
    programs = PROGRAM_ELEMENTS // next_power_of_2(hidden_size)
    return min(num_tokens, max(MIN_PROGRAMS, min(MAX_PROGRAMS, programs)))


def du_config(hidden_size: int, num_queries: int) -> tuple[int, int]:
    """Tile of D of which one program keeps all queries' du in registers, and its warps."""
    tile_s = next_power_of_2(num_queries)
    tile_d = max(MIN_TILE, min(next_power_of_2(hidden_size), 32 * DU_WARPS * QUERY_ELEMENTS // tile_s))
    return tile_d, max(1, min(DU_WARPS, tile_s * tile_d // (32 * QUERY_ELEMENTS)))


def tile_programs(num_tokens: int, tiles: int) -> int:
    """Persistent programs over tokens for each of a row's tiles of D."""
    return min(num_tokens, max(1, TILE_PROGRAMS // tiles))


def refusal(
    *,
    op: str,
    dtype: torch.dtype,
    hidden_size: int,
    num_sources: int,
    num_queries: int,
    byte_alignment: int,
    features: tuple[str, ...] = (),
) -> str | None:
    """Why this backend cannot take a call, as one clause, or None. Any alignment and all features will do."""
    if dtype not in DTYPES:
        return f"triton {op} takes bfloat16, float16 or float32 storage, not {dtype}"
    if hidden_size > MAX_HIDDEN_SIZE:
        return f"triton {op} takes a hidden size up to {MAX_HIDDEN_SIZE}, not {hidden_size}"
    if num_sources > MAX_SOURCES:
        return f"triton {op} takes up to {MAX_SOURCES} sources, not {num_sources}"
    if num_queries > MAX_QUERIES:
        return f"triton {op} takes up to {MAX_QUERIES} queries, not {num_queries}"
    return None
