"""The disk cache of compiled CuTe kernels: what is kept, who may read it, and that another process needs no compiler."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_kernels import compile, mix_fwd
from cute_kernels.config_rows import RowConfig, row_config

FLAGS = {"tokens": 1 << 31, "mixed": False, "logits": False, "rstd": False, "lse": False, "weights": False}


def small_config() -> RowConfig:
    return row_config("mix_fwd", torch.bfloat16, 72, 2, torch.bfloat16, None, None, **FLAGS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Builds:
    """Counts how often a kernel is compiled."""

    def __init__(self) -> None:
        self.count = 0
        self.__module__, self.__qualname__ = "tests", "Builds"

    def __call__(self, config: RowConfig) -> Any:
        self.count += 1
        return mix_fwd.build.__wrapped__(config)


def test_a_library_is_kept_for_the_user_alone(folder: Path) -> None:
    builds = Builds()
    for _ in range(2):
        assert callable(compile._from_disk_or_build(builds, small_config()))
        assert builds.count == 1
    (kept,) = folder.rglob("*.so")
    assert kept.parent.name == compile.source_digest()[:16]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not [path for path in kept.parent.iterdir() if path.is_dir()]  # no scratch is left


def test_a_damaged_library_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = Builds()
    with monkeypatch.context() as patch:
        patch.setattr(compile, "_load", lambda library: library)  # a library that is open once stays so in its process
        kept = compile._from_disk_or_build(builds, small_config())
    kept.write_bytes(b"not a library")
    assert callable(compile._from_disk_or_build(builds, small_config()))
    assert builds.count == 2
    assert kept.stat().st_size > 1000


def test_another_process_loads_it_without_the_dsl_or_a_lock(folder: Path) -> None:
    compile._from_disk_or_build(mix_fwd.build.__wrapped__, small_config())
    program = (
        "import sys, torch; from cute_kernels import mix_fwd\n"
        f"kernel = mix_fwd.kernel_for('mix_fwd', torch.bfloat16, 72, 2, torch.bfloat16, None, None, **{FLAGS})\n"
        "print(callable(kernel), 'cutlass' in sys.modules, 'filelock' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def test_without_a_linker_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    builds = Builds()
    assert callable(compile._from_disk_or_build(builds, small_config()))
    assert builds.count == 1
    assert not list(folder.rglob("*.so"))


def test_the_key_is_the_whole_configuration(folder: Path) -> None:
    builds = Builds()
    compile._from_disk_or_build(builds, small_config())
    other = row_config("mix_fwd", torch.bfloat16, 72, 2, torch.bfloat16, None, None, **{**FLAGS, "lse": True})
    compile._from_disk_or_build(builds, other)
    assert builds.count == 2
    assert len(list(folder.rglob("*.so"))) == 2
