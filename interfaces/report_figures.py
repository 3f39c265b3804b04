"""The figures of the HTML report: inline SVG whose colours are the page's own (currentColor and CSS variables), so that they
follow its dark mode and its print style. Every figure has its content as alternative text.

matplotlib draws in placeholder colours; `_svg` puts the CSS ones in their place.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, TypeVar

import matplotlib
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from attnres.formats import DTYPES
from attnres.numerics import Quantiles
from attnres.report import BACKENDS, Pair, Row
from attnres.report_lines import backends_of, errors_by_depth, number, ratio, worst
from attnres.storage import StorageError

Value = TypeVar("Value")

_INK, _FAINT, _BROKEN = "#010101", "#020202", "#030303"
_COLOUR = {"torch": "#0a0101", "triton": "#0a0202", "cute": "#0a0303"}
_CSS = {
    _INK: "currentColor",
    _FAINT: "var(--faint)",
    _BROKEN: "var(--bad)",
    **{colour: f"var(--{name})" for name, colour in _COLOUR.items()},
}
# marker and size; smaller ones are drawn later, so that equal results show as one mark inside the other
_MARKER = {"torch": ("o", 7.0), "triton": ("s", 4.5), "cute": ("D", 2.5)}
_DASHES = {torch.bfloat16: "-", torch.float16: "--", torch.float32: ":"}
_WIDTH = 4.2  # inches: 302 points, so that text on a phone is a little larger than its size in points


def error_against_floor(op: str, rows: Sequence[Row]) -> Markup:
    """Every judged tensor of an operation: error over rounding floor."""
    shown = [row for row in rows if row.error and row.floor and math.isfinite(row.error)]
    with _figure(3.3) as figure:
        axes = figure.add_axes((0.15, 0.13, 0.83, 0.76))
        for backend in backends_of(shown):
            _marks(axes, backend, *_floors_and_errors([row for row in shown if row.backend == backend]))
        broken = [row for row in shown if row.verdict == "broken"]
        if broken:
            axes.plot(
                *_floors_and_errors(broken), "o", markersize=12, markerfacecolor="none", color=_BROKEN, label="broken"
            )
        _logarithmic(axes, "x", "y")
        low = min([row.floor or 0.0 for row in shown], default=1e-8)
        high = max([row.floor or 0.0 for row in shown], default=1e-2)
        axes.plot([low, high], [low, high], color=_FAINT, linewidth=1, zorder=0, label="error = floor")
        _labels(axes, "rounding floor", "error")
        _legend(figure, axes)
        ratios = [f"{backend} {ratio(_largest_ratio(shown, backend))}" for backend in backends_of(shown)]
        alt = (
            f"{op}: error against rounding floor, logarithmic, {len(shown)} tensors; 16-bit results lie on the line error = floor. "
            f"Largest error over floor of 16-bit outputs: {', '.join(ratios)}."
        )
        return _svg(figure, f"{op}-floor", alt)


def budget_used(name: str, rows: Sequence[Row], lane: Callable[[Row], str], lanes: Sequence[str]) -> Markup:
    """One lane for each value of `lane`: the largest share of the budget for each backend and dtype."""
    shown = worst(rows, lambda row: (lane(row), row.backend, row.dtype))
    with _figure(1.1 + 0.24 * len(lanes)) as figure:
        axes = _lanes(figure, lanes)
        for backend in backends_of(shown):
            mine = [row for row in shown if row.backend == backend]
            used = [min(row.used or 0.0, 10.0) for row in mine]
            _marks(axes, backend, used, [lanes.index(lane(row)) for row in mine])
        axes.axvline(1.0, color=_BROKEN, linewidth=1, label="budget")
        axes.set_xlim(-0.02, max(1.08, 1.1 * min(max((row.used or 0.0 for row in shown), default=1.0), 10.0)))
        _labels(axes, "share of the error budget used, worst case", "")
        _legend(figure, axes)
        found = [(backend, max(r.used or 0.0 for r in shown if r.backend == backend)) for backend in backends_of(shown)]
        alt = f"{name}: largest share of the error budget used in {', '.join(lanes)}; " + ", ".join(
            f"{backend} at most {used:.2f}" for backend, used in found
        )
        return _svg(figure, f"{name}-budget", alt)


def storage_formats(errors: Sequence[StorageError]) -> Markup:
    """One lane for each result and format: the error of every backend."""
    lanes = list(dict.fromkeys(f"{error.result}: {error.storage}" for error in errors if error.ratio is not None))
    with _figure(1.1 + 0.24 * len(lanes)) as figure:
        axes = _lanes(figure, lanes)
        for backend in backends_of(errors):
            mine = [error for error in errors if error.backend == backend and error.error > 0]
            places = [lanes.index(f"{error.result}: {error.storage}") for error in mine]
            _marks(axes, backend, [error.error for error in mine], places)
        _logarithmic(axes, "x", ticks=4)
        _labels(axes, "relative error", "")
        _legend(figure, axes)
        alt = "Relative error by result and storage format: " + "; ".join(
            f"{error.result}, {error.blocks}, {error.storage}, {error.backend} {number(error.error)}"
            for error in errors
        )
        return _svg(figure, "storage-formats", alt)


def error_against_depth(op: str, rows: Sequence[Row]) -> Markup:
    """Error of the output, and the largest of the gradients, against the number of sources; floors in grey."""
    directions = [name for name in ("forward", "gradient") if any(row.direction == name for row in rows)]
    pitch, below = 1.65, 0.42  # inches
    with _figure(0.7 + pitch * len(directions)) as figure:
        height = figure.get_figheight()
        for place, direction in enumerate(directions):
            bottom = below + (len(directions) - 1 - place) * pitch
            axes = figure.add_axes((0.15, bottom / height, 0.83, 1.28 / height))
            _depth_lines(axes, [row for row in rows if row.direction == direction])
            title = "out" if direction == "forward" else "largest gradient error"
            axes.set_title(title, fontsize=8.5, color=_INK, loc="left", pad=3)
            last = place == len(directions) - 1
            _labels(axes, "number of sources" if last else "", "error")
            if place == 0:
                _legend(figure, axes)
        depths = sorted({row.sources for row in rows})
        flat = [row for row in rows if row.direction == "forward" and row.error is not None]
        found = ", ".join(
            f"{dtype} {number(min(r.error or 0.0 for r in flat if r.dtype == dtype))} to "
            f"{number(max(r.error or 0.0 for r in flat if r.dtype == dtype))}"
            for dtype in _in_order(row.dtype for row in flat)
        )
        alt = f"{op}: error against the number of sources, {', '.join(map(str, depths))}. Errors of out over all depths: {found}."
        return _svg(figure, f"{op}-depth", alt)


def error_distribution(op: str, rows: Sequence[Row]) -> Markup:
    """How the errors of the rows are spread, one lane a tensor, one bar a backend above the floor's own."""
    tensors = _in_order(row.tensor for row in rows)
    backends = backends_of(rows)
    step = 0.8 / (len(backends) + 1)
    with _figure(1.1 + len(tensors) * (0.14 + 0.1 * len(backends))) as figure:
        axes = _lanes(figure, tensors)
        for row in rows:
            assert row.row_errors is not None
            assert row.row_floors is not None
            lane = tensors.index(row.tensor) - 0.4 + step / 2
            if row.backend == backends[0]:
                _spread(axes, lane, row.row_floors, _FAINT, "|", "floor")
            place = lane + step * (1 + backends.index(row.backend))
            _spread(axes, place, row.row_errors, _COLOUR[row.backend], _MARKER[row.backend][0], row.backend)
        axes.set_xlim(left=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
        )
        _labels(axes, "error of a row in units of the row's RMS", "")
        _legend(figure, axes)
        dtype = rows[0].dtype
        found = ", ".join(
            f"{row.tensor} on {row.backend}: median {number(row.row_errors.p50)}, largest {number(row.row_errors.max)}"
            for row in rows
            if row.row_errors is not None
        )
        return _svg(figure, f"{op}-distribution", f"{op}, {dtype}: errors of rows in units of the row's RMS. {found}.")


def backend_against_backend(pairs: Sequence[Pair]) -> Markup:
    """Both errors of every comparison."""
    names = _in_order((pair.first, pair.second) for pair in pairs)
    shown = [pair for pair in pairs if 0 < pair.error_first < math.inf and 0 < pair.error_second < math.inf]
    with _figure(3.3) as figure:
        axes = figure.add_axes((0.15, 0.13, 0.83, 0.76))
        for (first, second), style in zip(names, BACKENDS, strict=False):
            mine = [pair for pair in shown if (pair.first, pair.second) == (first, second)]
            errors = ([pair.error_first for pair in mine], [pair.error_second for pair in mine])
            _marks(axes, style, *errors, label=f"{first}, {second}")
        worse = [pair for pair in shown if pair.verdict == "worse"]
        if worse:
            points = ([pair.error_first for pair in worse], [pair.error_second for pair in worse])
            axes.plot(*points, "o", markersize=12, markerfacecolor="none", color=_BROKEN, label="CuTe worse")
        _logarithmic(axes, "x", "y")
        ends = [error for pair in shown for error in (pair.error_first, pair.error_second)] or [1e-8, 1e-2]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=_FAINT, linewidth=1, zorder=0, label="equal")
        _labels(axes, "error of the first backend", "error of the second")
        _legend(figure, axes)
        compared = ", ".join(f"{first} with {second}" for first, second in names)
        alt = f"Errors of two backends on the same inputs, {len(shown)} comparisons of {compared}; CuTe worse in {len(worse)}."
        return _svg(figure, "pairs", alt)


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "attnres", "font.family": "DejaVu Sans", "font.size": 8.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height))
        figure.patch.set_visible(False)
        yield figure


def _lanes(figure: Figure, names: Sequence[str]) -> Axes:
    """Axes with one named lane a line, the first on top; the space around them does not grow with their number."""
    height = figure.get_figheight()
    left = min(0.5, 0.04 + 0.0168 * max(map(len, names), default=0))
    axes = figure.add_axes((left, 0.42 / height, 0.98 - left, 1 - 0.75 / height))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for line in range(1, len(names)):
        axes.axhline(line - 0.5, color=_FAINT, linewidth=0.4)
    return axes


def _marks(axes: Axes, backend: str, x: Sequence[float], y: Sequence[float], label: str = "") -> None:
    """One mark a point in the backend's colour and form."""
    marker, size = _MARKER[backend]
    colour = _COLOUR[backend]
    face = colour if backend == "cute" else "none"
    style: Any = {"markersize": size, "markerfacecolor": face, "markeredgewidth": 0.9}
    axes.plot(x, y, marker, color=colour, label=label or backend, **style)


def _depth_lines(axes: Axes, rows: Sequence[Row]) -> None:
    by_backend = {(dtype, backend): line for (_, backend, dtype), line in errors_by_depth(rows).items()}
    # of the formats with one dtype of outputs and gradients the first: nothing else could be seen here
    shown = {DTYPES[dtype].dtype: dtype for dtype in reversed(_in_order(row.dtype for row in rows))}
    for stored, dtype in shown.items():
        lines = {backend: by_backend[dtype, backend] for backend in backends_of(rows) if (dtype, backend) in by_backend}
        for backend, line in lines.items():
            depths = sorted(line)
            floors, errors = _floors_and_errors([line[depth] for depth in depths])
            marker, size = _MARKER[backend]
            if backend == next(iter(lines)):
                axes.plot(depths, floors, color=_FAINT, linewidth=4)
                # at the end of the line, so that no legend of dashes is needed
                place = (depths[-1], errors[-1])
                axes.annotate(dtype, place, (4, 0), textcoords="offset points", va="center", fontsize=7)
            face = _COLOUR[backend] if backend == "cute" else "none"
            style: Any = {"markersize": 0.8 * size, "markerfacecolor": face, "markeredgewidth": 0.9, "linewidth": 0.8}
            axes.plot(depths, errors, _DASHES[stored], marker=marker, color=_COLOUR[backend], label=backend, **style)
    axes.margins(x=0.03)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.18)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _logarithmic(axes, "y")


def _spread(axes: Axes, lane: float, found: Quantiles, colour: str, marker: str, label: str) -> None:
    p10, p50, p90, p99, largest = astuple(found)
    axes.plot([p10, p90], [lane, lane], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot([p50], [lane], marker, markersize=4, color=colour, label=label)
    axes.plot([p99, largest], [lane, lane], "|", markersize=5, color=colour)


def _logarithmic(axes: Axes, *which: str, ticks: int = 8) -> None:
    for name in which:
        axes.set(**{f"{name}scale": "log"})
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(numticks=ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{round(math.log10(value))}" if value > 0 else ""))


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK, labelpad=2)
    axes.set_ylabel(y, color=_INK, labelpad=2)
    axes.patch.set_visible(False)
    axes.tick_params(colors=_INK, labelcolor=_INK, length=3, width=0.6)
    axes.grid(True, axis="x", color=_FAINT, linewidth=0.3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=_INK, linewidth=0.6)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="upper center", ncols=5, frameon=False, labelcolor=_INK, handlelength=1.1,
        columnspacing=1.0, handletextpad=0.4, borderaxespad=0.1,
    )  # fmt: skip


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    body = svg[svg.index(">") + 1 :]
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    for part in (r"<metadata>.*?</metadata>", r'<style type="text/css">.*?</style>', r"<!--.*?-->"):
        body = re.sub(part, "", body, flags=re.DOTALL)
    # ids are the figure's own: they must differ between the figures of a page
    prefix = re.sub(r"\W+", "-", name)
    body = re.sub(r'\bid="', f'id="{prefix}-', body).replace("xlink:href=", "href=")
    body = body.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for colour, css in _CSS.items():
        body = body.replace(colour, css)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"((?:<use [^>]*/>\s*)+)", lambda marks: _compact(marks[1]), body)
    label = Markup.escape(alt)
    return Markup(f'<svg role="img" aria-label="{label}" viewBox="{box[1]}">') + Markup(re.sub(r"\n\s*", "\n", body))


def _compact(marks: str) -> str:
    """A run of <use> elements, of which each states the style that all share: stated once, and equal marks drawn once."""
    styles = set(re.findall(r' style="[^"]*"', marks))
    if len(styles) != 1:
        return marks
    marks = re.sub(r' style="[^"]*"', "", marks)
    marks = re.sub(r' ([xy])="([\d.]+)"', lambda place: f' {place[1]}="{float(place[2]):.1f}"', marks)
    found = dict.fromkeys(re.findall(r"<use [^>]*/>", marks))
    return f"<g{styles.pop()}>{''.join(found)}</g>"


def _floors_and_errors(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.floor or math.nan for row in rows], [row.error or math.nan for row in rows]


def _largest_ratio(rows: Iterable[Row], backend: str) -> float:
    found = [row.ratio for row in rows if row.backend == backend and row.tensor == "out" and row.dtype != "fp32"]
    return max((value for value in found if value is not None), default=0.0)


def _in_order(values: Iterable[Value]) -> list[Value]:
    return list(dict.fromkeys(values))
