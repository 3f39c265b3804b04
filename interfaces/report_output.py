"""The accuracy report on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from attnres.report import Kernel, Pair, Report, Row

Item = TypeVar("Item", Row, Pair)


def write(report: Report, folder: Path) -> list[Path]:
    """Writes report.json and report.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.json", folder / "report.md"]
    written[0].write_text(to_json(report))
    written[1].write_text(to_markdown(report))
    return written


def to_json(report: Report) -> str:
    """The whole report, one row a line; numbers that are not finite are null."""
    found = _plain(asdict(report))
    lists = {name: value for name, value in found.items() if isinstance(value, list)}
    head = {"ok": report.ok, "metadata": found["metadata"]}
    parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    for name, items in lists.items():
        parts.append(f'"{name}": [\n' + ",\n".join(json.dumps(item, allow_nan=False) for item in items) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def to_markdown(report: Report) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnres"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"number": _number, "ratio": _ratio, "count": _count}
    tensors = worst(report.rows, lambda row: (row.op, row.direction, row.tensor, row.backend, row.dtype))
    judged = [row for row in report.rows if row.verdict != "refused"]
    return environment.get_template("report.md.j2").render(
        report=report,
        broken=[describe(item) for item in report.broken],
        worst=_by_op(tensors),
        pairs=_largest_differences(report.pairs, lambda p: (p.op, p.tensor, p.dtype, p.first, p.second)),
        refused=Counter(row.note for row in report.rows if row.verdict == "refused"),
        everything=_by_op(judged),
    )


def to_terminal(report: Report, console: Console, verbose: bool = False) -> None:
    """The worst case of each op, direction, backend and dtype (or every row), comparisons, kernels, and all broken."""
    if report.rows:
        console.print(_rows_table(report.rows, verbose))
    if report.pairs:
        console.print(_pairs_table(report.pairs))
    if report.kernels:
        console.print(_kernels_table(report.kernels, report.metadata["cute"]))
    for reason, count in Counter(row.note for row in report.rows if row.verdict == "refused").items():
        console.print(f"refused {count} cases: {reason}", markup=False)
    for item in report.broken:
        console.print(f"broken: {describe(item)}", style="red", markup=False)
    total = f"{len(report.rows)} rows, {len(report.pairs)} comparisons, {len(report.kernels)} kernels"
    console.print(f"{total}: " + ("all within budget" if report.ok else f"{len(report.broken)} broken"))


def describe(item: Row | Pair | Kernel) -> str:
    """One line on what is broken."""
    if isinstance(item, Kernel):
        return f"{item.op} ({item.config}): {item.spill_bytes} bytes spilled to local memory"
    where = f"{item.op} {item.tensor} {item.dtype}, {item.shape}, {item.kind}"
    if isinstance(item, Pair):
        errors = f"{_number(item.error_first)} and {_number(item.error_second)}"
        return f"{where}: cute is worse than triton (errors of {item.first} and {item.second}: {errors})"
    if item.error is None:
        return f"{where}, {item.backend}: {item.note}"
    error = f"error {_number(item.error)} (budget {_number(item.budget)}, floor {_number(item.floor)})"
    return f"{where}, {item.backend}: {error}, largest {_number(item.largest)} (budget {_number(item.largest_budget)})"


def worst(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """Of all judged rows with the same key the one that uses most of its budget."""
    judged = [row for row in rows if row.used is not None]
    return _most(judged, key, lambda row: -1.0 if row.used is None else row.used)


def _largest_differences(pairs: Iterable[Pair], key: Callable[[Pair], Hashable]) -> list[Pair]:
    # a comparison that CuTe loses goes before any difference
    return _most(pairs, key, lambda pair: math.inf if pair.verdict == "worse" else pair.difference)


def _most(items: Iterable[Item], key: Callable[[Item], Hashable], size: Callable[[Item], float]) -> list[Item]:
    found: dict[Hashable, Item] = {}
    for item in items:
        best = found.get(key(item))
        if best is None or size(item) > size(best):
            found[key(item)] = item
    return list(found.values())


def _rows_table(rows: list[Row], verbose: bool) -> Table:
    title = "Every tensor" if verbose else "Worst tensor, shape and input"
    columns = ("op", "backend", "dtype", "tensor", "shape", "input")
    table = _table(title, *columns, "error", "floor", "ratio", "largest", "used", "verdict")
    for row in rows if verbose else worst(rows, lambda row: (row.op, row.direction, row.backend, row.dtype)):
        where = (f"{row.op} {row.direction}", row.backend, row.dtype, row.tensor, row.shape, row.kind)
        errors = (_number(row.error), _number(row.floor), _ratio(row.ratio), _number(row.largest))
        table.add_row(*where, *errors, _ratio(row.used), _coloured(row.verdict))
    return table


def _pairs_table(pairs: list[Pair]) -> Table:
    columns = ("op", "dtype", "backends", "tensor", "shape", "input", "difference", "errors", "CuTe not worse")
    table = _table("Backend against backend, largest difference", *columns)
    for pair in _largest_differences(pairs, lambda pair: (pair.op, pair.dtype, pair.first, pair.second)):
        where = (pair.op, pair.dtype, f"{pair.first}, {pair.second}", pair.tensor, pair.shape, pair.kind)
        errors = f"{_number(pair.error_first)}, {_number(pair.error_second)}"
        table.add_row(*where, _number(pair.difference), errors, _coloured(pair.verdict))
    return table


def _kernels_table(kernels: list[Kernel], note: str) -> Table:
    columns = ("op", "configuration", "registers", "spilled bytes", "shared bytes", "verdict")
    table = _table(f"CuTe kernels, {note}", *columns)
    for kernel in kernels:
        sizes = (str(kernel.registers), str(kernel.spill_bytes), str(kernel.shared_bytes))
        table.add_row(kernel.op, kernel.config, *sizes, _coloured(kernel.verdict))
    return table


def _by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.op, []).append(row)
    return found


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _coloured(verdict: str) -> str:
    colour = {"ok": "green", "broken": "red", "worse": "red", "refused": "yellow"}.get(verdict)
    return f"[{colour}]{verdict}[/]" if colour else verdict


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}" if value else "0"


def _ratio(value: float | None) -> str:
    # 0 over a floor of 0, or float32 storage, whose floor is out of reach
    return "" if value is None or value == 0 else f"{value:.3f}" if value < 100 else f"{value:.0e}"


def _count(kernel: Kernel, *prefixes: str) -> int:
    return sum(count for name, count in kernel.instructions.items() if name.startswith(prefixes))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
