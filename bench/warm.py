"""Fills the compilers' disk caches for the timed runs, in parallel processes: `python -m bench.warm`. Needs a GPU.

Optional: the timed runs compile what is missing. Autotuning is not shared: each timed run does it again, alone on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from bench import autotune, network
from bench.ops import CASES, Case, make_inputs
from bench.providers import PROVIDERS, Provider, Unsupported
from bench.timing import OutOfTime, limit

MOST_PROCESSES = 10
MEMORY_PER_PROCESS = {"run": 12 * 2**30, "network": 32 * 2**30}
ONE_CALL_SECONDS = 150.0

Job = tuple[str, str]  # names of a case and a provider


def suite_jobs() -> list[Job]:
    """One of every kind that compiles the same kernels, those that take longest first; torch.compile has processes of its own."""
    chosen = [(case, p) for case in CASES for p in PROVIDERS.values() if p.wants(case) and p.name != "torch.compile"]
    kinds = {_kind(case, provider): (case.name, provider.name) for case, provider in reversed(chosen)}
    return sorted(kinds.values(), key=lambda job: PROVIDERS[job[1]].ours)


def network_jobs() -> list[Job]:
    """The backward of a network runs its forward."""
    cases = [case for case in network.CASES if case.backward or case.serving]
    providers = [(case, network.SERVING if case.serving else network.NETWORKS) for case in cases]
    jobs = [(case.name, name) for case, table in providers for name in table]
    return sorted(jobs, key=lambda job: PROVIDERS[job[1].split(",")[0]].ours)


def _kind(case: Case, provider: Provider) -> tuple[Any, ...]:
    """Jobs of one kind compile the same kernels; ours may choose another for each shape."""
    if provider.ours:
        return (provider.name, case.name)
    s = case.shape
    depth = s.sources if case.op == "phase1" or provider.headline_only else max(8, 1 << (s.sources - 1).bit_length())
    tokens = s.tokens if case.op == "phase1" else 0
    return (provider.name, case.backward, s.hidden_size, depth, s.queries, s.output_norm, tokens)


def first_suite_call(case_name: str, provider_name: str) -> None:
    case = next(case for case in CASES if case.name == case_name)
    provider = PROVIDERS[provider_name]
    provider.binding(case)  # raises before inputs are made
    provider.bind(case, make_inputs(case, "cuda"))()


def first_network_call(case_name: str, provider_name: str) -> None:
    case = next(case for case in network.CASES if case.name == case_name)
    network.bind(case, provider_name, network.make(case, "cuda"))()


def _run(call: Callable[[str, str], None], job: Job, threads: int) -> None:
    autotune.speed_up(threads)
    # errors are the timed run's to report
    with contextlib.suppress(Unsupported, Exception, OutOfTime), limit(ONE_CALL_SECONDS):
        call(*job)
        torch.cuda.synchronize()
    torch.cuda.empty_cache()


SUITES: dict[str, tuple[Callable[[], list[Job]], Callable[[str, str], None]]] = {
    "run": (suite_jobs, first_suite_call),
    "network": (network_jobs, first_network_call),
}


def warm(suite: str, seconds: float) -> str:
    """Runs the first call of every kind of job in other processes; returns one line on what was done."""
    jobs, call = SUITES[suite]
    cores = os.cpu_count() or 2
    memory = torch.cuda.get_device_properties(0).total_memory
    processes = max(1, min(MOST_PROCESSES, cores - 2, memory // MEMORY_PER_PROCESS[suite]))
    begun = time.monotonic()
    executor = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    threads = max(2, cores // processes)
    futures: list[Future[Any]] = [executor.submit(_run, call, job, threads) for job in jobs()]
    done, late = wait(futures, timeout=seconds)
    workers = list((executor._processes or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for worker in workers:  # those still compiling: their time is up
        worker.terminate()
    for worker in workers:
        worker.join(5)
    took = time.monotonic() - begun
    return f"bench.{suite}: compiled {len(done)} of {len(done) + len(late)} first calls in {took:.0f} s, {processes} processes"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=__doc__)
    parser.add_argument(
        "suites", nargs="*", default=list(SUITES), help=f"for which: {', '.join(SUITES)} (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=200.0, help="limit for each (default: 200)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        raise SystemExit(f"unknown suite {', '.join(unknown)}; known are {', '.join(SUITES)}")
    if not torch.cuda.is_available():
        print("the benchmarks need a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    for name in options.suites:
        print(warm(name, options.seconds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
