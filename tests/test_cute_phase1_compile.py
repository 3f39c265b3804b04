"""The phase 1 kernels' machine code, and their choice of tiles, on a machine without a GPU."""

import itertools
import re

import pytest
import torch

pytest.importorskip("cutlass")

from cute_kernels.config_phase1 import Phase1Config, phase1_config, phase1_configs, phase1_refusal
from cute_kernels.config_phase1_bwd import (
    GRADIENT_REGISTERS,
    MAX_COLUMNS,
    phase1_bwd_config,
    phase1_bwd_configs,
    phase1_bwd_refusal,
)
from cute_kernels.inspect import inspect_kernel

SHARED_LIMIT = 227 * 1024


def name(case: tuple) -> str:
    config = case[2]
    weight = f"x{config.key_weight}" if config.key_weight else ""
    scaled = "-scaled" if isinstance(config, Phase1Config) and config.scaled_sources else ""
    scaled += "-stochastic" if getattr(config, "stochastic", False) else ""
    sizes = f"D{config.hidden_size}-N{config.num_sources}-S{config.num_queries}"
    return f"{sizes}-{config.dtype}{scaled}-{config.query}{weight}"


@pytest.mark.parametrize("case", list(phase1_configs()), ids=name)
def test_machine_code(case):
    op, build, config = case
    inspection = inspect_kernel(op, build, config)
    assert inspection.spill_bytes == 0
    assert inspection.shared_bytes <= SHARED_LIMIT
    for mnemonic in ("HMMA", "LDSM", "UBLKCP", "SYNCS"):
        assert inspection.instructions[mnemonic], f"no {mnemonic}"
    # Partial sums cross a cluster by st.async, and only there
    assert bool(inspection.instructions["STAS"]) == (config.tile.cluster > 1)
    assert bool(inspection.instructions["USETMAXREG"]) == (config.producer_warps > 1)
    # Rows and staged results move 16 bytes at a time; the row statistics are the only stores past the staging buffers
    assert "LDS.128" in inspection.sass
    assert "STS.128" in inspection.sass
    assert not re.search(r"\b(LDS|STS|LDG|STG)\.[A-Z.]*[US]?(8|16)\b", inspection.sass)


def choose(hidden_size: int, num_sources: int, num_queries: int, query: str, scaled: bool = False) -> Phase1Config:
    return phase1_config(
        dtype="fp16" if scaled else "bf16",
        query=query,
        key_weight=None,
        hidden_size=hidden_size,
        num_sources=num_sources,
        num_queries=num_queries,
        out="fp16_scaled" if scaled else None,
        scaled_sources=scaled,
    )


def test_every_shape_gets_a_tile_that_fits():
    # A tile depends on the hidden size in blocks of 64, on sources and queries in octets (and on N up to 4 exactly).
    sizes = [8, 72, *range(64, 8193, 64), 4104, 8184]
    sources = [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 32]
    for *given, scaled in itertools.product(sizes, sources, [1, 9, 24, 32], ["bf16", "fp32"], [False, True]):
        config = choose(*given, scaled)
        hidden_size = config.hidden_size
        shape, tile = config.shape, config.tile
        assert config.shared_bytes <= SHARED_LIMIT
        assert config.threads <= 384
        # Two items at least, so that logits of one are made before the mix of the last (and no slot's parity is
        # ambiguous)
        assert tile.slots >= 2 * shape.slots_per_item(tile)
        assert hidden_size <= tile.cluster * shape.cta_columns(tile)
        # No slot holds a part of an item that leaves stale rows or columns of another part
        assert not shape.fixed_places(tile) or tile.slots % shape.slots_per_item(tile) == 0
        # No warp's share of the totals is empty: the exchange's buffers rely on it
        assert shape.partial_bytes // 16 >= tile.warps


@pytest.mark.parametrize("count", [1, 8, 16, 17, 24, 32])
def test_sources_are_read_once_with_queries_of_the_storage_dtype(count):
    for hidden_size, num_sources in itertools.product([64, 2048, 2304, 4096, 7168, 8192], [1, 4, 8, 16]):
        assert choose(hidden_size, num_sources, count, "bf16").num_queries == count


def test_refusals_say_what_is_allowed():
    fine = {
        "dtype": torch.bfloat16,
        "hidden_size": 2048,
        "num_sources": 8,
        "num_queries": 16,
        "byte_alignment": 16,
    }
    assert phase1_refusal(**fine) is None
    for change, reason in (
        ({"dtype": torch.float32}, "use bfloat16 or float16"),
        ({"hidden_size": 12}, "multiple of 8"),
        ({"hidden_size": 8200}, "at most 8192"),
        ({"num_sources": 33}, "takes 1 to 32"),
        ({"num_queries": 33}, "takes 1 to 32"),
        ({"byte_alignment": 8}, "multiple of 16 bytes"),
    ):
        assert reason in (phase1_refusal(**{**fine, **change}) or "")


@pytest.mark.parametrize("case", list(phase1_bwd_configs()), ids=name)
def test_machine_code_of_the_backward(case):
    op, build, config = case
    inspection = inspect_kernel(op, build, config)
    assert inspection.spill_bytes == 0
    assert inspection.shared_bytes <= SHARED_LIMIT
    # Products, fragments and their transposes, bulk copies both ways, mbarriers
    for mnemonic in ("HMMA", "LDSM", "MOVM", "UBLKCP", "SYNCS"):
        assert inspection.instructions[mnemonic], f"no {mnemonic}"
    assert ".MT88." in inspection.sass
    assert bool(inspection.instructions["STAS"]) == (config.tile.cluster > 1)
    assert bool(inspection.instructions["USETMAXREG"]) == config.tile.moves_registers
    assert not re.search(r"\b(LDS|STS|LDG|STG)\.[A-Z.]*[US]?(8|16)\b", inspection.sass)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_backward_that_is_not_refused_has_a_tile(dtype):
    sizes = [8, 72, *range(64, 8193, 64), 4104, 8184]
    storage = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for hidden_size, num_sources, num_queries in itertools.product(sizes, [1, 3, 8], [1, 8, 9, 16, 24, 32]):
        shape = {"hidden_size": hidden_size, "num_sources": num_sources, "num_queries": num_queries}
        if phase1_bwd_refusal(dtype=storage, byte_alignment=16, **shape):
            # du of so many queries exceeds the registers of a cluster of 8
            assert num_queries > 16
            assert hidden_size > 5120
            continue
        for options in itertools.product(["bf16", "fp32"], [None, "fp32"], [False, True], [False, True]):
            given = dict(zip(("query", "key_weight", "accumulate", "stochastic"), options, strict=True))
            config = phase1_bwd_config(dtype=dtype, **given, **shape)
            tile = config.tile
            assert config.shared_bytes <= SHARED_LIMIT
            assert config.threads <= 384
            assert hidden_size <= tile.cluster * tile.cta_columns
            assert config.gradient_registers <= GRADIENT_REGISTERS
            assert tile.columns <= MAX_COLUMNS
            # The products of one item are made before the mix of the last
            assert min(tile.source_slots, tile.output_slots) >= 2


def test_refusals_of_the_backward_say_what_is_allowed():
    fine = {"dtype": torch.bfloat16, "hidden_size": 7168, "num_sources": 8, "num_queries": 24, "byte_alignment": 16}
    assert phase1_bwd_refusal(**fine) is None
    for change, reason in (
        ({"dtype": torch.float32}, "use bfloat16 or float16"),
        ({"hidden_size": 12}, "multiple of 8"),
        ({"hidden_size": 8200}, "at most 8192"),
        ({"num_sources": 9}, "takes 1 to 8"),
        ({"num_queries": 33}, "takes 1 to 32"),
        ({"num_queries": 32}, "do not fit in a cluster"),
        ({"byte_alignment": 8}, "multiple of 16 bytes"),
    ):
        assert reason in (phase1_bwd_refusal(**{**fine, **change}) or "")
