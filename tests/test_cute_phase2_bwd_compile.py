"""The kernel of phase 2's backward without a GPU: its tiles, and its machine code for sm_90a."""

import re

import pytest
import torch

pytest.importorskip("cutlass")

from cute_kernels.config import MAX_HIDDEN_SIZE, SHARED_BYTES
from cute_kernels.config_phase2_bwd import Phase2BwdConfig, phase2_bwd_config, phase2_bwd_configs
from cute_kernels.inspect import inspect_kernel

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("new_partial", [False, True])
@pytest.mark.parametrize("output_weight", [None, FP32])
def test_every_tile_fits(output_weight: torch.dtype | None, new_partial: bool) -> None:
    for hidden_size in range(8, MAX_HIDDEN_SIZE + 1, 8):
        config = phase2_bwd_config(BF16, hidden_size, BF16, None, output_weight, new_partial=new_partial)
        assert config.shared_bytes <= SHARED_BYTES, config
        assert config.hidden_size <= config.pitch < hidden_size + 8 * 32 * config.warps, config
        assert config.stages >= 2, config
        # 16 named barriers, of which the groups use 2 and up
        assert config.warps == 1 or config.groups <= 14, config
        # The groups' sums of the end take the place of the tokens' rows.
        assert config.stages * config.rows * 2 >= 4, config


def name(case: tuple) -> str:
    config: Phase2BwdConfig = case[2]
    flags = ["norm"] * bool(config.output_weight) + ["add"] * config.new_partial
    return "-".join([config.dtype, config.query, f"D{config.hidden_size}", *flags])


@pytest.mark.parametrize("case", list(phase2_bwd_configs()), ids=name)
def test_machine_code(case: tuple) -> None:
    op, build, config = case
    found = inspect_kernel(op, build, config)
    assert found.spill_bytes == 0
    assert not re.search(r"\b(LDL|STL)\b", found.sass)
    assert found.registers * config.threads <= 65536
    # Each thread copies its own vectors, once ahead of the loop for every stage but one, and once in it.
    assert len(re.findall(r"LDGSTS\S*\.128", found.sass)) == config.rows * config.vectors * config.stages
    # Two gradients, and the rows of partial sums in a loop.
    assert len(re.findall(r"STG\.E\.128", found.sass)) == 2 * config.vectors + 1 + bool(config.output_weight)
    assert not re.search(r"(STG|LDG)\.E\.(U16|U8|S16|64)|(LDS|STS)\.(U16|U8|64)", found.sass)
