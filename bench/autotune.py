"""Triton's autotuner, as the peers have it, in less time: same configurations, same choice by the median, fewer repetitions.

A kernel's configurations are compiled side by side, and each is timed for 25 ms instead of 125: a peer's first call on one case
took 20 to 40 s on an H200, most of it compiling one configuration after the other.
"""

from __future__ import annotations

import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

WARMUP_MS, REPETITIONS_MS = 5, 20


def speed_up(threads: int | None = None) -> None:
    """For the rest of this process; threads: that compile (default: one a processor, at most 16)."""
    from triton import testing
    from triton.runtime.autotuner import Autotuner

    if isinstance(testing.do_bench, functools.partial):
        return
    testing.do_bench = functools.partial(testing.do_bench, warmup=WARMUP_MS, rep=REPETITIONS_MS)
    pool = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1))
    prune = Autotuner.prune_configs

    def prune_and_compile(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        given = {**self.nargs, **kwargs, "warmup": True}
        list(pool.map(lambda config: _compile(self.fn, {**given, **config.all_kwargs()}), configs))
        return configs

    Autotuner.prune_configs = prune_and_compile


def _compile(kernel: Any, arguments: dict[str, Any]) -> None:
    # what cannot be compiled is the autotuner's to find out, which then leaves the configuration out
    with contextlib.suppress(Exception):
        kernel.run(**arguments)
