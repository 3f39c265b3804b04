"""The benchmark suite: `python -m bench.run --out bench/results`. Needs a GPU.

Writes bench_<device>.json after every case (a run that is stopped keeps what it had, and `--resume` goes on with it), then plots
and a Markdown table. Exit code 1 if a case or a result of ours failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from attnres.backend import BackendError
from bench import autotune, host, plots, results, timing, warm
from bench.ops import CASES, Case, Inputs, Sample, check, make_inputs, sample
from bench.providers import PROVIDERS, Call, Provider, Unsupported, missing, tell_missing
from bench.timing import COPY, OutOfTime, Timed

COMPILE_SECONDS = 120.0  # of a first call in another process: imports, compiles, autotunes beside others
COMPILE_MEMORY = 12 * 2**30
FIRST_CALL_SECONDS = 40.0  # of a first call in this one
BURST_SECONDS = 0.01
ROUNDS = 7
QUICK_ROUNDS = 3

Kernels = tuple[Any, ...]  # what `kernels` tells apart


class Suite:
    """One run: the results so far, and who is measured."""

    def __init__(
        self,
        device: torch.device,
        providers: list[Provider],
        path: Path,
        rounds: int,
        peer_seconds: float,
        console: Console,
        resume: bool = False,
    ):
        self.device, self.peer_seconds = device, peer_seconds
        self.path, self.rounds, self.console = path, rounds, console
        self.data = results.begun(path, results.metadata(self.device), resume)
        # of those whose peers were skipped too: they are replaced when they have been measured again
        self.data["cases"] = [case for case in self.data["cases"] if "copy" in case]
        self.data["missing"] = missing(provider.name for provider in providers)
        self.providers = [provider for provider in providers if provider.name not in self.data["missing"]]
        self.l2_bytes: int = self.data["metadata"]["l2_bytes"]
        self.copy = timing.copy(self.device)
        self.stopped: dict[Kernels, str] = {}
        self.begun = time.monotonic()

    def out_of_time(self) -> bool:
        """Whether peers are skipped from now on."""
        return time.monotonic() - self.begun > self.peer_seconds

    def jobs(self, case: Case) -> list[Provider]:
        return [provider for provider in self.providers if provider.wants(case)]

    def compile(self, cases: Sequence[Case]) -> None:
        """First calls in other processes: one for all that need the same kernels, the peers', which take longest, before ours."""
        jobs = [(case, p) for case in cases for p in self.jobs(case) if p.ours or self.peer_seconds > 0]
        chosen = [(case, p) for case, p in jobs if p.name != "torch.compile"]  # it has processes of its own
        names = {kernels(case, p): (case.name, p.name) for case, p in sorted(chosen, key=lambda job: job[1].ours)}
        stopped = warm.first_calls(first_call, list(names.values()), COMPILE_SECONDS, COMPILE_MEMORY, self.console)
        self.stopped = {each: stopped[job] for each, job in names.items() if job in stopped}

    def run(self, case: Case, entry: dict[str, Any]) -> None:
        """Fills the case's entry."""
        sets = [make_inputs(case, self.device, seed) for seed in range(case.sets(self.l2_bytes))]
        exact = sample(case, sets[0])
        timed: dict[str, Timed] = {COPY: self.copy}
        for provider in self.jobs(case):
            if not provider.ours and self.out_of_time():
                entry["results"][provider.name] = {"status": "skipped: time budget spent"}
                continue
            found = self._prepare(case, provider, sets, exact)
            entry["results"][provider.name] = found[0]
            if found[1] is not None:
                timed[provider.name] = found[1]
        samples, failed = timing.measure(timed, self.rounds)
        for name, reason in failed.items():
            entry["results"].setdefault(name, {})["status"] = reason
        for name, values in samples.items():
            summary = timing.summary(values)
            if name == COPY:
                entry[COPY] = summary
            else:
                entry["results"][name] |= summary
        self.console.print(_line(entry), markup=False, soft_wrap=True)

    def _prepare(
        self, case: Case, provider: Provider, sets: list[Inputs], exact: Sample
    ) -> tuple[dict[str, Any], Timed | None]:
        """First call, check and burst size, within a time limit; or what went wrong."""
        if (needed := kernels(case, provider)) in self.stopped:
            return {"status": self.stopped[needed]}, None
        begun = time.monotonic()
        try:
            with timing.limit(FIRST_CALL_SECONDS):
                calls = [provider.bind(case, made) for made in sets]
                tensor, errors = check(_first_outputs(calls[0], provider), exact)
                workspace = timing.workspace(calls[0])
                build = timing.graph if case.decode else timing.eager
                timed = build(calls, BURST_SECONDS)
        except (Unsupported, BackendError) as error:
            return {"status": f"not supported: {error}"}, None
        except (Exception, OutOfTime) as error:
            kind = "" if isinstance(error, OutOfTime) else f"{type(error).__name__}: "
            return {"status": f"failed: {kind}{error}".splitlines()[0][:300]}, None
        found = {
            "checked": tensor,
            "error": errors.error,
            "floor": errors.floor,
            "within_budget": errors.ok,
            "workspace_bytes": workspace,
            "first_seconds": round(time.monotonic() - begun, 1),
        }
        if provider.ours and not errors.ok:
            self.console.print(
                f"{case.name}, {provider.name}: {tensor} out of budget: {errors}", style="red", markup=False
            )
            return {**found, "status": "failed: wrong result, not timed"}, None
        return found, timed

    def save(self) -> None:
        this_run = self.data["metadata"].get("resumed", [self.data["metadata"]])[-1]
        this_run["seconds"] = round(time.monotonic() - self.begun)
        results.save(self.data, self.path)


def kernels(case: Case, provider: Provider) -> Kernels:
    """Equal where a provider compiles the same kernels; ours may choose another for each shape."""
    if provider.ours:
        return (provider.name, case.name)
    s = case.shape
    depth = s.sources if case.op == "phase1" or provider.headline_only else max(8, 1 << (s.sources - 1).bit_length())
    tokens = s.tokens if case.op == "phase1" else 0
    return (provider.name, case.backward, s.hidden_size, depth, s.queries, s.output_norm, tokens)


def first_call(case_name: str, provider_name: str) -> None:
    case = next(case for case in CASES if case.name == case_name)
    provider = PROVIDERS[provider_name]
    provider.binding(case)  # raises before inputs are made
    provider.bind(case, make_inputs(case, "cuda"))()
    torch.cuda.synchronize()


def _first_outputs(call: Call, provider: Provider) -> dict[str, Any]:
    """Outputs of ours are born full of NaN, so that an element nobody writes is seen."""
    if not provider.ours:
        return call()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def _line(entry: dict[str, Any]) -> str:
    def text(name: str, found: dict[str, Any]) -> str:
        if "us" not in found:
            return f"{name} {found['status'].split(':')[0]}"
        value = results.share(entry, name)
        return f"{name} {found['us']:.2f} us" if results.is_decode(entry["group"]) else f"{name} {value or 0:.3f}"

    return f"{entry['name']}: " + ", ".join(text(name, found) for name, found in entry["results"].items())


def _chosen(names: str | None) -> list[Provider]:
    wanted = names.split(",") if names else list(PROVIDERS)
    unknown = [name for name in wanted if name not in PROVIDERS]
    if unknown:
        raise SystemExit(f"unknown provider {', '.join(unknown)}; known are {', '.join(PROVIDERS)}")
    return [PROVIDERS[name] for name in wanted]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of results and plots")
    parser.add_argument("--cases", default="", metavar="SUBSTRING", help="only cases whose name contains it")
    parser.add_argument(
        "--providers",
        metavar="A,B",
        help=f"only these of {', '.join(PROVIDERS)}, all of which must be there (default: those that are)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="headline cases, three rounds, no host and first-call cost"
    )
    parser.add_argument(
        "--peer-seconds", type=float, default=600.0, help="of timing, after which peers are skipped (default: 600)"
    )
    parser.add_argument("--resume", action="store_true", help="only what the results in --out lack")
    options = parser.parse_args(arguments)
    providers = _chosen(options.providers)
    cases = [case for case in CASES if options.cases in case.name and (case.headline or not options.quick)]
    if not cases:
        raise SystemExit(f"no case has {options.cases!r} in its name, for example {CASES[0].name!r}")
    if not torch.cuda.is_available():
        print("the benchmarks need a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    logging.getLogger("fla").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 180)
    path = results.path_in(options.out, torch.cuda.get_device_name())
    device = torch.device("cuda", torch.cuda.current_device())
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    suite = Suite(device, providers, path, rounds, options.peer_seconds, console, options.resume)
    cases = results.left(suite.data, cases)
    tell_missing(suite.data["missing"], options.providers is not None, console)
    suite.compile(cases)
    autotune.speed_up()
    return _measure(suite, cases, options.quick)


def _overheads(suite: Suite, ours: bool) -> None:
    """Host cost and first calls of our backends, or of the peers, where the results do not have them yet."""
    data = suite.data
    done = {name for found in data.get("host", {}).values() for name in found} | set(data.get("first_call", {}))
    names = [provider.name for provider in suite.providers if provider.ours == ours and provider.name not in done]
    for label, found in host.host_costs([name for name in host.HOST_PROVIDERS if name in names]).items():
        data.setdefault("host", {}).setdefault(label, {}).update(found)
    suite.save()
    first_calls = host.first_calls([name for name in host.FIRST_CALL_PROVIDERS if name in names])
    data.setdefault("first_call", {}).update(first_calls)
    suite.save()


def _measure(suite: Suite, cases: list[Case], quick: bool) -> int:
    console, data, status = suite.console, suite.data, 0
    suite.begun = time.monotonic()
    try:
        if not quick:
            data["writes_alone"] = timing.writes_alone(suite.device, suite.rounds)
            _overheads(suite, ours=True)
        for case in cases:
            entry = results.entry(case)
            try:
                suite.run(case, entry)
            except Exception as error:  # of inputs or the oracle: the other cases can still run
                entry["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
                console.print(f"{case.name}: {entry['failed']}", style="red", markup=False)
            results.put(data, entry, CASES)
            suite.save()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises if a kernel has left the device unusable
        data["metadata"]["clocks at end"] = results.clocks()
        if not quick and not suite.out_of_time():
            _overheads(suite, ours=False)
    except (RuntimeError, KeyboardInterrupt) as error:
        status = 1
        data["stopped"] = f"{type(error).__name__}: {error}".splitlines()[0]
        console.print(f"stopped: {data['stopped']}", style="red", markup=False)
    suite.save()
    results.print_tables(data, console)
    suite.path.with_suffix(".md").write_text(results.to_markdown(data))
    written = [suite.path, suite.path.with_suffix(".md"), *plots.write(data, suite.path)]
    console.print("wrote " + ", ".join(str(each) for each in written), markup=False, soft_wrap=True)
    ours = [found for case in data["cases"] for name, found in case["results"].items() if name.startswith("ours")]
    wrong = any(not found.get("within_budget", True) or "failed" in found.get("status", "") for found in ours)
    return 1 if wrong or any("failed" in case for case in data["cases"]) else status


if __name__ == "__main__":
    sys.exit(main())
