"""What the compiler made of a kernel, read from its machine code on any machine: registers, spills, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cute_kernels import compile as compiler
from cute_kernels.processes import in_processes, processors


@dataclass(frozen=True)
class Inspection:
    op: str
    config: str
    registers: int  # per thread
    spill_bytes: int  # stack bytes per thread: what did not fit the register file
    shared_bytes: int  # per thread block
    instructions: Counter[str]  # SASS mnemonic without modifiers (UBLKCP, SYNCS, HMMA, ...) -> static count
    sass: str


def inspect_kernel(op: str, build: Callable[[Any], Any], config: Any) -> Inspection:
    """Compiles `build(config)` afresh, past every cache, and reads its machine code."""
    with tempfile.TemporaryDirectory() as folder, compiler.keep_cubin(folder):
        getattr(build, "__wrapped__", build)(config)
        (cubin,) = Path(folder).glob("*.cubin")
        usage = _cuobjdump("--dump-resource-usage", cubin)
        sass = _cuobjdump("--dump-sass", cubin)
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    mnemonics = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, flags=re.MULTILINE)
    return Inspection(op, str(config), registers, stack, config.shared_bytes, Counter(mnemonics), sass)


def compile_all() -> Iterator[Inspection]:
    """One inspection for each kernel configuration that real shapes choose, in the order of config.representative_configs.

    As many processes as there are processors compile them; a script that calls this guards its `__main__`.
    """
    from cute_kernels import config

    workers = min(processors(), 8)  # of half a GB each
    yield from in_processes(workers, inspect_kernel, *zip(*config.representative_configs(), strict=True))


def _cuobjdump(flag: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), flag, str(cubin)], capture_output=True, text=True, check=True).stdout
