"""The `attnres` command: `attnres report` and `attnres info`.

Exit codes: 0 all is well, 1 an error budget or a comparison is broken (with --gate also: what was asked for by name was
refused or not run), 2 the arguments cannot be used.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnres import triton_interpreter
from attnres.formats import DTYPES, MAIN

if TYPE_CHECKING:
    from rich.console import Console

OPS = ("mix", "phase1", "phase2", "step")
BACKENDS = ("torch", "triton", "cute")


class UnusableError(Exception):
    """The arguments cannot be used; the message says why and what is allowed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        triton_interpreter.use_without_gpu()
        return _report(arguments) if arguments.command == "report" else _info()
    except UnusableError as error:
        print(f"attnres: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnres", description="Attention residuals: accuracy report and backends.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report",
        help="judge every operation on every backend against the float64 oracle",
        description="Runs every operation x backend x format x shape x input, forward and gradients, against the "
        "float64 oracle and its error budgets, compares the backends, and writes report.json, report.md and report.html. "
        "Without a GPU Triton runs in its interpreter at small sizes and the CuTe kernels are compiled and inspected. Exit "
        "code 1: a budget is broken, or CuTe is less accurate than Triton; 2: unusable arguments.",
        epilog="FILE.safetensors holds finite tensors of bfloat16, float16, float32 or float64: sources [L, T, D], 1 to 64 "
        "sources (the embedding and the sublayer outputs, or the finished blocks, of T tokens); optionally queries [S, D], "
        "the trained pseudo-queries, and rms_weight [D], the key norm's weight; random ones where they are missing. The "
        "report then tells, source by source, what bf16, fp16 and fp16 with a scale per row would lose of them.",
    )
    for name, known in (("backends", BACKENDS), ("dtypes", DTYPES), ("ops", OPS)):
        allowed, default = ", ".join(known), "all"
        if name == "dtypes":
            allowed += ": how sources are stored, / queries and weights, + what else differs"
            default = f"all; with --inputs {', '.join(MAIN)}"
        report.add_argument(f"--{name}", nargs="+", metavar="NAME", help=f"some of {allowed} (default: {default})")
    report.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE.safetensors",
        help="run on these activations only (see below; without a GPU on their first 8 tokens), and show which of them "
        "16-bit storage puts at risk",
    )
    out = "output folder (default: report; with --gate nothing is written unless it is given)"
    report.add_argument("--out", type=Path, metavar="DIR", help=out)
    report.add_argument(
        "--gate",
        action="store_true",
        help="for CI: print only what fails and one summary line, write no files; strict: a case that a backend named by "
        "--backends refuses or does not run fails too (exit code 1)",
    )
    report.add_argument("--verbose", action="store_true", help="show every row on the terminal, not only the worst")
    commands.add_parser("info", help="show backends, why one is unavailable, versions and device")
    return parser


def _choice(
    name: str, given: list[str] | None, known: Sequence[str], default: Sequence[str] | None = None
) -> list[str]:
    if given is None:
        return list(default or known)
    wanted = [part for value in given for part in value.split(",") if part]
    unknown = [part for part in wanted if part not in known]
    if unknown or not wanted:
        raise UnusableError(f"--{name}: {', '.join(unknown) or 'nothing given'}; allowed are {', '.join(known)}")
    return [value for value in known if value in wanted]


def _report(arguments: argparse.Namespace) -> int:
    backends = _choice("backends", arguments.backends, BACKENDS)
    dtypes = _choice("dtypes", arguments.dtypes, tuple(DTYPES), MAIN if arguments.inputs else None)
    ops = _choice("ops", arguments.ops, OPS)

    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from attnres import inputs, precision, report, report_lines, report_output
    from attnres.backend import available_backends

    console = _console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = arguments.out or (None if arguments.gate else Path("report"))
    try:
        capture = inputs.load_capture(arguments.inputs) if arguments.inputs else None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise UnusableError(str(error)) from error

    def notice(text: str) -> None:
        if not arguments.gate:
            console.print(text, markup=False)

    beyond = "" if capture is None else precision.beyond_fp16(capture.sources)
    for name in [name for name in dtypes if beyond and DTYPES[name].plain_fp16]:
        if arguments.dtypes:
            raise UnusableError(f"--dtypes {name}: {beyond}")
        notice(f"{name} is left out: {beyond}")
        dtypes.remove(name)
    reasons = available_backends()
    runnable = [name for name in backends if reasons[name] is None]
    compile_reason = None
    if "cute" in backends and reasons["cute"] is not None:
        compile_reason = reasons["cute"] if device.type == "cuda" else "no GPU"
        if not _can_compile_cute():
            if arguments.backends:
                raise UnusableError(f"--backends cute: {reasons['cute']}")
            notice(f"cute is left out: {reasons['cute']}")
            compile_reason = None
    for name in set(backends) - {"cute", *runnable}:
        if arguments.backends:
            raise UnusableError(f"--backends {name}: {reasons[name]}")
        notice(f"{name} is left out: {reasons[name]}")
    if device.type == "cpu":
        notice("No GPU: small sizes; Triton runs in its interpreter, CuTe kernels are compiled for sm_90a only.")

    jobs = report.jobs(ops, dtypes, device, capture)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=arguments.gate) as bar:
        task = bar.add_task("running", total=len(jobs) if runnable else None)

        def progress(done: str) -> None:
            if done.startswith("compile "):
                bar.update(task, total=None)
            bar.update(task, advance=1, description=done[:60].ljust(60))

        found = report.run(jobs, runnable, device, capture, compile_reason, progress)
    if not arguments.gate:
        report_output.to_terminal(found, console, arguments.verbose)
    for path in report_output.write(found, out) if out is not None else []:
        notice(f"wrote {path}")
    if not arguments.gate:
        return 0 if found.ok else 1
    failures = report_lines.gate_failures(found, backends if arguments.backends else [])
    for line in (*failures, f"{report_lines.counts(found)}: {len(failures)} failed"):
        print(line)
    return 1 if failures else 0


def _console() -> Console:
    from rich.console import Console

    # the tables need this much, also in a log file; a narrower terminal wraps them
    return Console(width=max(170, Console().width))


def _can_compile_cute() -> bool:
    # the DSL compiles, Triton's package has the disassembler
    return all(importlib.util.find_spec(name) is not None for name in ("cutlass", "triton"))


def _info() -> int:
    import torch

    from attnres import report
    from attnres.backend import available_backends

    console = _console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = report.describe(device)
    lines["ATTNRES_BACKEND"] = os.environ.get("ATTNRES_BACKEND", "auto (not set)")
    lines["ATTNRES_CHECK"] = os.environ.get("ATTNRES_CHECK", "off (not set)")
    for name, reason in available_backends().items():
        lines[f"backend {name}"] = "available" if reason is None else f"unavailable: {reason}"
    width = max(map(len, lines))
    for name, value in lines.items():
        console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
    return 0
