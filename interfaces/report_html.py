"""The accuracy report as one self-contained HTML page: no scripts, no network, pictures inline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from attnres import formats, inputs, oracle, report_figures, report_lines
from attnres.report import BACKENDS, Report, Row
from attnres.report_lines import describe, number, ratio, worst


def to_html(report: Report) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnres"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "ratio": ratio,
        "count": report_lines.instructions,
        "share": report_lines.share,
    }
    judged = [row for row in report.rows if row.used is not None]
    pairs = report_lines.largest_difference_of_each_tensor(report.pairs)
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=report_lines.headline(report),
        counts=report_lines.counts(report),
        broken=[describe(item) for item in report.broken],
        storage_figure=report_figures.storage_formats(report.storage) if report.storage else None,
        storage_columns=report_lines.STORAGE_COLUMNS,
        storage=[report_lines.storage_cells(error) for error in report.storage],
        summary=_summary(report.rows),
        main=formats.MAIN,
        formats=report_lines.format_table(report.rows),
        operations=[_operation(op, rows) for op, rows in report_lines.by_op(judged).items()],
        kinds=_kinds(judged),
        kinds_figure=_kinds_figure(judged),
        pairs=pairs,
        pairs_figure=report_figures.backend_against_backend(report.pairs) if report.pairs else None,
        kernels=report_lines.kernel_summary(report.kernels),
        refused=report_lines.refusals(report.rows),
    )


def _summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each operation and backend."""
    found = []
    for op, of_op in report_lines.by_op(rows).items():
        for backend in BACKENDS:
            mine = [row for row in of_op if row.backend == backend]
            if not mine:
                continue
            verdicts = Counter(row.verdict for row in mine)
            found.append(
                {
                    "op": op,
                    "backend": backend,
                    "results": len(mine) - verdicts["refused"],
                    "refused": verdicts["refused"],
                    "forward": _largest_ratio(mine, "forward"),
                    "gradient": _largest_ratio(mine, "gradient"),
                    "used": max((row.used for row in mine if row.used is not None), default=None),
                    "verdict": "broken" if verdicts["broken"] else "ok" if verdicts["ok"] else "refused",
                }
            )
    return found


def _largest_ratio(rows: Iterable[Row], direction: str) -> float | None:
    """Error over floor where the floor is a bound that can be reached: 16-bit tensors that float32 evaluation resolves,
    rounded to nearest."""
    nearest = [row for row in rows if row.direction == direction and not formats.DTYPES[row.dtype].stochastic]
    found = [row.ratio for row in nearest if row.ratio and row.floor and (row.float32 or 0.0) < 0.1 * row.floor]
    return max(found, default=None)


def _operation(op: str, rows: list[Row]) -> dict[str, Any]:
    measured = [row for row in rows if row.error is not None]
    in_main = report_lines.main(measured) or measured
    deep = _depth_rows(in_main)
    spread = _distribution_rows(in_main)
    tensors = list(dict.fromkeys(row.tensor for row in measured))
    # log-sum-exp and weights are float32: beside 16-bit tensors they would all be zero
    drawn = [row for row in spread if row.dtype == spread[0].dtype and row.tensor not in oracle.STATISTICS]
    return {
        "name": op,
        "backends": report_lines.backends_of(rows),
        "cases": report_lines.cases(rows),
        "rows": len(rows),
        "worst": report_lines.worst_of_each_tensor(rows),
        "depth": report_lines.errors_by_depth(deep),
        "depths": sorted({row.sources for row in deep}),
        "depth_kind": deep[0].kind if deep else "",
        "distribution": spread,
        "distribution_dtype": drawn[0].dtype if drawn else "",
        "figures": {
            "floor": report_figures.error_against_floor(op, measured),
            "budget": report_figures.budget_used(op, measured, lambda row: row.tensor, tensors),
            "depth": report_figures.error_against_depth(op, deep),
            "distribution": report_figures.error_distribution(op, drawn),
        }
        if measured
        else {},
    }


def _depth_rows(rows: Sequence[Row]) -> list[Row]:
    """The outputs and gradients of one kind of input, so that depths differ in nothing else but their shapes."""
    kind = "normal" if any(row.kind == "normal" for row in rows) else "captured"
    return [row for row in rows if row.kind == kind and (row.tensor == "out" or row.direction == "gradient")]


def _distribution_rows(rows: Sequence[Row]) -> list[Row]:
    """For each tensor and dtype the case that uses most of the budget on any backend, on all backends."""
    found = []
    for top in worst(rows, lambda row: (row.tensor, row.dtype)):
        where = (top.tensor, top.dtype, top.shape, top.kind)
        found += [row for row in rows if (row.tensor, row.dtype, row.shape, row.kind) == where]
    return found


def _kinds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for kind, text in inputs.KINDS.items():
        mine = [row for row in rows if row.kind == kind]
        if mine:
            lines = worst(mine, lambda row: (row.op, row.direction, row.backend))
            found.append({"name": kind, "text": text, "results": len(mine), "worst": lines})
    return found


def _kinds_figure(rows: Sequence[Row]) -> Any:
    kinds = [kind for kind in inputs.KINDS if any(row.kind == kind for row in rows)]
    return report_figures.budget_used("inputs", rows, lambda row: row.kind, kinds) if kinds else None
