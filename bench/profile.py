"""What holds the CuTe kernels back, by Nsight Compute: `python -m bench.profile --out bench/results`. Needs a GPU and `ncu`.

Runs one call of each headline case and of every phase 1 in bf16 under ncu, caches flushed, clocks left alone, and writes
ncu_<device>.json and .md: per kernel its duration, throughput of device memory, L2 and shared memory, issue rate, occupancy,
registers, and what its warps wait for.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.ops import CASES, Case, make_inputs
from bench.providers import PROVIDERS, Unsupported

_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "long_scoreboard",
    "short_scoreboard",
    "barrier",
    "wait",
    "math_pipe_throttle",
    "lg_throttle",
    "mio_throttle",
    "sleeping",
)
METRICS = {
    "us": "gpu__time_duration.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 and shared %": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue %": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "read MB": "dram__bytes_read.sum",
    "written MB": "dram__bytes_write.sum",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
} | {f"stall {stall}": _STALL.format(stall) for stall in STALLS}
_UNITS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}


def profiled(names: str) -> list[Case]:
    """Headline cases and every phase 1 in bf16, as far as the CuTe backend takes them, one input layout each."""
    chosen = [case for case in CASES if case.headline or (case.op == "phase1" and not case.storage)]
    return [case for case in chosen if names in case.name and not case.stacked and _takes(case)]


def _takes(case: Case) -> bool:
    try:
        PROVIDERS["ours-cute"].binding(case)
    except Unsupported:
        return False
    return True


def run_cases(names: str) -> None:
    """In the process under ncu: each case once, between cudaProfilerStart and cudaProfilerStop."""
    for case in profiled(names):
        call = PROVIDERS["ours-cute"].bind(case, make_inputs(case, "cuda"))
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda.nvtx.range_push(case.name)
        with torch.autograd.set_multithreading_enabled(False):  # a backward in this thread's range
            call()
        torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        torch.cuda.empty_cache()


def under_ncu(names: str) -> str:
    """ncu's CSV, one line per kernel and metric."""
    command = [
        *("ncu", "--clock-control", "none", "--profile-from-start", "off", "--nvtx", "--print-nvtx-rename", "kernel"),
        *("--csv", "--kernel-name", "regex:cutlass", "--metrics", ",".join(METRICS.values())),
        *(sys.executable, "-m", "bench.profile", "--run", "--cases", names),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"ncu failed: {done.stdout[-500:]} {done.stderr[-500:]}")
    return done.stdout


def parse(text: str) -> list[dict[str, Any]]:
    """One entry per kernel launch: case and numbers by METRICS' names."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu saw no kernel of the CuTe backend: {text.strip()[-500:]}")
    labels = {metric: label for label, metric in METRICS.items()}
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        entry = found.setdefault(row["ID"], {"case": row["Kernel Name"].rpartition("/")[0]})
        label = labels.get(row["Metric Name"])
        if label:
            value = float(row["Metric Value"].replace(",", ""))
            entry[label] = round(value * _UNITS.get(row["Metric Unit"], 1.0), 2)
    return list(found.values())


def to_markdown(data: dict[str, Any]) -> str:
    labels = [label for label in METRICS if not label.startswith("stall")]
    lines = [
        f"# ncu: {data['metadata']['device']}",
        "",
        "One call each, caches flushed, clocks left alone. Waiting for: the two commonest reasons, warps per instruction issued.",
        "",
        f"| case | {' | '.join(labels)} | waiting for |",
        "| --- " * (len(labels) + 2) + "|",
    ]
    launches = Counter(entry["case"] for entry in data["kernels"])
    seen = Counter[str]()
    for entry in data["kernels"]:
        name = entry["case"]
        seen[name] += 1
        if launches[name] > 1:  # a backward: after the kernel itself, one adds up the query gradient
            name += f", kernel {seen[name]} of {launches[name]}"
        stalls = sorted(STALLS, key=lambda stall: -entry.get(f"stall {stall}", 0.0))[:2]
        waiting = ", ".join(f"{stall} {entry.get(f'stall {stall}', 0.0):.1f}" for stall in stalls)
        lines.append(f"| {name} | " + " | ".join(f"{entry.get(label, '')}" for label in labels) + f" | {waiting} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--cases", default="", metavar="SUBSTRING", help="only cases whose name contains it")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        print("profiling needs a CUDA device and ncu (Nsight Compute)", file=sys.stderr)
        return 2
    if options.run:
        run_cases(options.cases)
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    data = {"metadata": results.metadata(device), "kernels": parse(under_ncu(options.cases))}
    path = results.path_in(options.out, torch.cuda.get_device_name(), "ncu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(to_markdown(data))
    print(to_markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
