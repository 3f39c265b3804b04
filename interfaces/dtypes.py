"""Which dtypes and formats go together: one table, which the checks read, the tests walk through and the README shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnres.scaled import SCALED_FP16

_ALL = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Row:
    """What goes with one storage format of the sources (residuals, block representations, blocks) or of the partial sum."""

    storage: str
    parameters: tuple[str, ...]  # queries and weights, each on its own
    delta: tuple[str, ...]  # what is added to the partial sum
    inter_out: tuple[str, ...]  # phase 1's result, merged into a partial sum of this format
    out: tuple[str, ...]  # out_dtype=; the first is the default, None of a scaled format: its own dtype

    def __str__(self) -> str:
        columns = (f"{name} {', '.join(getattr(self, name))}" for name in COLUMNS)
        return f"{self.storage} storage: {'; '.join(columns)}"


COLUMNS = ("parameters", "delta", "inter_out", "out")
TABLE = {
    row.storage: row
    for row in (
        Row("bfloat16", _ALL, ("bfloat16",), ("bfloat16", "float32", SCALED_FP16), ("bfloat16", "float32")),
        Row("float16", _ALL, ("float16",), ("float16", "float32", SCALED_FP16), ("float16", "float32")),
        Row("float32", _ALL, _ALL, (*_ALL, SCALED_FP16), ("float32", "bfloat16", "float16")),
        Row(SCALED_FP16, _ALL, _ALL, (*_ALL, SCALED_FP16), _ALL),
    )
}


def markdown() -> str:
    """The table as the README has it."""
    heads = ("sources, partial sum", "queries, weights", "`delta`", "`inter_out`", "`out_dtype`")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in TABLE.values():
        cells = (row.storage, *(", ".join(getattr(row, column)) for column in COLUMNS))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check(storage: str, column: str, argument: str, found: str) -> None:
    """Refuses what the table does not list, with the row."""
    row = TABLE[storage]
    if found not in getattr(row, column):
        raise ValueError(f"{argument} is {found}; allowed with {row}")


def features(
    storage: set[torch.dtype],
    scaled: bool = False,
    seed: int | None = None,
    stored: Sequence[torch.dtype] = (),
    gradients: Sequence[torch.Tensor] = (),
) -> tuple[str, ...]:
    """What a launch asks for beyond one dtype of all its storage tensors: what `Spec.features` has.

    storage: the dtypes of what it reads or updates, and of all `gradients`; stored: of what else it makes.
    """
    every = storage.union(stored)
    if len(every) == 1 and not scaled and seed is None:
        return ()
    found = ["mixed storage dtypes"] * (len(every) > 1)
    if len(every) > 1 and torch.float32 in every:
        found.append(
            "float32 beside 16-bit storage" if torch.float32 in storage else "float32 results of 16-bit storage"
        )
    found += ["scaled fp16"] * scaled
    found += ["gradients of several dtypes"] * (len({gradient.dtype for gradient in gradients}) > 1)
    return (*found, *("stochastic rounding",) * (seed is not None))
