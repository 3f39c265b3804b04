"""The accuracy report on the terminal, as JSON and as Markdown; report_html.py makes the page."""

from __future__ import annotations

import json
import math
from collections import Counter
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
        pairs=report_lines.largest_difference_of_each_tensor(report.pairs),
        refused=Counter(row.note for row in report.rows if row.verdict == "refused"),
        everything=report_lines.by_op(judged),
    )


def to_terminal(report: Report, console: Console, verbose: bool = False) -> None:
    """The worst case of each op, direction, backend and dtype (or every row), comparisons, kernels, and all broken."""
    if report.rows:
        console.print(_rows_table(report.rows, verbose))
    if report.pairs:
        console.print(_pairs_table(report.pairs))
    if report.kernels:
        console.print(_kernels_table(report.kernels, report.metadata["cute"]))
    if report.precision_at_risk:
        console.print(_risks_table(report.precision_at_risk, report.metadata["activations"]))
    if report.storage:
        table = _table("Storage formats", *report_lines.STORAGE_COLUMNS)
        for error in report.storage:
            *cells, level = report_lines.storage_cells(error)
            table.add_row(*cells, _coloured(level))
        console.print(table)
    for reason, count in Counter(row.note for row in report.rows if row.verdict == "refused").items():
        console.print(f"refused {count} cases: {reason}", markup=False)
    for item in report.broken:
        console.print(f"broken: {describe(item)}", style="red", markup=False)
    verdict = "all within budget" if report.ok else f"{len(report.broken)} broken"
    console.print(f"{report_lines.counts(report)}: {verdict}")


def _rows_table(rows: list[Row], verbose: bool) -> Table:
    title = "Every tensor" if verbose else "Worst tensor, shape and input"
    columns = ("op", "backend", "dtype", "tensor", "shape", "input")
    table = _table(title, *columns, "error", "floor", "ratio", "largest", "used", "verdict")
    for row in rows if verbose else worst(rows, lambda row: (row.op, row.direction, row.backend, row.dtype)):
        where = (f"{row.op} {row.direction}", row.backend, row.dtype, row.tensor, row.shape, row.kind)
        errors = (number(row.error), number(row.floor), ratio(row.ratio), number(row.largest))
        table.add_row(*where, *errors, ratio(row.used), _coloured(row.verdict))
    return table


def _pairs_table(pairs: list[Pair]) -> Table:
    columns = ("op", "dtype", "backends", "tensor", "shape", "input", "difference", "errors", "CuTe not worse")
    table = _table("Backend against backend, largest difference", *columns)
    for pair in largest_differences(pairs, lambda pair: (pair.op, pair.dtype, pair.first, pair.second)):
        where = (pair.op, pair.dtype, f"{pair.first}, {pair.second}", pair.tensor, pair.shape, pair.kind)
        errors = f"{number(pair.error_first)}, {number(pair.error_second)}"
        table.add_row(*where, number(pair.difference), errors, _coloured(pair.verdict))
    return table


def _kernels_table(kernels: list[Kernel], note: str) -> Table:
    columns = ("op", "configuration", "registers", "spilled bytes", "shared bytes", "verdict")
    table = _table(f"CuTe kernels, {note}", *columns)
    for kernel in kernels:
        sizes = (str(kernel.registers), str(kernel.spill_bytes), str(kernel.shared_bytes))
        table.add_row(kernel.op, kernel.config, *sizes, _coloured(kernel.verdict))
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


def _coloured(verdict: str) -> str:
    colours = {"ok": "green", "broken": "red", "worse": "red", "refused": "yellow", "at risk": "yellow"}
    colour = colours.get(verdict)
    return f"[{colour}]{verdict}[/]" if colour else verdict


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
