"""What all forms of the accuracy report share: which lines they pick, and how they put them into words and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from attnres import formats
from attnres.precision import SourceRisk
from attnres.report import BACKENDS, Judged, Kernel, Pair, Report, Row
from attnres.storage import StorageError

Item = TypeVar("Item", Row, Pair)


class FormatTable(NamedTuple):
    """Formats against operations and backends: the share of the error budget that is used at most, forward/gradients."""

    columns: list[tuple[str, str]]  # operation, backend
    lines: dict[str, list[tuple[str, str]]]  # format -> verdict and text of each column


def headline(report: Report) -> str:
    """The verdict in one sentence."""
    if not report.ok:
        return f"{len(report.broken)} broken."
    if report.rows:
        return "Every result is within its error budget."
    return "No kernel spills." if report.kernels else "Nothing was run."


def counts(report: Report) -> str:
    return f"{len(report.rows)} rows, {len(report.pairs)} comparisons, {len(report.kernels)} kernels"


def describe(item: Judged) -> str:
    """One line on what is broken."""
    if isinstance(item, StorageError):
        where = f"{item.result}, {item.blocks}, stored as {item.storage}, {item.backend}"
        return f"{where}: error {number(item.error)}, {ratio(item.ratio)} of bf16's"
    if isinstance(item, Kernel):
        return f"{item.op} ({item.config}): {item.spill_bytes} bytes spilled to local memory"
    where = f"{item.op} {item.tensor} {item.dtype}, {item.shape}, {item.kind}"
    if isinstance(item, Pair):
        errors = f"{number(item.error_first)} and {number(item.error_second)}"
        return f"{where}: cute is worse than triton (errors of {item.first} and {item.second}: {errors})"
    if item.error is None:
        return f"{where}, {item.backend}: {item.note}"
    error = f"error {number(item.error)} (budget {number(item.budget)}, floor {number(item.floor)})"
    return f"{where}, {item.backend}: {error}, largest {number(item.largest)} (budget {number(item.largest_budget)})"


def gate_failures(report: Report, asked: Sequence[str]) -> list[str]:
    """What `attnres report --gate` fails on: what is broken, and what a backend that was asked for by name refused or did
    not run."""
    found = [f"broken: {describe(item)}" for item in report.broken]
    refused = [row for row in report.rows if row.verdict == "refused" and row.backend in asked]
    found += [f"refused: {row.op} {row.dtype}, {row.shape}, {row.kind}, {row.backend}: {row.note}" for row in refused]
    for backend in asked:
        if all(row.backend != backend for row in report.rows):
            found.append(f"not run: {backend}, {report.metadata.get(backend, 'no cases')}")
    return found


def main(items: Iterable[Item]) -> list[Item]:
    """Those in the formats that run on every shape and input; `format_table` has all formats."""
    return [item for item in items if item.dtype in formats.MAIN]


def backends_of(items: Iterable[Row | StorageError]) -> list[str]:
    found = {item.backend for item in items}
    return [name for name in BACKENDS if name in found]


def format_table(rows: Sequence[Row]) -> FormatTable:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.dtype, row.op, row.backend), []).append(row)
    ops, backends = {row.op for row in rows}, backends_of(rows)
    columns = [(op, backend) for op in formats.READ if op in ops for backend in backends]
    names = [name for name in formats.DTYPES if any(name == dtype for dtype, _, _ in found)]
    return FormatTable(
        columns, {name: [_format_cell(found.get((name, *place), [])) for place in columns] for name in names}
    )


def _format_cell(rows: list[Row]) -> tuple[str, str]:
    judged = [row for row in rows if row.used is not None]
    if not judged:
        # an operation that does not read what distinguishes the format has no rows
        return ("refused", "refused") if rows else ("", "")
    parts = []
    for direction in ("forward", "gradient"):
        mine = [row for row in judged if row.direction == direction]
        if mine:
            used = max(row.used or 0.0 for row in mine)
            # a gradient that runs on another backend is that one's
            parts.append(mine[0].ran_on or (f"{used:.2f}" if used < 100 else f"{used:.0e}"))
    return ("broken" if any(row.verdict == "broken" for row in rows) else "ok", "/".join(parts))


def refusals(rows: Iterable[Row]) -> dict[tuple[str, str], int]:
    """Of how many cases a backend does not take the forward or the gradient, by (backend, reason)."""
    found: dict[tuple[str, str], set[tuple[str, str, str, str]]] = {}
    for row in rows:
        if row.verdict == "refused" or row.ran_on:
            reason = f"{row.note}; it runs on {row.ran_on}" if row.ran_on else row.note
            found.setdefault((row.backend, reason), set()).add((row.op, row.dtype, row.shape, row.kind))
    return {key: len(cases) for key, cases in found.items()}


def worst(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """Of all judged rows with the same key the one that uses most of its budget."""
    judged = [row for row in rows if row.used is not None]
    return _most(judged, key, lambda row: -1.0 if row.used is None else row.used)


def worst_of_each_tensor(rows: Iterable[Row]) -> list[Row]:
    return worst(rows, lambda row: (row.op, row.direction, row.tensor, row.backend))


def largest_differences(pairs: Iterable[Pair], key: Callable[[Pair], Hashable]) -> list[Pair]:
    """Of all comparisons with the same key the one with the largest difference, or one that CuTe loses."""

    def size(pair: Pair) -> float:
        if pair.verdict == "worse":
            return math.inf
        # where both overflow the storage dtype, there is no difference to speak of
        return -1.0 if math.isnan(pair.difference) else pair.difference

    return _most(pairs, key, size)


def largest_difference_of_each_tensor(pairs: Iterable[Pair]) -> list[Pair]:
    return largest_differences(pairs, lambda pair: (pair.op, pair.tensor, pair.first, pair.second))


def errors_by_depth(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[int, Row]]:
    """By direction, backend and dtype: for each number of sources the row with the largest error."""
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        line = found.setdefault((row.direction, row.backend, row.dtype), {})
        if row.error is not None and row.error >= (line[row.sources].error or 0.0 if row.sources in line else 0.0):
            line[row.sources] = row
    return found


def cases(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """By (tensor, dtype, shape, kind): the row of each backend."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.tensor, row.dtype, row.shape, row.kind), {})[row.backend] = row
    return found


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.op, []).append(row)
    return found


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}" if value else "0"


def ratio(value: float | None) -> str:
    # 0 over a floor of 0, or float32 storage, whose floor is out of reach
    return "" if value is None or value == 0 else f"{value:.3f}" if 1e-3 <= value < 100 else f"{value:.0e}"


def share(value: float) -> str:
    return f"{value:.2%}" if value >= 1e-4 else f"{value:.0e}" if value else "0"


def kernel_summary(kernels: Iterable[Kernel]) -> list[tuple[str, int, int, int, int, str]]:
    """Of each operation: how many kernels, their most registers, spilled bytes and shared bytes, the verdict."""
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        found.setdefault(kernel.op, []).append(kernel)
    return [
        (
            op,
            len(mine),
            max(kernel.registers for kernel in mine),
            max(kernel.spill_bytes for kernel in mine),
            max(kernel.shared_bytes for kernel in mine),
            "broken" if any(kernel.verdict == "broken" for kernel in mine) else "ok",
        )
        for op, mine in found.items()
    ]


def instructions(kernel: Kernel, *prefixes: str) -> int:
    """How many of the kernel's instructions begin with one of the prefixes."""
    return sum(count for name, count in kernel.instructions.items() if name.startswith(prefixes))


def risk_cells(risk: SourceRisk) -> list[str]:
    """One line of the table under RISK_COLUMNS."""
    shares = (share(risk.overflow), share(risk.subnormal), share(risk.flushed))
    errors = (number(risk.bf16), number(risk.fp16), number(risk.scaled_fp16))
    return [str(risk.source), number(risk.rms), number(risk.largest), *shares, *errors, risk.level, risk.verdict]


def storage_cells(error: StorageError) -> list[str]:
    """One line of the table under STORAGE_COLUMNS."""
    numbers = (number(error.error), ratio(error.ratio))
    return [error.result, error.blocks, error.storage, error.backend, *numbers, error.verdict]


STORAGE_COLUMNS = ("result", "values", "storage", "backend", "error", "of bf16's", "verdict")
KERNEL_COLUMNS = ("op", "configurations", "registers", "spilled bytes", "shared bytes", "verdict")
RISK_COLUMNS = (
    "source",
    "RMS",
    "largest",
    "overflow",
    "subnormal",
    "flushed",
    "bf16",
    "fp16",
    "scaled fp16",
    "level",
    "verdict",
)


def _most(items: Iterable[Item], key: Callable[[Item], Hashable], size: Callable[[Item], float]) -> list[Item]:
    found: dict[Hashable, Item] = {}
    for item in items:
        best = found.get(key(item))
        if best is None or size(item) > size(best):
            found[key(item)] = item
    return list(found.values())
