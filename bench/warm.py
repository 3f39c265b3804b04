"""First calls of what is to be timed, side by side, each in a process that can be stopped.

They fill the compilers' disk caches, and they tell which provider must not be called in the process that times: some kernels of the
peers compile for many minutes, and neither a compiler nor a backward (autograd runs it in a thread of its own, for which the main
thread waits without looking at signals) can be interrupted there. Autotuning is not shared: the timed run does it again, alone on
the device.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError
from multiprocessing import get_context
from typing import Any

import torch
from pebble import ProcessExpired, ProcessPool
from rich.console import Console

from bench import autotune

MOST_PROCESSES = 10

Job = tuple[str, str]  # names of a case and a provider
FirstCall = Callable[[str, str], Any]


def first_calls(call: FirstCall, jobs: Sequence[Job], seconds: float, memory: int, console: Console) -> dict[Job, str]:
    """Makes the first call of every job, in as many processes as device memory and cores allow.

    call: of this module's importers at top level, since it is sent to other processes.
    seconds: that one call may take. memory: bytes of the device that it may need.
    Returns the jobs that were stopped, with what the timed run is to report of them.
    """
    if not jobs:
        return {}
    cores = os.cpu_count() or 2
    room = torch.cuda.get_device_properties(0).total_memory // memory
    processes = max(1, min(MOST_PROCESSES, cores - 2, room, len(jobs)))
    threads = max(2, cores // processes)
    pool = ProcessPool(processes, initializer=_prepare, initargs=(threads,), context=get_context("spawn"))
    ended = Counter[str]()
    stopped = {}
    begun = time.monotonic()
    try:
        futures = {job: pool.schedule(_make, args=(call, job), timeout=seconds) for job in jobs}
        with console.status(f"{len(jobs)} first calls in {processes} processes"):
            for job, future in futures.items():
                try:
                    ended[future.result()] += 1
                except TimeoutError:
                    ended[f"stopped after {seconds:.0f} s"] += 1
                    stopped[job] = f"failed: no first call in {seconds:.0f} s"
                except ProcessExpired as error:
                    ended[f"{type(error).__name__} {error.exitcode}"] += 1
    finally:
        pool.stop()
        pool.join()
    # of what failed only the count is told here: the timed run makes the call again, and reports it
    told = ", ".join(f"{count} {how}" for how, count in ended.most_common())
    console.print(f"{len(jobs)} first calls in {time.monotonic() - begun:.0f} s, {processes} processes: {told}")
    return stopped


def _prepare(threads: int) -> None:
    """In each process: one that is stopped takes the compilers it has started with it."""
    os.setpgid(0, 0)
    received, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(wakeup)  # the handler waits for the main thread to come back to Python, this does not
    threading.Thread(target=_end, args=(received,), daemon=True).start()
    autotune.speed_up(threads)


def _end(received: int) -> None:
    os.read(received, 1)
    os.killpg(0, signal.SIGKILL)


def _make(call: FirstCall, job: Job) -> str:
    """How it went, in a word."""
    try:
        call(*job)
        return "made"
    except Exception as error:
        return type(error).__name__
    finally:
        torch.cuda.empty_cache()
