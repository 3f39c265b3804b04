"""The CuTe kernel of mix_bwd without a GPU: limits, tiles, machine code for sm_90a."""

import re

import pytest
import torch

from cute_kernels import config
from cute_kernels.config import MAX_HIDDEN_SIZE, MAX_SLOTS, SHARED_BYTES, refusal
from cute_kernels.config_mix_bwd import MixBwdConfig, mix_bwd_config, mix_bwd_tile

pytest.importorskip("cutlass")
LANES = 32
BF16, FP32 = torch.bfloat16, torch.float32
CALL = {"op": "mix_bwd", "dtype": BF16, "hidden_size": 7168, "num_sources": 9, "num_queries": 1, "byte_alignment": 16}


@pytest.mark.parametrize(
    ("hidden_size", "num_sources"), [(8, 32), (2048, 32), (2304, 17), (4096, 32), (7168, 17), (8192, 17)]
)
def test_accepts(hidden_size: int, num_sources: int) -> None:
    assert refusal(**CALL | {"hidden_size": hidden_size, "num_sources": num_sources}) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_sources": 32}, "32 sources and d_out of 14336 bytes a row do not fit into shared memory together"),
        ({"num_sources": 33}, "33 sources: mix_bwd takes 1 to 32"),
        ({"hidden_size": 8200}, "at most 8192"),
        ({"dtype": FP32}, "dtype float32 is not supported by mix_bwd"),
        ({"byte_alignment": 8}, "multiple of 16 bytes, not of 8"),
    ],
)
def test_refuses_with_the_reason(changed: dict, said: str) -> None:
    reason = refusal(**CALL | changed)
    assert reason is not None
    assert said in reason


def check_config(hidden_size: int, num_sources: int, norm: bool) -> None:
    c = mix_bwd_config(BF16, hidden_size, num_sources, FP32, FP32, FP32 if norm else None)
    tile = c.tile
    assert c.shared_bytes <= SHARED_BYTES, c
    assert c.columns * c.cluster == hidden_size, c
    assert c.columns % config.VECTOR == 0, c
    assert c.pitch >= c.columns, c
    # All rows of a token are in the ring at once, or nobody could go on; a producer warp's lanes initialise a slot each.
    assert c.slots_per_token <= tile.slots <= MAX_SLOTS, c
    # The groups' sums, two rows of 4-byte numbers, pass through their rings.
    assert tile.slots * tile.rows >= 2, c
    assert tile.threads <= 1024, c
    assert tile.groups + 2 <= 16, c  # named barriers
    if tile.consumer_registers:
        assert tile.consumer_warps % 4 == 0, c
        registers = tile.consumer_warps * tile.consumer_registers + tile.producer_warps * config.PRODUCER_REGISTERS
        launched = config.REGISTER_FILE // tile.threads // 8 * 8 * tile.threads
        assert registers * LANES <= launched, c
    assert [source for part in c.parts for source in part] == list(range(num_sources)), c
    assert max(map(len, c.parts)) <= 16, c


@pytest.mark.parametrize("num_sources", [1, 2, 5, 9, 16, 17, 24, 32])
def test_every_tile_fits(num_sources: int) -> None:
    taken = 0
    for hidden_size in range(8, MAX_HIDDEN_SIZE + 1, 8):
        if refusal(**CALL | {"hidden_size": hidden_size, "num_sources": num_sources}) is None:
            taken += 1
            for norm in (False, True):
                check_config(hidden_size, num_sources, norm)
    assert taken > 500


def representative() -> list[MixBwdConfig]:
    return [c for op, _, c in config.representative_configs() if op == "mix_bwd"]


@pytest.mark.parametrize(
    "c", representative(), ids=lambda c: f"{c.dtype}-D{c.hidden_size}-L{c.num_sources}-{c.output_weight}"
)
def test_machine_code(c: MixBwdConfig) -> None:
    from cute_kernels.inspect import inspect_kernel
    from cute_kernels.mix_bwd import build

    found = inspect_kernel("mix_bwd", build, c)
    assert found.spill_bytes == 0
    assert not re.search(r"\b(LDL|STL)\b", found.sass)
    assert c.shared_bytes <= SHARED_BYTES
    # Bulk copies (a loop over slots), mbarriers, and rows moved 16 bytes at a time in both directions.
    assert found.instructions["UBLKCP"] == c.tile.rows
    assert found.instructions["SYNCS"] > 0
    assert ("USETMAXREG" in found.instructions) == (c.tile.consumer_registers > 0)
    vectors = c.tile.vectors(c.columns)
    norm = c.output_weight is not None
    # A gradient for each source; the sums of the query and of the output weight are fp32, two stores a vector.
    assert len(re.findall(r"STG\.E\.128", found.sass)) == vectors * (c.num_sources + 2 + 2 * norm)
    assert len(re.findall(r"LDS\.128", found.sass)) >= vectors * (c.num_sources * (3 if norm else 2) + 1)
    assert not re.search(r"(STG|LDG)\.E\.(U16|U8|S16|64)|LDS\.(U16|64)", found.sass)
    # Clusters exchange sums through each other's shared memory.
    assert ("UCGABAR" in found.sass) == (c.cluster > 1)


def test_as_few_ctas_as_fit() -> None:
    for hidden_size, num_sources, cluster in ((7168, 9, 1), (7168, 17, 2), (4096, 9, 1), (2048, 32, 1)):
        choice = mix_bwd_tile(hidden_size, num_sources, False)
        assert choice is not None
        assert choice[1] == cluster


def test_launcher_imports_without_the_dsl() -> None:
    import subprocess
    import sys

    code = "import sys, cute_kernels.mix_bwd; assert not any(m.startswith('cutlass') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
