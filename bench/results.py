"""The results as one JSON-able dictionary, and its tables for the terminal and for Markdown."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from attnres import report
from bench.ops import Case
from bench.providers import PROVIDERS
from bench.timing import COPY_BYTES

Results = dict[str, Any]
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Grid:
    """A table: the first column names the row; the index of each row's best cell, if any, is kept apart."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    best: list[int | None] = field(default_factory=list)


def metadata(device: torch.device) -> dict[str, Any]:
    return {
        **report.describe(device),
        "providers": {name: p.version() for name, p in PROVIDERS.items()},
        "driver": _query("driver_version"),
        "clocks at start": clocks(),
        "cuda": torch.version.cuda,
        "l2_bytes": torch.cuda.get_device_properties(device).L2_cache_size,
        **_git(),
    }


def clocks() -> str:
    """SM and memory clock, their limits, temperature and power, as nvidia-smi reads them now."""
    return _query("clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw")


def _query(fields: str) -> str:
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split("\n")[0]


def _git() -> dict[str, Any]:
    sha = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    return {
        "git": sha or None,
        "dirty": bool(_output("git", "-C", str(_ROOT), "status", "--porcelain")) if sha else None,
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


CONDITIONS = ("device", "driver", "kernel sources", "torch", "triton", "nvidia-cutlass-dsl", "providers")


def begun(path: Path, now: dict[str, Any], resume: bool) -> Results:
    """Results without cases; to resume, those at `path`, where there are any, with this run in their metadata.

    Ends the program where their conditions were others.
    """
    if not (resume and path.exists()):
        return {"metadata": now, "cases": []}
    data: Results = json.loads(path.read_text())
    other = [name for name in CONDITIONS if data["metadata"].get(name) != now.get(name)]
    if other:
        raise SystemExit(f"{path} was measured with another {', '.join(other)}: start anew, without --resume")
    data.pop("stopped", None)
    data["metadata"].setdefault("resumed", []).append({"date": now["date"], "clocks": now["clocks at start"]})
    return data


def finished(case: dict[str, Any]) -> bool:
    """Whether every provider had its turn."""
    statuses = [found.get("status", "") for found in case["results"].values()]
    return "copy" in case and not any(status.startswith("skipped") for status in statuses)


def left(data: Results, cases: Sequence[Any], done: Callable[[dict[str, Any]], bool] = finished) -> list[Any]:
    """Cases that have no entry that is done."""
    names = {each["name"] for each in data["cases"] if done(each)}
    return [case for case in cases if case.name not in names]


def put(data: Results, entry: dict[str, Any], cases: Sequence[Any]) -> None:
    """Adds an entry, in place of an earlier one of its case, in the order of the cases."""
    places = {case.name: place for place, case in enumerate(cases)}
    others = [each for each in data["cases"] if each["name"] != entry["name"]]
    data["cases"] = sorted([*others, entry], key=lambda each: places.get(each["name"], len(places)))


def entry(case: Case) -> dict[str, Any]:
    """A case without results yet."""
    return {
        "name": case.name,
        "group": case.group,
        "sizes": case.sizes,
        "tokens": case.shape.tokens,
        "headline": case.headline,
        "storage": case.storage,
        "plain": case.plain.name,
        "least_bytes": case.least_bytes,
        "results": {},
    }


def path_in(folder: Path, device_name: str, kind: str = "bench") -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower().replace("nvidia", "")).strip("-")
    return folder / f"{kind}_{slug}.json"


def beside(path: Path, kind: str) -> Path:
    """What belongs to the benchmarks at `path`, of the same device: its networks, report, plots."""
    return path.with_name(path.name.replace("bench_", f"{kind}_"))


def save(results: Results, path: Path) -> None:
    """Atomically, so that a run that is stopped leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(scratch, path)


def share(case: dict[str, Any], provider: str) -> float | None:
    """least bytes / time / copy bandwidth of the same case's rounds."""
    found = case["results"].get(provider, {})
    if "us" not in found or "copy" not in case:
        return None
    return (case["least_bytes"] / found["us"]) / (COPY_BYTES / case["copy"]["us"])


def is_decode(group: str) -> bool:
    return group == "decode step"


def providers_of(cases: list[dict[str, Any]]) -> list[str]:
    """Those with at least one time in these cases, in the order of PROVIDERS."""
    timed = {name for case in cases for name, found in case["results"].items() if "us" in found}
    return [name for name in PROVIDERS if name in timed]


def groups(results: Results) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for case in results["cases"]:
        found.setdefault(case["group"], []).append(case)
    return found


def grids(results: Results, headline_only: bool = False) -> Iterator[Grid]:
    """One table per operation (share of copy bandwidth; decode: microseconds), then host cost and first calls."""
    for group, every in groups(results).items():
        cases = [case for case in every if case["headline"] or not headline_only]
        names = providers_of(cases)
        if names:
            unit = "µs per call in a CUDA graph" if is_decode(group) else "share of copy bandwidth"
            grid = Grid(f"{group}: {unit}", ["shape", *names])
            for case in cases:
                grid.rows.append([case["sizes"], *(_cell(case, name) for name in names)])
                grid.best.append(_best(case, names))
            yield grid
    for grid in (_of_storage(results["cases"]), _of_workspace(results["cases"], headline_only)):
        if grid.rows:
            yield grid
    if results.get("host"):
        yield _of_providers("Python per eager call, µs", results["host"], lambda value: f"{value:.1f}")
    flat = {
        f"{name}, {when}": {"": found} if isinstance(found, str) else found
        for name, by_cache in results.get("first_call", {}).items()
        for when, found in by_cache.items()
    }
    if flat:
        seconds = _of_providers(
            "First call in a new process, seconds", flat, lambda v: v if isinstance(v, str) else f"{v:.2f}"
        )
        yield seconds


def against_peers(results: Results) -> Grid:
    """One row per operation with a peer: over its headline cases, ours-cute, the fastest peer of each, and the ratio of times."""
    grid = Grid("Share of copy bandwidth (decode: µs)", ["operation", "ours-cute", "fastest peer", "faster by"])
    for group, cases in groups(results).items():
        compared = []
        for case in cases:
            ours = case["results"].get("ours-cute", {})
            peers = {
                name: found for name, found in case["results"].items() if "us" in found and not name.startswith("ours")
            }
            if case["headline"] and "us" in ours and peers:
                compared.append((case, min(peers, key=lambda name: peers[name]["us"])))
        if not compared:
            continue
        ratios = [case["results"][peer]["us"] / case["results"]["ours-cute"]["us"] for case, peer in compared]
        ours_cells = [_value(case, "ours-cute") for case, _ in compared]
        peer_cells = [_value(case, peer) for case, peer in compared]
        names = ", ".join(dict.fromkeys(peer for _, peer in compared))
        grid.rows.append([group, _range(ours_cells, 2), f"{_range(peer_cells, 2)} ({names})", f"{_range(ratios, 2)} x"])
        grid.best.append(None)
    return grid


def _value(case: dict[str, Any], provider: str) -> float:
    return case["results"][provider]["us"] if is_decode(case["group"]) else share(case, provider) or 0.0


def _range(values: list[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def of_networks(results: Results) -> Grid:
    """Milliseconds and peak memory of each provider, a row per network."""
    names = list(dict.fromkeys(name for case in results["cases"] for name in case["results"]))
    grid = Grid("Networks: ms (peak GiB)", ["network", *names])
    for case in results["cases"]:
        found = [case["results"].get(name, {}) for name in names]
        cells = [
            f"{f['us'] / 1e3:.2f} ({f['peak_gib']:.1f})" if "us" in f else f.get("status", "").split(":")[0]
            for f in found
        ]
        grid.rows.append([case["name"].removeprefix("network "), *cells])
        grid.best.append(_best(case, names))
    return grid


def _of_storage(cases: list[dict[str, Any]]) -> Grid:
    """Both times as shares of the copy in the rounds of their own case."""
    plain = {case["name"]: case for case in cases if not case["storage"]}
    stored = [case for case in cases if case["storage"] and case["plain"] in plain]
    names = providers_of(stored)
    grid = Grid("Storage formats: time over that of bf16", ["", *names])
    for case in stored:
        shares = [(share(plain[case["plain"]], name), share(case, name)) for name in names]
        grid.rows.append([case["name"], *(f"{bf16 / own:.3f}" if bf16 and own else "" for bf16, own in shares)])
        grid.best.append(None)
    return grid


def _of_workspace(cases: list[dict[str, Any]], headline_only: bool) -> Grid:
    """Of gradients alone: forward kernels hold nothing but their statistics."""
    backward = [case for case in cases if "backward" in case["group"] and (case["headline"] or not headline_only)]
    names = providers_of(backward)
    grid = Grid("Workspace of gradients: MiB held at the peak besides the results", ["", *names])
    for case in backward:
        held = [case["results"].get(name, {}).get("workspace_bytes") for name in names]
        grid.rows.append([case["name"], *("" if each is None else f"{each / 2**20:.1f}" for each in held)])
        grid.best.append(None)
    return grid


def _of_providers(title: str, rows: dict[str, dict[str, Any]], text: Any) -> Grid:
    columns = list(dict.fromkeys(name for found in rows.values() for name in found))
    grid = Grid(title, ["", *columns])
    for label, found in rows.items():
        grid.rows.append([label, *(text(found[name]) if name in found else "" for name in columns)])
        grid.best.append(None)
    return grid


def _cell(case: dict[str, Any], provider: str) -> str:
    found = case["results"].get(provider, {})
    if "us" not in found:
        return "" if "status" not in found else found["status"].split(":")[0]
    text = f"{found['us']:.2f}" if is_decode(case["group"]) else f"{share(case, provider) or 0:.3f}"
    return text if found.get("within_budget", True) else f"{text} (error {found['error']:.1e})"


def _best(case: dict[str, Any], names: list[str]) -> int | None:
    times = {index: case["results"].get(name, {}).get("us") for index, name in enumerate(names, 1)}
    timed = {index: time for index, time in times.items() if time is not None}
    return min(timed, key=lambda index: timed[index]) if len(timed) > 1 else None


def notes(results: Results) -> list[str]:
    """What is not in the tables: providers that are missing, results that failed or are out of budget, what bounds writes."""
    found = [f"{name}: {reason}" for name, reason in results.get("missing", {}).items()]
    if "writes_alone" in results:
        found.append(f"writes alone (torch's fill_) reach {results['writes_alone']:.3f} of the copy's bandwidth")
    skipped: dict[tuple[str, str], int] = {}
    for case in results["cases"]:
        for name, result in case["results"].items():
            status = result.get("status", "")
            if status.startswith("skipped"):
                skipped[name, status] = skipped.get((name, status), 0) + 1
            elif status and not status.startswith("not supported"):
                found.append(f"{case['name']}, {name}: {status}")
            if name.startswith("ours") and not result.get("within_budget", True):
                found.append(f"{case['name']}, {name}: {result['checked']} is outside its error budget")
    return found + [f"{name}: {count} cases {status}" for (name, status), count in skipped.items()]


def print_tables(results: Results, console: Console) -> None:
    for grid in grids(results):
        table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in grid.header:
            table.add_column(column, no_wrap=True)
        for row, best in zip(grid.rows, grid.best, strict=True):
            table.add_row(*(f"[bold]{cell}[/]" if index == best else cell for index, cell in enumerate(row)))
        console.print(table)
    for note in notes(results):
        console.print(note, markup=False, style="yellow")


def to_markdown(results: Results, headline_only: bool = False) -> str:
    return "\n\n".join(markdown(grid) for grid in grids(results, headline_only)) + "\n"


def markdown(grid: Grid) -> str:
    lines = [f"**{grid.title}**", "", _line(grid.header), _line(["---"] * len(grid.header))]
    for row, best in zip(grid.rows, grid.best, strict=True):
        lines.append(_line([f"**{cell}**" if index == best else cell for index, cell in enumerate(row)]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
