"""Independent work in several processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(count: int, function: Callable[..., Result], *arguments: Iterable[object]) -> Iterator[Result]:
    """`map`, in as many fresh processes; of one, in this. A script that calls this with more guards its `__main__`."""
    if count <= 1:
        yield from map(function, *arguments)
        return
    # Ctrl-C reaches every process: the workers end at once and silently, the caller raises KeyboardInterrupt.
    initializer = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    with ProcessPoolExecutor(count, get_context("spawn"), **initializer) as pool:
        yield from pool.map(function, *arguments)
