"""Device time of calls: CUDA events around bursts, providers taking turns.

A burst starts behind a sleeping kernel as long as the host needs to launch it, so that the events time the device and not the
host, whose cost per call is measured apart (bench.host). Each round times every provider once, in rotated order, and one copy of
a large tensor among them: the bandwidth that shares are taken of.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COPY = "copy"
COPY_BYTES = 2**31  # 1 GiB read, 1 GiB written
_SLEEP_CYCLES_PER_SECOND = 2.0e9
_LONGEST_BURST = 50  # runs: some peers launch several kernels, and the queue holds 1024


class OutOfTime(BaseException):
    """Not an Exception: an autotuner that swallows errors must not swallow this one."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the main thread after that many seconds of wall-clock time, or when a backward that runs then ends."""

    def expired(*_: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Timed:
    """What is timed: `run` makes `calls` calls of the operation and needs `host` seconds to launch them."""

    run: Callable[[], Any]
    calls: int
    runs: int  # per burst
    host: float


def eager(calls: Sequence[Callable[[], Any]], seconds: float) -> Timed:
    """One run is a call for each input set."""

    def run() -> None:
        for call in calls:
            call()

    return _piloted(run, len(calls), seconds)


def graph(calls: Sequence[Callable[[], Any]], seconds: float) -> Timed:
    """One run is the replay of a CUDA graph with at least 32 calls, the input sets in turn."""
    repeats = -(-32 // len(calls))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(repeats):
            for call in calls:
                call()
    return _piloted(captured.replay, repeats * len(calls), seconds)


def copy(device: torch.device | str) -> Timed:
    source = torch.randn(COPY_BYTES // 8, device=device).view(torch.bfloat16)
    target = torch.empty_like(source)
    return _piloted(lambda: target.copy_(source), 1, 0.002)


def writes_alone(device: torch.device | str, rounds: int) -> float:
    """Bandwidth of torch's fill_, as a share of the copy's: what bounds an operation that mostly writes."""
    target = torch.empty(COPY_BYTES // 2, device=device, dtype=torch.uint8)
    fill = _piloted(lambda: target.fill_(1), 1, 0.002)
    samples, _ = measure({COPY: copy(device), "fill": fill}, rounds)
    times = {name: statistics.median(found) for name, found in samples.items()}
    return (target.numel() / times["fill"]) / (COPY_BYTES / times[COPY])


def _piloted(run: Callable[[], Any], calls: int, seconds: float) -> Timed:
    """Warms up and chooses the burst: about `seconds` of device time."""
    run()
    torch.cuda.synchronize()
    device, host = _time(run, 2)
    runs = min(max(2, int(seconds / max(device, 1e-7))), max(2, _LONGEST_BURST // calls))
    return Timed(run, calls, runs, host)


def _time(run: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Seconds of the device and of the host per run."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun = time.perf_counter()
    start.record()
    for _ in range(runs):
        run()
    end.record()
    host = time.perf_counter() - begun
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / runs, host / runs


def workspace(call: Callable[[], Any]) -> int:
    """Bytes of device memory that the call holds at its peak besides what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = call()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del found
    return torch.cuda.max_memory_allocated() - before - kept


def measure(timed: Mapping[str, Timed], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Microseconds per call, one sample a round, and the errors of those that failed on the way."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    failed: dict[str, str] = {}
    names = list(timed)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            try:
                samples[name].append(_burst(timed[name]))
            except Exception as error:
                failed[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    return {name: found for name, found in samples.items() if name not in failed}, failed


def _burst(timed: Timed) -> float:
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(1.2 * timed.host * timed.runs, 0.1) * _SLEEP_CYCLES_PER_SECOND))
    seconds, _ = _time(timed.run, timed.runs)
    return seconds / timed.calls * 1e6


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and spread, the samples beside them."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [samples[0]] * 4
    rounded = [round(value, 4) for value in samples]
    return {"us": statistics.median(samples), "p20": fifths[0], "p80": fifths[3], "samples": rounded}
