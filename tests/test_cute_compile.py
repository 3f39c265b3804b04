"""The CuTe row kernels (mix_fwd, serve_step, phase2_fwd) without a GPU: limits, tiles, lane mappings, machine code for sm_90a."""

import dataclasses
import itertools
import math
import os
import re
from typing import Any

import numpy as np
import pytest
import torch

from attnres.scaled import row_scale
from cute_kernels import config, config_rows
from cute_kernels.config import MAX_HIDDEN_SIZE, MAX_SOURCES, SHARED_BYTES, refusal
from cute_kernels.config_rows import (
    CLUSTERS,
    MANY_TOKENS,
    RegisterTile,
    RowConfig,
    ring_tile,
    row_config,
    row_tile,
    token_class,
)
from cute_kernels.inspect import Inspection, compile_all

pytest.importorskip("cutlass")
LANES = 32

ACCEPTED = {
    "op": "mix_fwd",
    "dtype": torch.bfloat16,
    "hidden_size": 2048,
    "num_sources": 5,
    "num_queries": 1,
    "byte_alignment": 16,
}


@pytest.mark.parametrize("op", ["mix_fwd", "serve_step", "phase2_fwd", "phase2_bwd"])
@pytest.mark.parametrize("hidden_size", [8, 2048, 8192])
def test_accepts(op: str, hidden_size: int) -> None:
    assert refusal(**ACCEPTED | {"op": op, "hidden_size": hidden_size}) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dtype": torch.float32}, "dtype float32 is not supported by mix_fwd: use bfloat16 or float16"),
        ({"hidden_size": 12}, "hidden size 12 must be a multiple of 8"),
        ({"hidden_size": 8200}, "hidden size 8200 must be a multiple of 8 and at most 8192"),
        ({"num_sources": 33}, "33 sources: mix_fwd takes 1 to 32"),
        ({"op": "serve_step", "num_sources": 34}, "34 sources: serve_step takes 1 to 33"),
        ({"byte_alignment": 8}, "multiple of 16 bytes, not of 8"),
    ],
)
def test_refuses_with_the_reason(changed: dict, said: str) -> None:
    reason = refusal(**ACCEPTED | changed)
    assert reason is not None
    assert said in reason


def test_step_takes_a_prefix_besides_the_blocks() -> None:
    assert refusal(**ACCEPTED | {"op": "serve_step", "num_sources": MAX_SOURCES + 1}) is None


def check_tile(hidden_size: int, num_sources: int, **flags: bool) -> None:
    tile = ring_tile(hidden_size, num_sources, **flags)
    shape = (hidden_size, num_sources, flags, tile)
    rows = num_sources + flags.get("merge", False) + flags.get("delta", False)
    weight = tile.pitch(hidden_size) * 4 * flags.get("output_norm", False)
    ring = tile.groups * tile.slots * config_rows.slot_bytes(tile.rows, tile.pitch(hidden_size))
    words = config_rows.exchange_words(tile.chunk)
    other = config_rows.exchange_bytes(words, tile.warps, tile.groups) + config_rows.table_bytes(
        rows, tile.producer_warps
    )
    assert ring + other + weight <= SHARED_BYTES, shape
    # A consumer holds a slot until it has the next one, and a producer warp's lanes initialise one each.
    assert 3 <= tile.slots <= LANES, shape
    assert 1 <= tile.rows <= rows, shape
    assert tile.pitch(hidden_size) >= hidden_size, shape
    assert tile.threads <= 16 * LANES, shape
    # setmaxnreg works on whole warpgroups, and moves registers, so that the sum must fit.
    if tile.consumer_registers:
        assert tile.consumer_warps % 4 == 0, shape
        registers = tile.consumer_warps * tile.consumer_registers + tile.producer_warps * config_rows.PRODUCER_REGISTERS
        assert registers * LANES <= config_rows.REGISTER_FILE, shape
    # Named barriers: 16, of which the groups use 2 and up.
    assert tile.warps == 1 or tile.groups <= 14, shape
    held = tile.chunk + rows - num_sources
    data = tile.vectors(hidden_size) * (4 * held + 8 + 8 * (tile.chunk < num_sources))
    assert data + config_rows.REGISTERS_PER_ROW * tile.chunk + config_rows.OTHER_REGISTERS <= tile.registers, shape
    assert [i for chunk in tile.chunks(num_sources) for i in chunk] == list(range(num_sources)), shape


@pytest.mark.parametrize("num_sources", [1, 2, 3, 5, 8, 9, 10, 11, 16, 17, 24, 31, 32])
def test_every_tile_fits(num_sources: int) -> None:
    for hidden_size in range(8, MAX_HIDDEN_SIZE + 1, 8):
        check_tile(hidden_size, num_sources)


def test_every_tile_fits_with_norm_delta_and_merge() -> None:
    for hidden_size in range(8, MAX_HIDDEN_SIZE + 1, 56):
        for num_sources in range(1, MAX_SOURCES + 2):
            check_tile(hidden_size, num_sources, delta=True, output_norm=True)
        check_tile(hidden_size, 1, merge=True)
        check_tile(hidden_size, 1, merge=True, delta=True, output_norm=True)


def test_every_register_tile_fits() -> None:
    for tokens in (*CLUSTERS, MANY_TOKENS):
        for hidden_size in range(8, MAX_HIDDEN_SIZE + 1, 56):
            for num_sources in range(1, MAX_SOURCES + 2):
                tile = row_tile(hidden_size, num_sources, tokens, delta=True, output_norm=True)
                if not isinstance(tile, RegisterTile):
                    continue
                shape = (hidden_size, num_sources, tokens, tile)
                vectors = tile.vectors(hidden_size)
                assert vectors * tile.warps * tile.cluster * LANES * 8 >= hidden_size, shape
                assert tile.warps <= 16, shape
                assert tile.cluster <= 8, shape
                assert vectors * (4 * (num_sources + 1) + 8) + 2 * num_sources < tile.registers, shape


def test_few_tokens_are_spread_over_a_cluster() -> None:
    clusters = []
    for tokens in (1, 16, 17, 66, 67, 132):
        tile = row_tile(7168, 9, token_class(tokens), delta=True, output_norm=True)
        assert isinstance(tile, RegisterTile)
        clusters.append(tile.cluster)
    assert clusters == [7, 7, 2, 2, 1, 1]  # 7 * 4 warps of 32 lanes of 8 elements are 7168
    assert row_tile(7168, 9, token_class(133)) == ring_tile(7168, 9)
    assert row_tile(4096, 9, 1) == RegisterTile(2, 8)
    assert row_tile(2304, 9, 1) == RegisterTile(2, 5)
    assert row_tile(8, 1, 1) == RegisterTile(1, 1)  # no CTA without a column


def test_small_tokens_go_straight_to_registers() -> None:
    assert row_tile(2048, 1, merge=True) == RegisterTile(4)
    assert row_tile(4096, 6) == RegisterTile(8)
    assert row_tile(7168, 1, merge=True, delta=True) == RegisterTile(10)
    for hidden_size, num_sources in ((384, 4), (1024, 9), (7168, 4)):
        assert row_tile(hidden_size, num_sources) == ring_tile(hidden_size, num_sources)


def test_tiles_of_scaled_sums() -> None:
    """As many CTAs an SM as their registers allow; the ring where the sum is rounded stochastically besides, and for one vector a
    thread of several sources."""
    scaled: dict[str, Any] = {"delta": True, "scaled_sum": True}
    merged: dict[str, Any] = {"merge": True, "scales": 2, **scaled}
    assert [row_tile(size, 1, **merged).resident for size in (2048, 4096, 7168)] == [10, 5, 3]
    assert row_tile(4096, 1, **merged) == RegisterTile(8, resident=5)
    assert row_tile(4096, 1, **merged, parameter_bytes=8) == RegisterTile(8, resident=3)
    assert row_tile(4096, 1, **merged, stochastic=True) == ring_tile(4096, 1, merge=True, delta=True)
    assert row_tile(4096, 5, scales=5, **scaled) == RegisterTile(8, resident=2)
    assert row_tile(2048, 2, scales=2, **scaled).vectors(2048) == 2
    assert row_tile(2048, 5, delta=True) == RegisterTile(8)
    assert row_tile(2048, 5, scales=5, **scaled) == ring_tile(2048, 5, delta=True)
    assert row_tile(4096, 5, 16, scales=5, **scaled) == row_tile(4096, 5, 16, delta=True) == RegisterTile(2, 8)
    assert row_tile(4096, 6, 16, delta=True).resident == 1


@pytest.fixture
def warp(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Lane numbers, with the device helpers' warp operations replaced by NumPy ones on arrays of 32 lanes."""
    import cutlass.cute as cute

    from cute_kernels.device import mix, rows

    lanes = np.arange(LANES)
    for module in (mix, rows):  # both imported before either is changed: mix takes rows' functions by name
        monkeypatch.setattr(module, "select", np.where)
    monkeypatch.setattr(rows, "Int32", int)
    monkeypatch.setattr(cute.arch, "shuffle_sync_bfly", lambda value, offset: value[lanes ^ offset])
    monkeypatch.setattr(cute.arch, "shuffle_sync", lambda value, lane: np.full(LANES, value[lane]))
    return lanes


@pytest.mark.parametrize("count", range(1, 33))
def test_row_sums_reach_their_owners(warp: np.ndarray, count: int) -> None:
    from cute_kernels.device.rows import RowSums

    values = np.random.default_rng(count).integers(0, 1000, (2, count, LANES))
    sums = RowSums(count)
    held = sums.reduce(list(values[0]), list(values[1]), warp)
    assert len(held) == sums.depth
    pairs = [sums.pair(value, warp) for value in held]
    for k in range(2):
        spread = np.array(sums.spread([pair[k] for pair in pairs]))
        np.testing.assert_array_equal(spread, np.repeat(values[k].sum(-1, keepdims=True), LANES, axis=1))
    owned = [(row, lane, place) for place, rows in enumerate(sums.rows_of(warp)) for lane, row in enumerate(rows)]
    assert sorted(row for row, _, _ in owned if row >= 0) == list(range(count))
    assert all(sums.owner(row) == (lane, place) for row, lane, place in owned if row >= 0)


@pytest.mark.parametrize("count", [1, 2, 5, 17])
@pytest.mark.parametrize(
    "magnitudes", [(1.0,), (1.0, 0.0), (0.0, 0.0), (3e-38, 1e30, 0.0, 1.0), (1.0, 1e-3, 5e4, 0.3, 2.0)]
)
def test_sums_in_units_of_the_warps(
    warp: np.ndarray, monkeypatch: pytest.MonkeyPatch, count: int, magnitudes: tuple[float, ...]
) -> None:
    """The first row, of which each warp has squares and products in a unit of its own, comes out in the row's scale."""
    import cutlass.cute as cute

    from cute_kernels.device import mix

    monkeypatch.setattr(mix, "Float32", np.float32)
    monkeypatch.setattr(mix, "inverse", lambda scale: ((254 << 23) - np.float32(scale).view(np.int32)).view(np.float32))
    monkeypatch.setattr(cute.arch, "fmax", np.maximum)
    sums, warps = mix.RowSums(count), len(magnitudes)
    random = np.random.default_rng(warps)
    weights, rows = (random.standard_normal((count, warps, LANES)).astype(np.float32) for _ in range(2))
    rows[0] *= np.array(magnitudes, np.float32)[:, None]
    scales = row_scale(torch.from_numpy(rows[0])).numpy()
    units = np.where(np.abs(rows[0]).max(-1) > 0, scales, np.float32(0))
    scaled = np.concatenate([(rows[0] / scales[:, None])[None], rows[1:]])
    told = [sums.reduce([*(x := scaled[:, w]) ** 2], [*(x * weights[:, w])], warp) for w in range(warps)]

    class Warps:
        lane = warp

        def gather(self, values: list[Any]) -> Any:
            assert len(values) == sums.depth + 1
            return iter([*map(list, zip(*told, strict=True)), [np.full(LANES, unit) for unit in units]])

    totals, scale = mix.sum_in_units(told[0], units[0], Warps())
    expected = row_scale(torch.from_numpy(rows[0].reshape(-1))).numpy()
    np.testing.assert_array_equal(scale, np.full(LANES, expected))
    pairs = [sums.pair(total, warp) for total in totals]
    exact = np.concatenate([(rows[0].astype(np.float64) / expected)[None], rows[1:]])
    for k, of_rows in enumerate((exact**2, exact * weights)):
        found = np.array(sums.spread([pair[k] for pair in pairs]))[:, 0]
        assert (np.abs(found - of_rows.sum((1, 2))) <= 1e-5 * np.abs(of_rows).sum((1, 2))).all()


def test_producer_and_consumers_agree_on_slots() -> None:
    """Slots and parities of every fill and every read, for odd counts, more groups than tokens, tokens longer than the ring."""
    for count in (1, 2, 3, 7, 8, 62):
        for groups, producers in ((1, 1), (2, 4), (3, 4), (7, 1), (6, 4)):
            for slots, per_token in ((16, 9), (3, 1), (4, 34), (5, 5)):
                fills: dict[int, list[tuple[int, int]]] = {group: [] for group in range(groups)}
                for producer in range(producers):
                    done = 0
                    for first in range(0, count, groups):
                        for group in range(producer, groups, producers):
                            if first + group < count:
                                fills[group] += [(first + group, n) for n in range(done, done + per_token)]
                        done += per_token
                for group in range(groups):
                    tokens = range(group, count, groups)
                    reads = [
                        (token, n) for i, token in enumerate(tokens) for n in range(i * per_token, (i + 1) * per_token)
                    ]
                    assert fills[group] == reads, (count, groups, slots)


def representative() -> list:
    return [(op, build, c) for op, build, c in config.representative_configs() if isinstance(c, RowConfig)]


def name(case: tuple) -> str:
    op, _, c = case
    cluster = [f"cluster{c.tile.cluster}"] if isinstance(c.tile, RegisterTile) else ["ring"]
    names = ("delta", "write_block", "mixed", "logits", "weights", "scaled_sum", "stochastic")
    flags = cluster + [flag for flag in names if getattr(c, flag)] + list(c.formats)
    norm = ["norm"] if c.output_weight else []
    return "-".join([op, c.dtype, f"D{c.hidden_size}", f"L{c.num_sources}", *norm, *flags])


@pytest.mark.parametrize("case", representative(), ids=name)
def test_machine_code(case: tuple) -> None:
    from cute_kernels.inspect import inspect_kernel

    op, build, c = case
    found = inspect_kernel(op, build, c)
    assert found.spill_bytes == 0
    assert not re.search(r"\b(LDL|STL)\b", found.sass)
    assert found.registers <= 255
    assert c.shared_bytes <= SHARED_BYTES
    assert "sm_90a" in found.sass
    vectors = c.tile.vectors(c.hidden_size)
    # Rows move 16 bytes at a time in both directions.
    stored = 1 + (c.dtype == "fp32") + 2 * c.mixed + c.delta + c.write_block
    assert len(re.findall(r"STG\.E\.128", found.sass)) == vectors * stored
    assert not re.search(r"(STG|LDG)\.E\.(U16|U8|S16|64)|LDS\.(U16|64)", found.sass)
    assert {"ACQBULK", "PREEXIT"} < set(found.instructions)  # programmatic dependent launch
    if isinstance(c.tile, RegisterTile):
        check_register_code(c, found, vectors)
    else:
        check_ring_code(c, found, vectors)


def check_ring_code(c: RowConfig, found: Inspection, vectors: int) -> None:
    """Bulk copies (a loop over slots) and mbarriers."""
    assert found.instructions["UBLKCP"] == c.tile.rows
    assert found.instructions["SYNCS"] > 0
    assert ("USETMAXREG" in found.instructions) == (c.tile.consumer_registers > 0)
    assert len(re.findall(r"LDS\.128", found.sass)) >= vectors * c.rows_per_token


def check_register_code(c: RowConfig, found: Inspection, vectors: int) -> None:
    """No ring; the rows' loads stand together; a cluster exchanges sums by asynchronous stores."""
    sizes = {"bf16": 1, "fp16": 1, "fp32": 2, None: 0}
    loads = c.rows_per_token + sum(sizes[kind] for kind in (c.query, c.key_weight, c.output_weight))
    assert len(re.findall(r"LDG\.E\.128", found.sass)) == vectors * loads
    assert "CONSTANT" not in found.sass  # a row may be one that the kernel writes
    assert not {"UBLKCP", "USETMAXREG"} & set(found.instructions)
    norm = c.output_weight is not None  # a second exchange, of one number
    sent = -(-c.num_sources // 16) + c.scaled_sum + norm
    assert found.instructions["STAS"] == (sent * c.tile.cluster if c.tile.cluster > 1 else 0)
    assert len(re.findall(r"TRYWAIT", found.sass)) == (1 + norm if c.tile.cluster > 1 else 0)


@pytest.mark.parametrize(("size", "sources"), [(2048, 2), (4096, 4), (4096, 5), (7168, 2)])
def test_all_rows_are_on_their_way_before_a_scaled_sum(size: int, sources: int) -> None:
    from cute_kernels.inspect import inspect_kernel
    from cute_kernels.mix_fwd import build

    bf16, scaled = torch.bfloat16, config.SCALED_FP16
    formats = (scaled, "bf16", *[scaled] * (sources - 1))
    c = row_config("serve_step", bf16, size, sources, bf16, bf16, bf16, delta=True, formats=formats, sum=scaled)
    assert isinstance(c.tile, RegisterTile)
    assert c.tile.resident > 1
    sass = inspect_kernel(c.op, build, c).sass
    first_magnitude = sass.index("FMNMX")
    loads = sum(m.start() < first_magnitude for m in re.finditer(r"LDG\.E\.128", sass))
    assert loads >= c.tile.vectors(size) * (c.rows_per_token + 2)  # query and key weight, too


@pytest.mark.parametrize("c", [c for op, _, c in config.representative_configs() if op == "query_grad"], ids=str)
def test_query_grad_machine_code(c: config.QueryGradConfig) -> None:
    from cute_kernels.inspect import inspect_kernel
    from cute_kernels.query_grad import build

    found = inspect_kernel("query_grad", build, c)
    assert found.spill_bytes == 0
    # 16 bytes at a time; those of 160 partials, one for each SM of an H200 and more, before the first addition.
    loads, first_sum = [m.start() for m in re.finditer(r"LDG\.E\.128", found.sass)], found.sass.index("FADD")
    assert sum(at < first_sum for at in loads) >= 5


def test_processes_compile_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list(itertools.islice(config.representative_configs(), 3))
    monkeypatch.setattr(config, "representative_configs", lambda: iter(chosen))
    found = []
    for processors in ({0}, {0, 1}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, processors=processors: processors)
        found.append(list(compile_all()))
    assert found[0] == found[1]
    assert [(each.op, each.config) for each in found[1]] == [(op, str(c)) for op, _, c in chosen]


def test_limit_of_the_register_model() -> None:
    """The most sources of each register tier that the tile table takes in one piece, with everything optional on."""
    from cute_kernels.inspect import inspect_kernel
    from cute_kernels.mix_fwd import build

    bf16 = torch.bfloat16
    for hidden_size, sources in ((7168, 10), (8192, 9), (4096, 5), (2304, 7), (2048, 18), (1800, 5)):
        c = row_config(
            "mix_fwd",
            bf16,
            hidden_size,
            sources,
            torch.float32,
            bf16,
            bf16,
            mixed=True,
            logits=True,
            rstd=True,
            lse=True,
        )
        c = dataclasses.replace(c, weights=True, tile=ring_tile(hidden_size, sources, output_norm=True))
        assert c.tile.chunk == sources
        assert inspect_kernel("mix_fwd", build, c).spill_bytes == 0, c


@pytest.mark.parametrize(("tokens", "sources"), [(16, 33), (66, 21), (132, 9)])
def test_limit_of_the_register_kernel(tokens: int, sources: int) -> None:
    """The most sources of the widest row that it takes in each class of tokens, with fp32 parameters."""
    from cute_kernels.inspect import inspect_kernel
    from cute_kernels.mix_fwd import build

    dtypes = (torch.bfloat16, MAX_HIDDEN_SIZE, sources, torch.float32, torch.float32, torch.float32)
    c = row_config("serve_step", *dtypes, tokens=tokens, delta=True, write_block=True)
    assert isinstance(c.tile, RegisterTile)
    more = row_tile(MAX_HIDDEN_SIZE, sources + 1, tokens, delta=True, output_norm=True)
    assert sources == MAX_SOURCES + 1 or not isinstance(more, RegisterTile)
    assert inspect_kernel("serve_step", build, c).spill_bytes == 0, c
    saved = {"mixed": True, "logits": True, "rstd": True, "lse": True, "weights": True}
    c = row_config("mix_fwd", *dtypes, tokens=tokens, **saved)
    assert inspect_kernel("mix_fwd", build, c).spill_bytes == 0, c


def test_launchers_import_without_the_dsl() -> None:
    import subprocess
    import sys

    code = (
        "import sys, cute_kernels.mix_fwd, cute_kernels.serve_step, cute_kernels.phase2_fwd, cute_kernels.query_grad;"
        "import cute_kernels.phase2_bwd;"
        "assert not any(m.startswith('cutlass') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_softmax_in_chunks(warp: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The online softmax against float64, in one chunk and in several, with logits far from zero."""
    import cutlass.cute as cute

    from cute_kernels.device import mix, rows

    single = np.float32
    monkeypatch.setattr(rows, "Float32", single)
    monkeypatch.setattr(cute.arch, "fmax", np.maximum)
    monkeypatch.setattr(cute.arch, "rcp_approx", lambda x: single(1) / x)
    monkeypatch.setattr(cute.math, "exp2", lambda x, fastmath: np.exp2(x))
    monkeypatch.setattr(cute.math, "log2", lambda x, fastmath: np.log2(x))
    rng = np.random.default_rng(0)
    for offset in (0.0, 100.0, -100.0):
        logits = (rng.standard_normal(17) * 3 + offset).astype(single)
        exact = np.exp(logits.astype(float) - logits.max())
        exact /= exact.sum()
        lse = math.log(np.exp(logits.astype(float) - logits.max()).sum()) + logits.max()
        for size in (17, 9, 1):
            softmax = mix.OnlineSoftmax()
            shares = np.zeros(0)
            for first in range(0, 17, size):
                rescale, new = softmax.join(list(logits[first : first + size]))
                shares = np.concatenate([shares * (1.0 if rescale is None else rescale), new])
            np.testing.assert_allclose(shares * softmax.inverse(), exact, rtol=2e-6)
            np.testing.assert_allclose([softmax.weight(logit) for logit in logits], exact, rtol=2e-6)
            assert softmax.lse() == pytest.approx(lse, rel=2e-6)
