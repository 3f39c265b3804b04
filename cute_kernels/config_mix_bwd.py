"""Limits and tiles of mix_bwd: see config.py, whose tiles and rings it shares."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cute_kernels.config import (
    DTYPES,
    GOOD_CONSUMER_WARPS,
    ITEM_BYTES,
    MAX_GROUPS,
    MAX_SLOTS,
    PARAMETER_DTYPES,
    SHARED_BYTES,
    VECTOR,
    RingTile,
    exchange_bytes,
    slot_bytes,
    table_bytes,
)

MAX_WARPS = 16
# Of a consumer thread with 1 to 4 vectors of each row, without and with output norm (tests compile the tightest tiles).
REGISTERS = ((80, 112, 136, 176), (112, 160, 208, 255))
LOOK_AHEAD = 1.3  # ring over rows of a token, where there is room
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
    tile: RingTile
    cluster: int  # CTAs that share a token, a part of its columns each

    @property
    def columns(self) -> int:
        return self.hidden_size // self.cluster

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
        + exchange_bytes(num_sources, tile.warps * cluster, tile.groups)
        + 16 * tile.groups * (cluster > 1)
        + tile.pitch(columns) * 4 * output_norm
    )


def make_tile(columns: int, num_sources: int, warps: int, groups: int, cluster: int, output_norm: bool) -> RingTile:
    """A tile with as many slots as there is room for."""
    producers = 4 if warps * groups in (8, 12, 16) else 1
    tile = RingTile(warps, groups, producers, num_sources, 1, 0)
    room = (SHARED_BYTES - other_bytes(columns, num_sources, tile, cluster, output_norm)) // groups
    pitch = tile.pitch(columns)
    # A producer warp's lanes initialise a slot each: many short rows share slots.
    rows = 1
    while room // slot_bytes(rows, pitch) > MAX_SLOTS and rows <= num_sources:
        rows += 1
    return RingTile(warps, groups, producers, num_sources, rows, min(room // slot_bytes(rows, pitch), MAX_SLOTS))


@functools.cache
def mix_bwd_tile(hidden_size: int, num_sources: int, output_norm: bool) -> tuple[RingTile, int] | None:
    """RingTile and CTAs of a cluster; None where the rows of a token do not fit into shared memory."""
    choices = []
    for cluster in CLUSTERS:
        columns = hidden_size // cluster
        if hidden_size % (cluster * VECTOR) or (cluster > 1 and num_sources > MAX_CLUSTER_SOURCES):
            continue
        for warps in range(1, MAX_WARPS + 1):
            for groups in range(1, min(MAX_WARPS // warps, MAX_GROUPS) + 1):
                tile = make_tile(columns, num_sources, warps, groups, cluster, output_norm)
                vectors = tile.vectors(columns)
                fits = tile.slots * tile.rows > num_sources
                if fits and vectors <= 4 and tile.registers >= REGISTERS[output_norm][vectors - 1]:
                    choices.append((tile, cluster))

    def worth(choice: tuple[RingTile, int]) -> tuple[bool, int, int, int, int]:
        tile, cluster = choice
        ahead = tile.slots * tile.rows >= LOOK_AHEAD * (num_sources + 1)
        warps = min(tile.consumer_warps, GOOD_CONSUMER_WARPS)
        return ahead, warps, -cluster, -tile.pitch(hidden_size // cluster) * cluster, tile.groups

    return max(choices, key=worth, default=None)


def mix_bwd_refusal(hidden_size: int, num_sources: int) -> str | None:
    if mix_bwd_tile(hidden_size, num_sources, True) is None:
        size = hidden_size * ITEM_BYTES
        return f"{num_sources} sources and d_out of {size} bytes a row do not fit into shared memory together"
    return None


def mix_bwd_config(
    dtype: torch.dtype,
    hidden_size: int,
    num_sources: int,
    query: torch.dtype,
    key_weight: torch.dtype | None = None,
    output_weight: torch.dtype | None = None,
    tile: tuple[RingTile, int] | None = None,
) -> MixBwdConfig:
    names = PARAMETER_DTYPES | {None: None}
    tile = tile or mix_bwd_tile(hidden_size, num_sources, output_weight is not None)
    return MixBwdConfig(
        DTYPES[dtype], hidden_size, num_sources, names[query], names[key_weight], names[output_weight], *tile
    )


def mix_bwd_configs() -> Iterator[tuple[str, Any, MixBwdConfig]]:
    """(op, build, config) for config.representative_configs."""
    from cute_kernels.mix_bwd import build

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for args in (
        (bf16, 7168, 9, bf16),
        (bf16, 4096, 5, bf16),
        (bf16, 2048, 17, bf16),
        (bf16, 7168, 9, fp32, bf16, bf16),
        (bf16, 4096, 5, bf16, bf16, bf16),
        (bf16, 2048, 17, bf16, bf16, bf16),
        (bf16, 7168, 17, bf16),
        (fp16, 7168, 17, fp32, fp32, fp32),
    ):
        yield "mix_bwd", build, mix_bwd_config(*args)
