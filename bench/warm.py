"""Fills the compilers' disk caches for the timed runs, in parallel processes: `python -m bench.warm`. Needs a GPU.

Optional: the timed runs compile what is missing. Autotuning is not shared: each timed run does it again, alone on the device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from bench import autotune, network, results
from bench.ops import CASES, Case, make_inputs
from bench.providers import PROVIDERS, Provider, Unsupported
from bench.timing import OutOfTime, limit

MOST_PROCESSES = 10
MEMORY_PER_PROCESS = {"run": 12 * 2**30, "network": 32 * 2**30}
ONE_CALL_SECONDS = 150.0

Job = tuple[str, str]  # names of a case and a provider


def suite_jobs(cases: Sequence[Case] = CASES) -> list[Job]:
    """One of every kind that compiles the same kernels, those that take longest first; torch.compile has processes of its own."""
    chosen = [(case, p) for case in cases for p in PROVIDERS.values() if p.wants(case) and p.name != "torch.compile"]
    kinds = {_kind(case, provider): (case.name, provider.name) for case, provider in reversed(chosen)}
    return sorted(kinds.values(), key=lambda job: PROVIDERS[job[1]].ours)


def network_jobs(cases: Sequence[network.NetworkCase] = network.CASES) -> list[Job]:
    """The backward of a network runs its forward."""
    chosen = [case for case in cases if case.backward or case.serving]
    providers = [(case, network.SERVING if case.serving else network.NETWORKS) for case in chosen]
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


def _run(call: Callable[[str, str], None], job: Job, threads: int) -> str:
    """Makes the call; what went wrong is the timed run's to report, here its kind is counted."""
    autotune.speed_up(threads)
    try:
        with limit(ONE_CALL_SECONDS):
            call(*job)
            torch.cuda.synchronize()
        return ""
    except (Exception, OutOfTime) as error:
        return "" if isinstance(error, Unsupported) else type(error).__name__
    finally:
        torch.cuda.empty_cache()


CALLS: dict[str, Callable[[str, str], None]] = {"run": first_suite_call, "network": first_network_call}


def jobs_left(suite: str, out: Path | None) -> list[Job]:
    """Those of a run that starts anew, or that goes on with the results in `out`."""
    data: results.Results = {"cases": []}
    if out is not None:
        device = torch.device("cuda", torch.cuda.current_device())
        path = results.path_in(out, torch.cuda.get_device_name(), "bench" if suite == "run" else "network")
        data = results.resumed(path, results.metadata(device)) or data
    if suite == "network":
        return network_jobs(network.left(data))
    return suite_jobs(results.left(data, CASES))


def warm(suite: str, seconds: float, out: Path | None = None) -> str:
    """Runs the first call of every kind of job in other processes; returns one line on what was done."""
    jobs, call = jobs_left(suite, out), CALLS[suite]
    cores = os.cpu_count() or 2
    memory = torch.cuda.get_device_properties(0).total_memory
    processes = max(1, min(MOST_PROCESSES, cores - 2, memory // MEMORY_PER_PROCESS[suite]))
    begun = time.monotonic()
    executor = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    threads = max(2, cores // processes)
    futures: list[Future[Any]] = [executor.submit(_run, call, job, threads) for job in jobs]
    done, late = wait(futures, timeout=seconds)
    workers = list((executor._processes or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for worker in workers:  # those still compiling: their time is up
        worker.terminate()
    for worker in workers:
        worker.join(5)
    took = time.monotonic() - begun
    failed = Counter(reason for reason in (future.result() for future in done) if reason)
    told = "".join(f", {count} {reason}" for reason, count in failed.items())
    made = len(done) - failed.total()
    return f"bench.{suite}: made {made} of {len(jobs)} first calls in {took:.0f} s, {processes} processes; {len(late)} late{told}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(CALLS), help=f"for which: {', '.join(CALLS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=200.0, help="limit for each (default: 200)")
    parser.add_argument(
        "--resume", type=Path, metavar="OUT", help="only for cases that the results in this folder lack"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.suites if name not in CALLS]
    if unknown:
        raise SystemExit(f"unknown suite {', '.join(unknown)}; known are {', '.join(CALLS)}")
    if not torch.cuda.is_available():
        print("the benchmarks need a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    for name in options.suites:
        print(warm(name, options.seconds, options.resume), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
