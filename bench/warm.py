"""Compiles ahead, in parallel processes, what the timed run will need: the compilers' disk caches make its first calls short.

Autotuning is not shared: the timed run does it again, alone on the device.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from bench.ops import CASES, Case, make_inputs
from bench.providers import PROVIDERS, Provider, Unsupported
from bench.timing import OutOfTime, limit

MOST_PROCESSES = 10
MEMORY_PER_PROCESS = 12 * 2**30
ONE_CALL_SECONDS = 60.0


def warm(jobs: list[tuple[Case, Provider]], seconds: float) -> str:
    """Runs the first call of every kind of job in other processes; returns one line on what was done."""
    kinds = {_kind(case, provider): (case.name, provider.name) for case, provider in reversed(jobs)}
    memory = torch.cuda.get_device_properties(0).total_memory
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2, memory // MEMORY_PER_PROCESS))
    begun = time.monotonic()
    executor = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    futures: list[Future[Any]] = [executor.submit(_first_call, *names) for names in reversed(kinds.values())]
    done, late = wait(futures, timeout=seconds)
    workers = list((executor._processes or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for worker in workers:  # those still compiling: their time is up
        worker.terminate()
    for worker in workers:
        worker.join(5)
    return f"compiled ahead: {len(done)} of {len(done) + len(late)} in {time.monotonic() - begun:.0f} s, {processes} processes"


def _kind(case: Case, provider: Provider) -> tuple[Any, ...]:
    """Jobs of one kind compile the same kernels; ours may choose another for each shape."""
    if provider.ours:
        return (provider.name, case.name)
    s = case.shape
    depth = s.sources if case.op == "phase1" or provider.headline_only else max(8, 1 << (s.sources - 1).bit_length())
    tokens = s.tokens if case.op == "phase1" else 0
    return (provider.name, case.backward, s.hidden_size, depth, s.queries, s.output_norm, tokens)


def _first_call(case_name: str, provider_name: str) -> None:
    case = next(case for case in CASES if case.name == case_name)
    provider = PROVIDERS[provider_name]
    # errors are the timed run's to report
    with contextlib.suppress(Unsupported, Exception, OutOfTime), limit(ONE_CALL_SECONDS):
        provider.binding(case)  # before inputs are made
        provider.bind(case, make_inputs(case, "cuda"))()
        torch.cuda.synchronize()
    torch.cuda.empty_cache()
