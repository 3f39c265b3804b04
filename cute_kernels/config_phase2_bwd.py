"""Tiles of phase 2's backward: warps a token, tokens of a CTA at once, tokens in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cute_kernels.config import DTYPES, ITEM_BYTES, LANES, PARAMETER_DTYPES, VECTOR
from cute_kernels.config_rows import exchange_bytes

GROUPS_WARPS = 12  # of several groups together
TOKEN_WARPS = 16  # of one group
STAGE_BYTES = 124 * 1024  # of three stages, with one group


class Phase2BwdOperands(NamedTuple):
    """Device addresses (0: not there) and row strides in elements."""

    d_out: Any = 0  # [T, D]
    partial: Any = 0  # [T, D]
    partial_stride: Any = 0
    partial_scale: Any = 0  # [T] fp32
    partial_scale_stride: Any = 0
    inter_out: Any = 0  # [T, D]
    inter_out_stride: Any = 0
    inter_scale: Any = 0  # [T] fp32
    inter_scale_stride: Any = 0
    d_new_partial: Any = 0  # [T, D]
    d_new_partial_stride: Any = 0
    query: Any = 0  # [D]
    key_weight: Any = 0  # [D]
    output_weight: Any = 0  # [D]
    logit: Any = 0  # [T] fp32
    rstd: Any = 0  # [T] fp32
    inter_lse: Any = 0  # [T] fp32
    d_partial: Any = 0  # [T, D]
    d_inter_out: Any = 0  # [T, D]
    d_inter_lse: Any = 0  # [T] fp32
    sums: Any = 0  # [CTAs, 1 or 2, D] fp32: du, and d_output_weight


@dataclass(frozen=True)
class Phase2BwdConfig:
    """Static configuration; its repr is the key of the disk cache. dtypes as in config.RowConfig."""

    dtype: str  # of the gradients
    partial: str
    partial_scaled: bool
    inter_out: str
    inter_scaled: bool
    hidden_size: int
    query: str
    key_weight: str | None
    output_weight: str | None
    new_partial: bool  # the new partial sum's gradient is added
    warps: int  # that share a token
    groups: int  # of so many warps in a CTA
    stages: int  # tokens of a group that are in flight or being worked on

    @property
    def scaled(self) -> bool:
        return self.partial_scaled or self.inter_scaled

    @property
    def rows(self) -> int:
        """Rows read for a token."""
        return 3 + self.new_partial

    @property
    def threads(self) -> int:
        return self.warps * self.groups * LANES

    @property
    def vectors(self) -> int:
        """16-byte vectors of a row per thread."""
        return -(-self.hidden_size // (VECTOR * LANES * self.warps))

    @property
    def pitch(self) -> int:
        """A row in whole vectors for every thread."""
        return self.vectors * self.warps * LANES * VECTOR

    @property
    def shared_bytes(self) -> int:
        rows = self.groups * self.stages * self.rows * self.pitch * ITEM_BYTES
        return rows + exchange_bytes(LANES, self.warps, self.groups)


def phase2_bwd_tile(hidden_size: int, rows: int) -> tuple[int, int, int]:
    """(warps, groups, stages): as few tokens open at once as keep the SM busy. Shares of copy bandwidth are an H200's."""

    def warps(vectors: int) -> int:
        return -(-hidden_size // (VECTOR * LANES * vectors))

    # Two vectors a thread, where two tokens or more fit into 12 warps: D 2048: .973 with 4 warps x 3 groups, .950 with one vector
    # and 8 x 2, .913 with 4 x 4.
    if 2 * warps(2) <= GROUPS_WARPS:
        return warps(2), GROUPS_WARPS // warps(2), 3
    # A longer row has the CTA to itself, spread over all the warps it can use: D 4096: .944 with 16 warps, .907 with 8 x 2.
    vectors = 1 if warps(1) <= TOKEN_WARPS else 2
    token_bytes = rows * vectors * warps(vectors) * LANES * VECTOR * ITEM_BYTES
    # D 5120: .994 with three, .953 with two; D 7168: .931 and .940.
    return warps(vectors), 1, 3 if 3 * token_bytes <= STAGE_BYTES else 2


def phase2_bwd_config(
    dtype: torch.dtype,
    hidden_size: int,
    query: torch.dtype,
    key_weight: torch.dtype | None = None,
    output_weight: torch.dtype | None = None,
    *,
    partial: torch.dtype | None = None,
    inter_out: torch.dtype | None = None,
    partial_scaled: bool = False,
    inter_scaled: bool = False,
    new_partial: bool = False,
) -> Phase2BwdConfig:
    """partial and inter_out: their dtypes, where they are not the gradients'."""
    return Phase2BwdConfig(
        DTYPES[dtype],
        DTYPES[partial or dtype],
        partial_scaled,
        DTYPES[inter_out or dtype],
        inter_scaled,
        hidden_size,
        PARAMETER_DTYPES[query],
        None if key_weight is None else PARAMETER_DTYPES[key_weight],
        None if output_weight is None else PARAMETER_DTYPES[output_weight],
        new_partial,
        *phase2_bwd_tile(hidden_size, 3 + new_partial),
    )


def phase2_bwd_configs() -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """(op, build, config) of shapes that real models have and of every path through the kernel."""
    from cute_kernels.phase2_bwd import build

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for hidden_size in (2048, 4096, 7168):
        yield "phase2_bwd", build, phase2_bwd_config(bf16, hidden_size, bf16)
        yield "phase2_bwd", build, phase2_bwd_config(bf16, hidden_size, bf16, None, bf16, new_partial=True)
    yield "phase2_bwd", build, phase2_bwd_config(bf16, 8192, fp32, fp32, fp32, new_partial=True)
    yield "phase2_bwd", build, phase2_bwd_config(fp16, 2304, fp16, fp16, None, new_partial=True)
    yield "phase2_bwd", build, phase2_bwd_config(fp16, 7176, fp32, fp32, fp32)
    yield "phase2_bwd", build, phase2_bwd_config(fp16, 384, fp32, None, fp16)
    yield "phase2_bwd", build, phase2_bwd_config(bf16, 8, bf16)
    scaled = {"inter_out": fp16, "inter_scaled": True}
    for hidden_size in (2048, 4096, 7168):
        yield "phase2_bwd", build, phase2_bwd_config(bf16, hidden_size, bf16, None, bf16, new_partial=True, **scaled)
    both = {"partial": fp16, "partial_scaled": True, "new_partial": True, **scaled}
    yield "phase2_bwd", build, phase2_bwd_config(bf16, 8192, fp32, fp32, fp32, **both)
    yield "phase2_bwd", build, phase2_bwd_config(bf16, 7176, fp32, **both)
