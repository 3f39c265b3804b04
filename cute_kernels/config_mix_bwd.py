"""Limits and tiles of mix_bwd: see config_rows.py, whose tiles and rings it shares."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from cute_kernels.config import DTYPES, PARAMETER_DTYPES, SHARED_BYTES, VECTOR
from cute_kernels.config_rows import (
    GOOD_CONSUMER_WARPS,
    MAX_GROUPS,
    MAX_SLOTS,
    RingTile,
    exchange_bytes,
    exchange_words,
    slot_bytes,
    table_bytes,
)

MAX_WARPS = 16
MAX_VECTORS = 4
# Of a consumer thread with 1 to 4 vectors of each row, without and with output norm (tests compile the tightest tiles).
REGISTERS = ((80, 112, 136, 176), (112, 160, 208, 255))
# A token's rows stay in the ring until the last pass over them, so a ring holds all of one token; those of the next are on their
# way. More in flight is slower: on an H200, D 7168, L 2: .877 of copy bandwidth with 6 slots, .861 with 9, .845 with 15. A norm's
# second pass holds the rows longer.
RING_TOKENS = (2, 4)  # without and with output norm
LEAST_AHEAD = 1.3  # tokens in the ring, where there is room
RING_BYTES = 64 * 1024  # of all rings, where tokens are small
# CTAs that share a token: two where one has too little shared memory for its rows or too few registers for the norm. On an H200,
# D 7168, L 9 with norm: .903 with 14 warps in each of two CTAs, .886 with 7 warps in one; without norm one is as good: .917, .913.
CLUSTERS = (1, 2)
MAX_CLUSTER_SOURCES = 24  # more spill
MAX_PART = 16  # sources whose sums are reduced together: two numbers each fill a warp's lanes


class BackwardOperands(NamedTuple):
    """Device addresses (0: not there) of what the kernel takes besides its ring rows, d_out and the sources."""

    query: Any  # [D]
    key_weight: Any  # [D]
    output_weight: Any  # [D]
    logits: Any  # [L, T] fp32
    rstd: Any  # [L, T] fp32
    lse: Any  # [T] fp32
    d_sources: list[Any]  # L of [T, D]
    d_strides: list[Any]  # elements from one token to the next
    scales: list[Any]  # L of [T] fp32; empty where the sources have none
    scale_strides: list[Any]
    sums: Any  # [clusters, 1 or 2, D] fp32: du, and the output weight's gradient, of a cluster's tokens


@dataclass(frozen=True)
class MixBwdConfig:
    """Static configuration of mix_bwd; its repr is the key of the disk cache. dtypes as in RowConfig."""

    dtype: str
    hidden_size: int
    num_sources: int
    query: str
    key_weight: str | None
    output_weight: str | None
    scaled: bool  # the sources are scaled fp16; dtype is that of the gradients
    tile: RingTile
    cluster: int  # CTAs that share a token, a part of its columns each

    @property
    def columns(self) -> int:
        return self.hidden_size // self.cluster

    @property
    def formats(self) -> tuple[str, ...]:
        """Of rows in the ring, as RowConfig has them: none of their own. Values of scaled fp16 are as wide as the gradients."""
        return ()

    @property
    def exchange_warps(self) -> int:
        """Whose sums are added up."""
        return self.tile.warps * self.cluster

    @property
    def rows_per_token(self) -> int:
        """d_out and the sources."""
        return 1 + self.num_sources

    @property
    def slots_per_token(self) -> int:
        return -(-self.rows_per_token // self.tile.rows)

    @property
    def parts(self) -> list[range]:
        """The sources in as few even parts of at most MAX_PART as there can be."""
        size = -(-self.num_sources // -(-self.num_sources // MAX_PART))
        return [range(i, min(i + size, self.num_sources)) for i in range(0, self.num_sources, size)]

    @property
    def pitch(self) -> int:
        return self.tile.pitch(self.columns)

    @property
    def threads(self) -> int:
        return self.tile.threads

    @property
    def shared_bytes(self) -> int:
        tile = self.tile
        return tile.groups * tile.slots * slot_bytes(tile.rows, self.pitch) + other_bytes(
            self.columns, self.num_sources, tile, self.cluster, self.output_weight is not None
        )


def other_bytes(columns: int, num_sources: int, tile: RingTile, cluster: int, output_norm: bool) -> int:
    """Shared memory besides the rings."""
    return (
        table_bytes(num_sources + 1, tile.producer_warps)
        + exchange_bytes(exchange_words(num_sources), tile.warps * cluster, tile.groups)
        + 16 * (1 + tile.groups * (cluster > 1))  # mbarriers
        + tile.pitch(columns) * 4 * output_norm
    )


def make_tile(columns: int, num_sources: int, warps: int, groups: int, cluster: int, output_norm: bool) -> RingTile:
    producers = 4 if warps * groups in (8, 12, 16) else 1
    tile = RingTile(warps, groups, producers, num_sources, 1, 0)
    pitch = tile.pitch(columns)
    room = (SHARED_BYTES - other_bytes(columns, num_sources, tile, cluster, output_norm)) // groups
    # Where a ring has more slots than a producer sets up, many short rows share slots.
    rows = 1
    while room // slot_bytes(rows, pitch) > MAX_SLOTS and rows <= num_sources:
        rows += 1
    token = -(-(num_sources + 1) // rows)
    wanted = max(RING_TOKENS[output_norm] * token, RING_BYTES // groups // slot_bytes(rows, pitch))
    return replace(tile, rows=rows, slots=min(room // slot_bytes(rows, pitch), wanted, MAX_SLOTS))


@functools.cache
def mix_bwd_tile(hidden_size: int, num_sources: int, output_norm: bool) -> tuple[RingTile, int] | None:
    """Tile, and CTAs of a cluster; None where the rows of a token do not fit into shared memory.

    Best are a dozen warps or more with a token in the ring and part of the next, in as few CTAs; then two vectors a thread (on an
    H200, D 2304, L 5: .841 with 5 warps of 2, .824 with 3 warps of 3), little padding, many groups.
    """
    choices = []
    for cluster in CLUSTERS:
        columns = hidden_size // cluster
        if hidden_size % (cluster * VECTOR) or (cluster > 1 and num_sources > MAX_CLUSTER_SOURCES):
            continue
        for warps in range(1, MAX_WARPS + 1):
            for groups in range(1, min(MAX_WARPS // warps, MAX_GROUPS) + 1):
                tile = make_tile(columns, num_sources, warps, groups, cluster, output_norm)
                vectors = tile.vectors(columns)
                if vectors > MAX_VECTORS or tile.registers < REGISTERS[output_norm][vectors - 1]:
                    continue
                if tile.slots * tile.rows > num_sources:
                    choices.append((tile, cluster))

    def worth(choice: tuple[RingTile, int]) -> tuple[bool, int, int, int, int, int]:
        tile, cluster = choice
        columns = hidden_size // cluster
        ahead = tile.slots * tile.rows >= LEAST_AHEAD * (num_sources + 1)
        warps = min(tile.consumer_warps, GOOD_CONSUMER_WARPS)
        return ahead, warps, -cluster, -max(tile.vectors(columns), 2), -tile.pitch(columns), tile.groups

    return max(choices, key=worth, default=None)


def mix_bwd_refusal(hidden_size: int, num_sources: int) -> str | None:
    if mix_bwd_tile(hidden_size, num_sources, True) is None:
        return (
            f"{num_sources} sources of {hidden_size} elements: mix_bwd keeps the rows of a token in the shared memory of one SM, "
            f"or of two for up to {MAX_CLUSTER_SOURCES} sources"
        )
    return None


def mix_bwd_config(
    dtype: torch.dtype,
    hidden_size: int,
    num_sources: int,
    query: torch.dtype,
    key_weight: torch.dtype | None = None,
    output_weight: torch.dtype | None = None,
    scaled: bool = False,
) -> MixBwdConfig:
    """Of a shape that `refusal` accepts."""
    names = PARAMETER_DTYPES | {None: None}
    choice = mix_bwd_tile(hidden_size, num_sources, output_weight is not None)
    assert choice is not None
    return MixBwdConfig(
        DTYPES[dtype], hidden_size, num_sources, names[query], names[key_weight], names[output_weight], scaled, *choice
    )


def mix_bwd_configs() -> Iterator[tuple[str, Any, MixBwdConfig]]:
    """(op, build, config) for config.representative_configs."""
    from cute_kernels.mix_bwd import build

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for shape in (
        (bf16, 7168, 9, bf16),
        (bf16, 4096, 5, bf16),
        (bf16, 2048, 17, bf16),
        (bf16, 7168, 2, bf16, bf16),
        (bf16, 7168, 17, bf16),
        (fp16, 2304, 5, fp32),
        (bf16, 2304, 32, fp32, fp32, fp32),
        (bf16, 7168, 9, fp32, bf16, bf16),
        (bf16, 4096, 5, bf16, bf16, bf16),
        (bf16, 2048, 17, bf16, bf16, bf16),
        (fp16, 7168, 17, fp32, fp32, fp32),
        (bf16, 8192, 17, fp32, fp32, fp32),
        (fp16, 1000, 9, fp32, fp32, fp32),
        (bf16, 8, 1, bf16),
        (bf16, 7168, 9, bf16, None, bf16, True),
        (bf16, 4096, 5, bf16, None, None, True),
        (bf16, 2048, 17, bf16, bf16, bf16, True),
        (fp16, 2304, 32, fp32, fp32, fp32, True),
    ):
        yield "mix_bwd", build, mix_bwd_config(*shape)
