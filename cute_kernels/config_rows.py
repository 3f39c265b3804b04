"""Tiles of the row kernels (mix_fwd, serve_step, phase2_fwd) and of the ring that mix_bwd shares with them: warps, groups, chunks,
ring sizes, the bytes they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from cute_kernels.config import ITEM_BYTES, LANES, PARAMETER_DTYPES, SCALED_FP16, SHARED_BYTES, VECTOR

REGISTER_FILE = 65536
MAX_REGISTERS = 255
PRODUCER_REGISTERS = 24

MAX_ROW_VECTORS = 4  # per thread: 32 elements of a row are 16 registers packed
MAX_GROUP_WARPS = 8
MAX_GROUPS = 8
MAX_CONSUMER_WARPS = 15
# With fewer, arithmetic does not hide behind the loads. On an H200, D 2304, L 17: .57 of copy bandwidth with 6 warps.
GOOD_CONSUMER_WARPS = 12
FAIR_CONSUMER_WARPS = 7
MIN_CHUNK = 2
# Of a consumer thread, besides row data: addresses, barrier state, scalars; for each row, two sums and then a logit and a share.
# With these, no configuration spills (tests compile the tightest ones).
OTHER_REGISTERS = 24
REGISTERS_PER_ROW = 2.5
# Of all rings. More was slower on an H200: D 7168, L 9: .966 of copy bandwidth with 112 KB, .949 with 224; D 4096, L 5: .949
# with 120, .936 with 216.
RING_BYTES = 144 * 1024
# Two rows of 2048 or 2304 elements share a slot, for fewer barriers. On an H200, D 2048, L 17: .908 with one row, .950 with two.
SLOT_BYTES = 10 * 1024
MIN_SLOTS = 4  # of a group, where rows are small enough
MAX_SLOTS = 32


# Of the register kernel.
# Up to so many tokens, a token is spread over up to so many CTAs: about one for each SM. On an H200, step at D 7168, L 9, us in a
# CUDA graph with 1 / 2 / 7 CTAs a token: T 1: 4.4 / 3.2 / 2.4; T 16: 4.8 / 3.8 / 3.7; T 64: 6.0 / 5.1 / 6.3; T 128: 8.2 / 9.7 /
# 10.0, and 8.8 with the ring, which wins from there on: T 256: 15.6 / 18.1 / 15.8, ring 13.6.
CLUSTERS = {16: 8, 66: 2, 132: 1}
MANY_TOKENS = 1 << 31
# With many tokens, it wins where a token is small, but not tiny. Shares of copy bandwidth on an H200 at T 8192, ring and registers:
# D 384, L 4: .70, .62; D 1024, L 4: .75, .93; D 2048, L 2: .89, .95; L 8: .97, .99; L 9: .97, .96; D 4096, L 6: .98, 1.02; L 9:
# .99, .75; D 7168, L 3: .97, 1.02; L 4: .96, .87.
MIN_REGISTER_SIZE = 1024
MAX_REGISTER_ROWS = 8
MAX_REGISTER_ELEMENTS = 3 * 8192
# Of a CTA then. On an H200, phase 2 at D 7168: 1.02 of copy bandwidth with 10 warps, .92 with 14.
MAX_STREAM_WARPS = 10
MIN_LOADS = 4  # of 16 bytes a thread. On an H200, D 2048, L 1: .82 with 4, .78 with 1.
# Of a CTA with few tokens. On an H200, step at D 7168, L 9, T 64: 5.1 us with 7 warps, two vectors a thread, 5.5 us with 14.
MAX_DECODE_WARPS = 8
# CTAs an SM that the compiler leaves registers for, where a sum is scaled: as many as fit, up to this. On an H200, shares of copy
# bandwidth with one and with those: phase 2 with delta and norm at D 2048 .970, .986; 4096 .964, .991; 7168 .846, 1.003; step at
# D 4096, L 5 .721, 1.012. In bf16 more than come of themselves were slower: mix at D 2048, L 5, 1.004 with four, .942 with five.
MAX_RESIDENT = 16
SPARE_SCALED_REGISTERS = 10  # besides rows and parameters as loaded, and four numbers for each source
SPARE_REGISTERS = 14  # besides rows, query and two sums for each row; tests compile the tightest configurations


@dataclass(frozen=True)
class RingTile:
    """Rows by way of shared memory, one CTA an SM on tokens in turn.

    `groups` consumer groups of `warps` warps each have a ring of `slots` slots of `rows` rows.
    """

    warps: int
    groups: int
    producer_warps: int
    chunk: int  # sources held in registers at once
    rows: int  # rows a slot: of one token, loaded and released together
    slots: int  # per group

    @property
    def consumer_warps(self) -> int:
        return self.warps * self.groups

    @property
    def threads(self) -> int:
        return (self.consumer_warps + self.producer_warps) * LANES

    @property
    def consumer_registers(self) -> int:
        """With a full warpgroup of producers, consumers take over their registers (setmaxnreg); 0 leaves the launch's share."""
        if self.producer_warps < 4:
            return 0
        launched = REGISTER_FILE // self.threads // 8 * 8 * self.threads
        left = launched - self.producer_warps * LANES * PRODUCER_REGISTERS
        return min(left // (self.consumer_warps * LANES) // 8 * 8, 240)

    @property
    def registers(self) -> int:
        """The most a consumer thread can have. The hardware allots registers to warps by fours."""
        warps = -(-(self.consumer_warps + self.producer_warps) // 4) * 4
        return self.consumer_registers or min(REGISTER_FILE // (warps * LANES) // 8 * 8, MAX_REGISTERS)

    def vectors(self, hidden_size: int) -> int:
        """16-byte vectors of a row per consumer thread."""
        return -(-hidden_size // (VECTOR * LANES * self.warps))

    def pitch(self, hidden_size: int) -> int:
        """Elements from one row in a slot to the next: the row in whole vectors for every thread."""
        return self.vectors(hidden_size) * self.warps * LANES * VECTOR

    def chunks(self, num_sources: int) -> list[range]:
        return [range(i, min(i + self.chunk, num_sources)) for i in range(0, num_sources, self.chunk)]


def slot_bytes(rows: int, pitch: int) -> int:
    """A slot and its two barriers."""
    return rows * pitch * ITEM_BYTES + 16


def table_bytes(rows: int, producers: int) -> int:
    """Address and stride of each row or scale, for each producer (pipelines.RowTable)."""
    return rows * 16 * producers


def exchange_words(rows: int, unit: bool = False) -> int:
    """What a warp has to tell of up to that many rows: partial sums, one per lane and 16 rows (rows.RowSums), and their unit."""
    return LANES * (-(-rows // 16) + unit)


def exchange_bytes(words: int, warps: int, groups: int) -> int:
    """Two buffers of every warp's words (rows.GroupExchange)."""
    return 0 if warps == 1 else words * warps * 2 * groups * 4


@dataclass(frozen=True)
class RegisterTile:
    """Rows straight to registers, all of a token's at once: a token is mixed by `cluster` CTAs of `warps` warps."""

    warps: int
    cluster: int = 1
    resident: int = 1  # CTAs an SM that the compiler leaves registers for

    @property
    def threads(self) -> int:
        return self.warps * LANES

    @property
    def registers(self) -> int:
        """The most a thread can have."""
        return min(REGISTER_FILE // (-(-self.warps * self.resident // 4) * 4 * LANES) // 8 * 8, MAX_REGISTERS)

    def vectors(self, hidden_size: int) -> int:
        """16-byte vectors of a row per thread."""
        return -(-hidden_size // (VECTOR * LANES * self.warps * self.cluster))

    def chunks(self, num_sources: int) -> list[range]:
        return [range(num_sources)]


class Operands(NamedTuple):
    """Device addresses (0: not there) and row strides in elements of what a row kernel takes besides its ring rows."""

    query: Any = 0  # [D]
    key_weight: Any = 0  # [D]
    output_weight: Any = 0  # [D]
    given_logit: Any = 0  # [T] fp32: the logit of the row that is merged
    out: Any = 0  # [T, D]
    mixed: Any = 0  # [T, D] fp32
    logits: Any = 0  # [L, T] fp32
    rstd: Any = 0  # [L, T] fp32
    lse: Any = 0  # [T] fp32
    weights: Any = 0  # [L, T] fp32
    sum: Any = 0  # [T, D], rows sum_stride apart: the first source after its delta
    sum_stride: Any = 0
    sum_scale: Any = 0  # [T] fp32, sum_scale_stride apart
    sum_scale_stride: Any = 0
    seed: Any = 0  # of the sum's rounding
    block: Any = 0  # [T, D], rows block_stride apart: the first source
    block_stride: Any = 0
    block_scale: Any = 0  # [T] fp32, block_scale_stride apart
    block_scale_stride: Any = 0


@dataclass(frozen=True)
class RowConfig:
    """Static configuration of mix_fwd, serve_step and phase2_fwd; its repr is the key of the disk cache.

    dtypes are "bf16", "fp16", "fp32"; None: there is no such tensor.
    """

    op: str
    dtype: str  # out's, and without `formats` that of all other rows
    hidden_size: int
    num_sources: int
    query: str
    key_weight: str | None
    output_weight: str | None
    merge: bool  # one more row takes part with a given logit
    delta: bool  # the first source arrives as two rows; their sum is stored, too
    write_block: bool  # the first source is stored into the serving cache
    mixed: bool
    logits: bool
    rstd: bool
    lse: bool
    weights: bool
    tile: RingTile | RegisterTile
    # Of a token's rows, where they are not all of `dtype`: (merged row), first source, (its delta), other sources
    formats: tuple[str, ...] = ()
    sum: str = ""  # the format of the stored sum, where it is not `dtype`
    stochastic: bool = False  # the sum is rounded stochastically

    @property
    def num_scales(self) -> int:
        return self.formats.count(SCALED_FP16)

    @property
    def scaled_sum(self) -> bool:
        return self.sum == SCALED_FP16

    @property
    def carveout(self) -> int | None:
        """Percent of shared memory that an SM's CTAs need: untold, the DSL asks the driver, and needs a GPU to compile."""
        if self.tile.resident == 1:
            return None
        return -(-100 * self.tile.resident * (self.shared_bytes + 1024) // (SHARED_BYTES + 1024))

    @property
    def exchange_words(self) -> int:
        unit = self.scaled_sum and isinstance(self.tile, RegisterTile)
        return exchange_words(max(map(len, self.tile.chunks(self.num_sources))), unit)

    @property
    def rows_per_token(self) -> int:
        return self.merge + self.num_sources + self.delta

    @property
    def table_entries(self) -> int:
        return self.rows_per_token * (2 if self.num_scales else 1)

    @property
    def slots_per_token(self) -> int:
        return -(-self.rows_per_token // self.tile.rows)

    @property
    def pitch(self) -> int:
        return self.tile.pitch(self.hidden_size)

    @property
    def threads(self) -> int:
        return self.tile.threads

    @property
    def shared_bytes(self) -> int:
        tile = self.tile
        if isinstance(tile, RegisterTile):
            buffers = exchange_bytes(self.exchange_words, tile.warps * tile.cluster, 1)
            return buffers + (2 * 8 if tile.cluster > 1 else 0)  # of a cluster: one for each exchange, with a barrier
        return (
            tile.groups * tile.slots * (slot_bytes(tile.rows, self.pitch) + (tile.rows * 4 if self.num_scales else 0))
            + table_bytes(self.table_entries, tile.producer_warps)
            + exchange_bytes(self.exchange_words, tile.warps, tile.groups)
            + (self.pitch * 4 if self.output_weight else 0)
        )


def token_class(tokens: int) -> int:
    """Tokens shape a kernel as one of a few upper bounds, so that few are compiled."""
    return next((most for most in CLUSTERS if tokens <= most), MANY_TOKENS)


def row_tile(
    hidden_size: int,
    num_sources: int,
    tokens: int = MANY_TOKENS,
    *,
    merge: bool = False,
    delta: bool = False,
    output_norm: bool = False,
    scales: int = 0,
    scaled_sum: bool = False,
    stochastic: bool = False,
    parameter_bytes: int = ITEM_BYTES,
) -> RingTile | RegisterTile:
    """Registers for few tokens and for small ones, where they can take all rows at once; else the ring.

    parameter_bytes: an element of query and key weight together.

    A scaled sum makes a token wait for its largest magnitude. On an H200, us at T 16384 in registers / by the ring: step at D 4096,
    L 5, in bf16 243 / 257, scaled 246 / 259, with one vector a thread (D 2048, L 5) 154 / 131; phase 2 at D 7168 273 / 298, scaled
    274 / 306, and with stochastic rounding 362 / 322.
    """
    rows = num_sources + merge + delta
    few = tokens <= max(CLUSTERS)
    tile = decode_tile(hidden_size, CLUSTERS[token_class(tokens)]) if few else stream_tile(hidden_size, rows)
    vectors = tile.vectors(hidden_size)
    slow = scaled_sum and (stochastic or (num_sources > 1 and vectors == 1))
    small = MIN_REGISTER_SIZE <= hidden_size <= MAX_REGISTER_ELEMENTS // rows and rows <= MAX_REGISTER_ROWS and not slow
    needed = vectors * (4 * rows + VECTOR) + 2 * num_sources + scales + SPARE_REGISTERS
    if not (few or small) or needed > tile.registers:
        return ring_tile(hidden_size, num_sources, merge=merge, delta=delta, output_norm=output_norm)
    if scaled_sum and not few and rows > 2:
        needed = vectors * (4 * rows + 2 * parameter_bytes) + 4 * num_sources + scales + SPARE_SCALED_REGISTERS
        fitting = [replace(tile, resident=count) for count in range(2, MAX_RESIDENT + 1)]
        return max((each for each in fitting if needed <= each.registers), key=lambda each: each.resident, default=tile)
    return tile


def decode_tile(hidden_size: int, most: int) -> RegisterTile:
    """A cluster of about `most` CTAs: of up to `most`, but at least half as many, the one that leaves the fewest lanes idle."""
    warps = -(-hidden_size // (VECTOR * LANES))  # of one vector a thread
    most = min(most, warps)
    cluster = min(range(most, (most - 1) // 2, -1), key=lambda c: -(-warps // c) * c)
    each = -(-warps // cluster)
    return RegisterTile(each if each <= MAX_DECODE_WARPS else -(-each // 2), cluster)


def stream_tile(hidden_size: int, rows: int) -> RegisterTile:
    """CTAs of a token each, small ones, so that many are at work on an SM."""
    warps = -(-hidden_size // (VECTOR * LANES))  # of one vector a thread
    return RegisterTile(-(-warps // max(-(-warps // MAX_STREAM_WARPS), -(-MIN_LOADS // rows))))


def ring_tile(
    hidden_size: int, num_sources: int, *, merge: bool = False, delta: bool = False, output_norm: bool = False
) -> RingTile:
    """Enough warps, and then as many tokens in flight as the registers can hold.

    Best is a token's rows all in registers, with 12 warps or more: few warps a row give each thread long runs of independent
    arithmetic and cheap reductions, many groups hide one token's reductions behind other tokens' rows. Where the rows are too many
    they come in chunks, which cost a reduction each.
    """
    extra = merge + delta  # rows held besides the chunk

    def vectors(warps: int) -> int:
        return -(-hidden_size // (VECTOR * LANES * warps))

    def needed(warps: int, rows: int) -> float:
        """Registers: packed rows, the fp32 query, and between chunks the fp32 mix."""
        data = vectors(warps) * (4 * (rows + extra) + 8 + 8 * (rows < num_sources))
        return data + REGISTERS_PER_ROW * rows + OTHER_REGISTERS

    def tile(warps: int, groups: int, chunk: int) -> RingTile:
        producers = 4 if warps * groups in (8, 12) else 1
        pitch = vectors(warps) * warps * LANES * VECTOR
        words = exchange_words(chunk)
        other = table_bytes(num_sources + extra, producers) + exchange_bytes(words, warps, groups)
        fits = (SHARED_BYTES - other - pitch * 4 * output_norm) // groups
        rows = max(1, min(min(SLOT_BYTES, fits // MIN_SLOTS) // (pitch * ITEM_BYTES), num_sources + extra))
        wanted = max(RING_BYTES // groups // slot_bytes(rows, pitch), MIN_SLOTS)
        return RingTile(warps, groups, producers, chunk, rows, min(fits // slot_bytes(rows, pitch), wanted, MAX_SLOTS))

    def in_chunks(warps: int, groups: int) -> RingTile | None:
        """Even chunks, as large as the registers take."""
        registers = tile(warps, groups, 1).registers
        most = max((c for c in range(1, num_sources + 1) if needed(warps, c) <= registers), default=0)
        return tile(warps, groups, -(-num_sources // -(-num_sources // most))) if most else None

    # The least padding, then the fewest warps; twice as many halve a thread's share of the rows, but not to a single vector.
    fitting = [w for w in range(1, MAX_GROUP_WARPS + 1) if vectors(w) <= MAX_ROW_VECTORS]
    base = min(fitting, key=lambda w: (vectors(w) * w, w))
    choices = [(base, groups) for groups in range(1, min(MAX_CONSUMER_WARPS // base, MAX_GROUPS) + 1)]
    if vectors(base) == 4 and base * 2 <= MAX_GROUP_WARPS:
        # Not one group: on an H200, D 4096, L 17: .853 of copy bandwidth with 8 warps on one token.
        choices += [(base * 2, groups) for groups in range(2, MAX_CONSUMER_WARPS // (base * 2) + 1)]

    def worth(t: RingTile) -> tuple[bool, bool, bool, int, int]:
        whole = t.chunk == num_sources
        good, fair = t.consumer_warps >= GOOD_CONSUMER_WARPS, t.consumer_warps >= FAIR_CONSUMER_WARPS
        return whole and good, whole and fair, good and t.chunk >= MIN_CHUNK, -len(t.chunks(num_sources)), t.groups

    return max(filter(None, (in_chunks(*choice) for choice in choices)), key=worth)


def row_config(
    op: str,
    dtype: torch.dtype,
    hidden_size: int,
    num_sources: int,
    query: torch.dtype,
    key_weight: torch.dtype | None = None,
    output_weight: torch.dtype | None = None,
    *,
    tokens: int = MANY_TOKENS,
    merge: bool = False,
    delta: bool = False,
    write_block: bool = False,
    mixed: bool = False,
    logits: bool = False,
    rstd: bool = False,
    lse: bool = False,
    weights: bool = False,
    formats: tuple[str, ...] = (),
    sum: str = "",
    stochastic: bool = False,
) -> RowConfig:
    return RowConfig(
        op,
        PARAMETER_DTYPES[dtype],
        hidden_size,
        num_sources,
        PARAMETER_DTYPES[query],
        None if key_weight is None else PARAMETER_DTYPES[key_weight],
        None if output_weight is None else PARAMETER_DTYPES[output_weight],
        merge=merge,
        delta=delta,
        write_block=write_block,
        mixed=mixed,
        logits=logits,
        rstd=rstd,
        lse=lse,
        weights=weights,
        tile=row_tile(
            hidden_size,
            num_sources,
            tokens,
            merge=merge,
            delta=delta,
            output_norm=output_weight is not None,
            scales=formats.count(SCALED_FP16),
            scaled_sum=sum == SCALED_FP16,
            stochastic=stochastic,
            parameter_bytes=query.itemsize + (0 if key_weight is None else key_weight.itemsize),
        ),
        formats=formats,
        sum=sum,
        stochastic=stochastic,
    )


def row_configs() -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """(op, build, config) of shapes that real models have and of every path through the row kernels."""
    from cute_kernels.mix_fwd import build

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    saved: dict[str, Any] = {"logits": True, "rstd": True, "lse": True}
    # The ring
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 7168, 9, bf16)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 4096, 9, bf16)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 2048, 17, bf16)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 7168, 5, bf16, **saved)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 7168, 17, fp32, bf16, bf16, **saved, mixed=True)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 2304, 17, bf16, bf16, weights=True)
    yield "mix_fwd", build, row_config("mix_fwd", fp16, 2304, 9, fp16, **saved)
    yield "mix_fwd", build, row_config("mix_fwd", fp16, 4096, 17, fp32, **saved, weights=True)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 2048, 32, fp32, fp32, fp32, **saved, mixed=True)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 8192, 32, bf16, weights=True)
    yield "mix_fwd", build, row_config("mix_fwd", fp16, 384, 9, fp32, **saved)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 8, 1, bf16)
    yield "serve_step", build, row_config("serve_step", bf16, 7168, 9, fp32, bf16, bf16, delta=True)
    yield "serve_step", build, row_config("serve_step", bf16, 4096, 9, bf16, bf16, bf16, delta=True, write_block=True)
    yield "serve_step", build, row_config("serve_step", fp16, 2048, 17, bf16, fp16, fp16, delta=True)
    yield "serve_step", build, row_config("serve_step", bf16, 8192, 33, bf16, bf16, bf16, delta=True, write_block=True)
    # Registers, many tokens
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 2048, 2, bf16)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 4096, 5, bf16)
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 7168, 3, fp32, fp32, fp32, **saved, mixed=True, weights=True)
    yield "mix_fwd", build, row_config("mix_fwd", fp16, 2304, 8, fp16, **saved)
    yield "serve_step", build, row_config("serve_step", bf16, 7168, 1, bf16, bf16, write_block=True)
    for hidden_size in (2048, 7168):
        plain: dict[str, Any] = {"merge": True}
        yield "phase2_fwd", build, row_config("phase2_fwd", bf16, hidden_size, 1, bf16, **plain)
        yield "phase2_fwd", build, row_config("phase2_fwd", bf16, hidden_size, 1, fp32, bf16, bf16, **plain, delta=True)
    logit: dict[str, Any] = {"merge": True, "logits": True, "rstd": True}
    yield "phase2_fwd", build, row_config("phase2_fwd", fp16, 4096, 1, fp16, **logit, delta=True)
    # Registers, few tokens
    for tokens in CLUSTERS:
        step = ("serve_step", bf16, 7168, 9, bf16, bf16, bf16)
        yield "serve_step", build, row_config(*step, tokens=tokens, delta=True, write_block=True)
        yield "phase2_fwd", build, row_config("phase2_fwd", fp16, 2304, 1, fp32, tokens=tokens, **logit)
        both: dict[str, Any] = {"formats": ("fp16_scaled", "fp16_scaled", "bf16"), "sum": "fp16_scaled"}
        yield (
            "phase2_fwd",
            build,
            row_config("phase2_fwd", bf16, 7168, 1, fp32, bf16, bf16, tokens=tokens, **logit, **both, delta=True),
        )
    yield "mix_fwd", build, row_config("mix_fwd", bf16, 8, 1, bf16, tokens=1)
    # Scaled rows and stochastic rounding
    normed = ("phase2_fwd", bf16, 7168, 1, fp32, bf16, bf16)
    yield "phase2_fwd", build, row_config(*normed, **logit, delta=True, formats=("fp16_scaled", "bf16", "bf16"))
    for hidden_size in (2048, 4096, 7168):
        rows = ("phase2_fwd", bf16, hidden_size, 1, bf16, None, bf16)
        yield "phase2_fwd", build, row_config(*rows, merge=True, **both, delta=True)
    yield "phase2_fwd", build, row_config(*normed, **logit, **both, delta=True, stochastic=True)
    yield "phase2_fwd", build, row_config(*normed, **plain, delta=True, stochastic=True)
    yield "phase2_fwd", build, row_config("phase2_fwd", bf16, 384, 1, bf16, **plain, formats=("fp16_scaled", "bf16"))
    yield "serve_step", build, row_config("serve_step", bf16, 7168, 9, bf16, bf16, bf16, delta=True, stochastic=True)
    yield "serve_step", build, row_config("serve_step", fp16, 2048, 17, bf16, fp16, fp16, delta=True, stochastic=True)
    yield "mix_fwd", build, row_config("mix_fwd", fp16, 4096, 17, fp32, tokens=1, **saved, mixed=True, weights=True)
    for hidden_size, sources in ((7168, 2), (4096, 3), (2048, 5)):
        rows = {"formats": ("fp16_scaled", "bf16", *["fp16_scaled"] * (sources - 1)), "sum": "fp16_scaled"}
        yield (
            "serve_step",
            build,
            row_config("serve_step", bf16, hidden_size, sources, bf16, None, bf16, delta=True, **rows),
        )
    for hidden_size, sources in ((7168, 9), (4096, 5), (2048, 17)):
        rows = ("fp16_scaled",) * sources
        yield (
            "mix_fwd",
            build,
            row_config("mix_fwd", bf16, hidden_size, sources, fp32, bf16, bf16, **saved, formats=rows),
        )
        yield "mix_fwd", build, row_config("mix_fwd", fp32, hidden_size, sources, fp32, weights=True, formats=rows)
        added: dict[str, Any] = {"formats": ("fp16_scaled", "bf16", *rows[1:]), "sum": "fp16_scaled", "delta": True}
        step = ("serve_step", bf16, hidden_size, sources, bf16, bf16, bf16)
        yield "serve_step", build, row_config(*step, **added)
        yield "serve_step", build, row_config(*step, **added, write_block=True, stochastic=True)
        for tokens in CLUSTERS:
            yield "serve_step", build, row_config(*step, **added, tokens=tokens, write_block=True)
