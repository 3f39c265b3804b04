"""Two figures, each as PNG and SVG: share of copy bandwidth by provider and operation, and decode time against T."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.providers import PROVIDERS
from bench.results import Results, beside, groups, is_decode, providers_of, share

# the same figure is the same file
plt.rcParams["svg.hashsalt"] = "attnres"

_COLOURS = {name: f"C{index}" for index, name in enumerate(PROVIDERS)}
_MARKERS = dict(zip(PROVIDERS, "osD^v<>", strict=False))
_COLUMNS = 3


def write(results: Results, path: Path) -> list[Path]:
    """Writes what there are results for beside these, at `path`; returns the paths."""
    device = results["metadata"]["device"]
    shared = {
        group: cases
        for group, cases in groups(results).items()
        if not is_decode(group) and not cases[0]["storage"] and providers_of(cases)
    }
    decode = [case for group, cases in groups(results).items() if is_decode(group) for case in cases]
    written = []
    if shared:
        written += _save(_shares(shared, f"Share of copy bandwidth, bf16, {device}"), beside(path, "shares"))
    if providers_of(decode):
        written += _save(_decode(decode, f"Serving step in a CUDA graph, bf16, {device}"), beside(path, "decode"))
    return written


def write_storage(report: dict[str, Any], folder: Path) -> list[Path]:
    """The accuracy report's storage formats: error by result and format, a mark a backend."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for error in report["storage"]:
        panels.setdefault((error["result"], error["blocks"]), []).append(error)
    # results that only one format can hold have nothing to compare
    compared = {key: mine for key, mine in panels.items() if len({error["storage"] for error in mine}) > 1}
    figure, axes = plt.subplots(
        1, len(compared), figsize=(3.2 * len(compared), 2.6), squeeze=False, layout="constrained"
    )
    for axis, ((result, blocks), mine) in zip(axes[0], compared.items(), strict=True):
        formats = list(dict.fromkeys(error["storage"] for error in mine))
        for backend, marker, size in (("torch", "o", 9), ("triton", "s", 6), ("cute", "D", 3)):
            found = [error for error in mine if error["backend"] == backend]
            places = [formats.index(error["storage"]) for error in found]
            axis.plot(
                [error["error"] for error in found], places, marker, markersize=size, label=backend, fillstyle="none"
            )
        axis.set_yticks(range(len(formats)), formats, fontsize=8)
        axis.set_ylim(len(formats) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.set_title(f"{result}\n{blocks}", fontsize=9)
        axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"Relative error by storage format, {report['metadata']['device']}", fontsize=10)
    return _save(figure, folder / "storage")


def _save(figure: Figure, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Date": None})
    paths[-1].write_text(_numbered(paths[-1].read_text()))
    plt.close(figure)
    return paths


def _numbered(svg: str) -> str:
    """Clip paths by number: matplotlib's hashes take in the layout's last bits, which differ from run to run."""
    for number, name in enumerate(re.findall(r'<clipPath id="(\w+)"', svg)):
        svg = svg.replace(name, f"clip{number}")
    return svg


def _shares(shared: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """One panel an operation, one line a shape, one mark a provider."""
    ordered = sorted(shared.items(), key=lambda item: -len(item[1]))  # panels of about the same height side by side
    rows = [ordered[first : first + _COLUMNS] for first in range(0, len(ordered), _COLUMNS)]
    heights = [1.6 + 0.22 * max(len(cases) for _, cases in row) for row in rows]
    columns = min(_COLUMNS, len(ordered))
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(5.2 * columns, sum(heights)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for line, row in zip(axes, rows, strict=True):
        for axis, (group, cases) in zip(line, row, strict=False):
            axis.set_visible(True)
            _panel(axis, group, cases)
    names = providers_of([case for cases in shared.values() for case in cases])
    marks = [plt.Line2D([], [], color=_COLOURS[name], marker=_MARKERS[name], linestyle="") for name in names]
    figure.legend(marks, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title)
    return figure


def _panel(axis: Axes, group: str, cases: list[dict[str, Any]]) -> None:
    for position, case in enumerate(cases):
        for name in providers_of([case]):
            axis.plot(
                share(case, name) or 0.0,
                position,
                color=_COLOURS[name],
                marker=_MARKERS[name],
                linestyle="",
                alpha=0.85,
            )
    axis.set_yticks(range(len(cases)), [case["sizes"] for case in cases], fontsize=8)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlim(0, 1.05)
    axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.grid(axis="both", alpha=0.25)
    axis.set_title(group, fontsize=10)


def _decode(cases: list[dict[str, Any]], title: str) -> Figure:
    """One panel for each D and L: microseconds against tokens."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        panels.setdefault(re.sub(r"^T\d+ ", "", case["sizes"]), []).append(case)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (sizes, members) in zip(axes[0], panels.items(), strict=True):
        for name in providers_of(members):
            timed = [case for case in members if "us" in case["results"].get(name, {})]
            found = [case["results"][name] for case in timed]
            tokens, times = [case["tokens"] for case in timed], [result["us"] for result in found]
            spread = [[r["us"] - r["p20"] for r in found], [r["p80"] - r["us"] for r in found]]
            axis.errorbar(
                tokens, times, yerr=spread, color=_COLOURS[name], marker=_MARKERS[name], label=name, capsize=2
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("tokens")
        axis.set_title(sizes, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("µs per step")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure
