"""Which combinations of dtypes and storage formats the accuracy report and the tests run: derived from dtypes.TABLE.

For each row of the table its plain combination (every column as the sources are stored, or else the column's first entry),
then one that differs from it for every other entry of every column, then `storage="fp16_scaled"` and `stochastic_seed=`. So
every row and column is visited, and a budget that breaks or a backend that refuses points at the one thing that differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from attnres import dtypes
from attnres.scaled import SCALED_FP16, ScaledTensor

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", SCALED_FP16: SCALED_FP16}


@dataclass(frozen=True)
class Format:
    """How the tensors of a call are stored, in the names of dtypes.TABLE."""

    sources: str  # residuals, block representations, partial sum, prefix and blocks
    parameters: str  # queries and weights
    delta: str
    inter_out: str
    out: str  # out_dtype=
    storage: str | None = None  # storage=: of phase 1's out, of phase 2's new partial sum
    stochastic: bool = False  # stochastic_seed=

    @property
    def dtype(self) -> torch.dtype:
        """Of the sources' gradients; what a ScaledTensor of them acts as."""
        return torch_dtype(dtypes.TABLE[self.sources].out[0])

    @property
    def plain_fp16(self) -> bool:
        """Whether fp16 without a scale holds sources or sums of them."""
        return "float16" in (self.sources, self.delta, self.inter_out, self.out)

    @property
    def name(self) -> str:
        """As `--dtypes` takes it: sources, /queries and weights, +what else differs from the plain combination."""
        plain = _plain(self.sources)
        text = _SHORT[self.sources]
        if self.parameters != plain.parameters:
            text += f"/{_SHORT[self.parameters]}"
        for column in ("delta", "inter_out", "out", "storage"):
            value = getattr(self, column)
            if value != getattr(plain, column):
                text += f"+{column}={_SHORT[value]}"
        return text + "+stochastic" * self.stochastic

    def stored(self, value: Tensor, storage: str) -> Tensor | ScaledTensor:
        """float32 [..., D] in a format of the table."""
        if storage == SCALED_FP16:
            return ScaledTensor.from_tensor(value, self.dtype)
        return value.to(torch_dtype(storage))


def torch_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def read(op: str, name: str) -> bool:
    """Whether the operation reads what distinguishes the format; where not, the call is another format's."""
    wanted = DTYPES[name]
    plain = _plain(wanted.sources)
    differing = [field.name for field in fields(Format) if getattr(wanted, field.name) != getattr(plain, field.name)]
    return set(differing) <= set(READ[op])


# by operation: which of a format's choices, beside that of the sources, its arguments have
READ = {
    "mix": ("parameters", "out"),
    "phase1": ("parameters", "out", "storage", "stochastic"),
    "phase2": ("parameters", "delta", "inter_out", "out", "storage", "stochastic"),
    "step": ("parameters", "delta", "out", "stochastic"),
}


def _plain(sources: str) -> Format:
    row = dtypes.TABLE[sources]
    parameters, delta, inter_out, out = (
        sources if sources in entries else entries[0] for entries in (getattr(row, name) for name in dtypes.COLUMNS)
    )
    return Format(sources, parameters, delta, inter_out, out)


def _all() -> Iterator[Format]:
    for row in dtypes.TABLE.values():
        plain = _plain(row.storage)
        yield plain
        for column in dtypes.COLUMNS:
            for value in getattr(row, column):
                if value != getattr(plain, column):
                    yield replace(plain, **{column: value})
        yield replace(plain, storage=SCALED_FP16)
        if row.storage != "float32":
            yield replace(plain, stochastic=True)


_FORMATS = {found.name: found for found in _all()}
# on every shape and input of the report; the others on one
MAIN = ("bf16", "fp16", "fp32", "bf16/fp32", SCALED_FP16)
DTYPES: Mapping[str, Format] = {name: _FORMATS[name] for name in (*MAIN, *_FORMATS)}
OTHERS = tuple(name for name in DTYPES if name not in MAIN)
