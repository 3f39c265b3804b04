"""The accuracy report on the terminal, as JSON and as Markdown; report_html.py makes the page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from attnres import report_html, report_lines
from attnres.precision import SourceRisk
from attnres.report import Kernel, Pair, Report, Row
from attnres.report_lines import describe, largest_differences, number, ratio, worst


def write(report: Report, folder: Path) -> list[Path]:
    """Writes report.json, report.md and report.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": to_json(report), "md": to_markdown(report), "html": report_html.to_html(report)}
    written = [folder / f"report.{suffix}" for suffix in texts]
    for path, text in zip(written, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
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
    environment.filters |= {"number": number, "ratio": ratio, "count": report_lines.instructions}
    judged = [row for row in report.rows if row.verdict != "refused"]
    return environment.get_template("report.md.j2").render(
        report=report,
        headline=report_lines.headline(report),
        counts=report_lines.counts(report),
        broken=[describe(item) for item in report.broken],
        risk_columns=report_lines.RISK_COLUMNS,
        risks=[report_lines.risk_cells(risk) for risk in report.precision_at_risk],
        storage_columns=report_lines.STORAGE_COLUMNS,
        storage=[report_lines.storage_cells(error) for error in report.storage],
        worst=report_lines.by_op(report_lines.worst_of_each_tensor(report.rows)),
        formats=report_lines.format_table(report.rows),
        pairs=report_lines.largest_difference_of_each_tensor(report.pairs),
        refused=report_lines.refusals(report.rows),
        kernel_columns=report_lines.KERNEL_COLUMNS,
        kernels=report_lines.kernel_summary(report.kernels),
        everything={
            op: (report_lines.backends_of(rows), report_lines.cases(rows), len(rows))
            for op, rows in report_lines.by_op(judged).items()
        },
    )


def to_terminal(report: Report, console: Console, verbose: bool = False) -> None:
    """The worst case of each op, direction and backend (or every row), formats, comparisons, kernels, and all broken."""
    if report.rows:
        console.print(_rows_table(report.rows if verbose else report_lines.main(report.rows) or report.rows, verbose))
        console.print(_formats_table(report_lines.format_table(report.rows)))
    if report.pairs:
        console.print(_pairs_table(report_lines.main(report.pairs)))
    if report.kernels:
        console.print(_kernels_table(report.kernels, report.metadata["cute"], verbose))
    if report.precision_at_risk:
        console.print(_risks_table(report.precision_at_risk, report.metadata["activations"]))
    if report.storage:
        table = _table("Two phases by storage format", *report_lines.STORAGE_COLUMNS)
        for error in report.storage:
            *cells, level = report_lines.storage_cells(error)
            table.add_row(*cells, _coloured(level))
        console.print(table)
    for (backend, reason), count in report_lines.refusals(report.rows).items():
        console.print(f"{backend} does not take {count} cases: {reason}", markup=False)
    for item in report.broken:
        console.print(f"broken: {describe(item)}", style="red", markup=False)
    verdict = "all within budget" if report.ok else f"{len(report.broken)} broken"
    console.print(f"{report_lines.counts(report)}: {verdict}")


def _rows_table(rows: list[Row], verbose: bool) -> Table:
    title = "Every tensor" if verbose else "Worst tensor, shape and input"
    columns = ("op", "backend", "dtype", "tensor", "shape", "input")
    table = _table(title, *columns, "error", "floor", "ratio", "largest", "used", "verdict")
    for row in rows if verbose else worst(rows, lambda row: (row.op, row.direction, row.backend)):
        where = (f"{row.op} {row.direction}", row.backend, row.dtype, row.tensor, row.shape, row.kind)
        errors = (number(row.error), number(row.floor), ratio(row.ratio), number(row.largest))
        table.add_row(*where, *errors, ratio(row.used), _coloured(row.verdict))
    return table


def _formats_table(found: report_lines.FormatTable) -> Table:
    columns = (f"{op}\n{backend}" for op, backend in found.columns)
    table = _table("Budget used, forward/gradients", "format", *columns)
    table.padding = (0, 1, 0, 0)
    for name, cells in found.lines.items():
        table.add_row(name, *(_coloured(verdict, text) for verdict, text in cells))
    return table


def _pairs_table(pairs: list[Pair]) -> Table:
    columns = ("op", "dtype", "backends", "tensor", "shape", "input", "difference", "errors", "CuTe not worse")
    table = _table("Backend against backend, largest difference", *columns)
    for pair in largest_differences(pairs, lambda pair: (pair.op, pair.first, pair.second)):
        where = (pair.op, pair.dtype, f"{pair.first}, {pair.second}", pair.tensor, pair.shape, pair.kind)
        errors = f"{number(pair.error_first)}, {number(pair.error_second)}"
        table.add_row(*where, number(pair.difference), errors, _coloured(pair.verdict))
    return table


def _kernels_table(kernels: list[Kernel], note: str, verbose: bool) -> Table:
    table = _table(f"CuTe kernels, {note}", *report_lines.KERNEL_COLUMNS)
    every = [
        (kernel.op, kernel.config, kernel.registers, kernel.spill_bytes, kernel.shared_bytes, kernel.verdict)
        for kernel in kernels
    ]
    for op, config, *sizes, verdict in every if verbose else report_lines.kernel_summary(kernels):
        table.add_row(op, str(config), *map(str, sizes), _coloured(verdict))
    return table


def _risks_table(risks: list[SourceRisk], activations: str) -> Table:
    *columns, verdict = report_lines.RISK_COLUMNS
    table = _table(f"Precision at risk: what 16-bit storage loses of {activations}", *columns)
    table.add_column(verdict)
    for risk in risks:
        *cells, level, words = report_lines.risk_cells(risk)
        table.add_row(*cells, _coloured(level), words)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _coloured(verdict: str, text: str = "") -> str:
    colours = {"ok": "green", "broken": "red", "worse": "red", "refused": "yellow", "at risk": "yellow"}
    colour = colours.get(verdict)
    return f"[{colour}]{text or verdict}[/]" if colour else text or verdict


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
