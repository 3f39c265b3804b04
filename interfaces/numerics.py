"""Error metrics and budgets: what "correct" means for every backend, storage dtype and input (DESIGN 4).

Two errors are taken of a tensor against its float64 result: the relative L2 error, and the largest error of an
element in units of its row's RMS (a row is the last axis). The **rounding floor** is the same pair for the exact
result rounded once to the tensor's dtype. No kernel can be below it, and one with float32 arithmetic inside and one
rounding at the end is at it.

| kind      | relative L2 error <=            | largest error <=                          |
| --------- | ------------------------------- | ----------------------------------------- |
| output    | max(1.05 floor, 4 float32)      | 1.5 floor's largest + 4 float32's largest |
| gradient  | max(1.25 floor, 4 float32)      | the same                                  |
| statistic | max(2e-6, 4 float32)            | the same + 1e-5                           |

`float32` is the error of evaluating the formula in float32. For a 16-bit output it is four orders below the floor and
plays no part. It decides for float32 storage, whose floor no float32 arithmetic can reach, and where cancellation
makes even float32 worse than a 16-bit floor. The maximum has no jump: were 4 float32 allowed only once float32 passes
the floor, a kernel exactly as good as float32, rounded once (error sqrt(floor^2 + float32^2)), would break 1.25 floor
just before that point. For a statistic (lse, softmax weights) 2e-6 holds unless float32 itself is within 4x of it:
logits of magnitude 60 carry 60 times the absolute error of logits of 1, and an lse that happens to lie near zero has
a large relative one.

`float32` is the largest of three, so that luck does not decide: the formula by autograd, the closed form that kernels
evaluate, and the closed form's expected rounding noise. A float32 query gradient of one token and two sources has one
random number in it, and a single evaluation lands within a quarter of the noise every fifth time. With one source the
exact query gradient is zero; errors are absolute then, and float32 autograd finds exactly zero too, where d by
another sum would not. Where sources are so large that their squares leave float32's range (scaled fp16 holds them), it
is the expected noise alone.

Largest error: with y the float32 result and x the exact one, |round(y) - x| <= |round(x) - x| + 2 |y - x| for each
element. So rounding to nearest of a result twice as far off as float32 always passes; an unwritten, swapped or
shifted element, or one ulp too many in one of a row's largest elements, fails. A row whose RMS is below the dtype's
normal numbers (fp16: 6e-5) is measured in units of the smallest of those: its rounding error no longer shrinks with
it, and one such row would widen the bound of all others. NaN or infinity where the exact result has none fails
always. A tensor without elements passes.

Storage in scaled fp16 has its own floor: that of the exact result with a scale of its own for each row. Stochastic
rounding has two neighbours in place of one nearest number: an element is in budget if it is a neighbour of a number
within 4 float32 of the exact one, and the floor is what such rounding errs by on average (sqrt(2) of rounding to
nearest).

How the errors are spread over the rows is measured too (`Quantiles`) and plays no part in the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnres import scaled
from attnres.scaled import SCALED_FP16, ScaledTensor

Kind = Literal["output", "gradient", "statistic"]

FLOOR_FACTOR: dict[str, float] = {"output": 1.05, "gradient": 1.25}
FLOAT32_FACTOR = 4.0
STATISTIC_BUDGET = 2e-6
LARGEST_FLOOR_FACTOR = 1.5
# five times the relative L2 budget: the largest of some ten thousand errors of that RMS
STATISTIC_LARGEST_BUDGET = 1e-5
# below this even float32 loses bits, where subnormal numbers are flushed to zero: 2^24 times the smallest normal one
FLOAT32_RESOLVED = 2.0**-102


@dataclass(frozen=True)
class Reference:
    """The exact value of one tensor and what float32 makes of it; oracle.reference gives them."""

    exact: Tensor  # float64
    kind: Kind
    plain32: tuple[Tensor, ...] = ()  # float32 evaluations
    noise: Tensor | None = None  # expected float32 error of each element (one standard deviation)
    per_source: bool = False  # stacked [L, ...] here, L tensors in the public interface: each one has its own budget
    stochastic: bool = False  # the result is rounded to one of its neighbours at random

    def __getitem__(self, index: int) -> Reference:
        noise = None if self.noise is None else self.noise[index]
        plain32 = tuple(value[index] for value in self.plain32)
        return Reference(self.exact[index], self.kind, plain32, noise, stochastic=self.stochastic)


@dataclass(frozen=True)
class Quantiles:
    """Over the rows of a tensor: the RMS error of a row in units of that row's RMS."""

    p10: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0


_LEVELS = (0.1, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Measurement:
    """Errors of one tensor beside its rounding floor and budget."""

    error: float  # relative L2 (absolute where the exact result is zero)
    floor: float
    float32: float  # relative L2 error of plain float32 evaluation
    largest: float  # largest error of an element in units of its row's RMS
    largest_floor: float
    budget: float
    largest_budget: float
    worst_row: int  # index of the row with the largest error, over all leading dimensions flattened
    row_errors: Quantiles = Quantiles()
    row_floors: Quantiles = Quantiles()

    @property
    def ratio(self) -> float:
        """error / floor"""
        return self.error / self.floor if self.floor else (0.0 if self.error == 0 else math.inf)

    @property
    def ok(self) -> bool:
        return self.error <= self.budget and self.largest <= self.largest_budget

    @property
    def severity(self) -> float:
        """How much of the budget is used: 1 is all of it."""
        return max(_share(self.error, self.budget), _share(self.largest, self.largest_budget))


@dataclass(frozen=True)
class Verdict:
    """A measurement and what was measured."""

    op: str
    tensor: str
    backend: str
    dtype: str
    shape: str
    measurement: Measurement

    @property
    def ok(self) -> bool:
        return self.measurement.ok

    def __str__(self) -> str:
        m = self.measurement
        return (
            f"{self.op} on backend {self.backend!r}: {self.tensor} ({self.dtype}, {self.shape}) has relative L2 error "
            f"{m.error:.3g} (budget {m.budget:.3g}, rounding floor {m.floor:.3g}) and largest error {m.largest:.3g} of "
            f"the row's RMS in row {m.worst_row} (budget {m.largest_budget:.3g}, rounding floor {m.largest_floor:.3g})"
        )


class NumericsError(RuntimeError):
    """A result is outside its error budget; `verdict` has the numbers."""

    def __init__(self, verdict: Verdict):
        super().__init__(str(verdict))
        self.verdict = verdict


def judge(
    actual: Tensor | ScaledTensor,
    exact: Tensor,
    *,
    kind: Kind,
    plain32: Tensor | Sequence[Tensor] | None = None,
    noise: Tensor | None = None,
    stochastic: bool = False,
) -> Measurement:
    """Errors of `actual` against the unrounded float64 result `exact` of the same shape, and whether they are within
    budget.

    plain32: what float32 evaluation gives, once or more often; needed for float32 outputs and gradients. noise: the
    expected float32 error of each element. stochastic: `actual` was rounded to one of its neighbours at random.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}, exact {tuple(exact.shape)}")
    plain = [plain32] if isinstance(plain32, Tensor) else list(plain32 or ())
    storage: torch.dtype | str = SCALED_FP16 if isinstance(actual, ScaledTensor) else actual.dtype
    if kind != "statistic" and not plain and storage not in (torch.bfloat16, torch.float16, SCALED_FP16):
        raise ValueError(f"a {storage} {kind} is judged by the error of float32 evaluation: plain32 is missing")
    if not actual.shape.numel():
        return Measurement(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, worst_row=0)
    exact = exact.double()
    if stochastic:
        return _judge_stochastic(actual, exact, [*plain, *(() if noise is None else (exact + noise.double(),))])
    rounded = scaled.rounded(exact, storage)
    measured = actual.to(torch.float64)
    special = ~rounded.isfinite()
    if special.any():
        # overflow of the storage dtype, or NaN inputs: the result must be the same there, and is left out of the rest
        if not torch.equal(measured[special].nan_to_num(nan=0.25), rounded[special].nan_to_num(nan=0.25)):
            measured = torch.full_like(measured, math.nan)
        exact, rounded, measured = (value.masked_fill(special, 0.0) for value in (exact, rounded, measured))
    norms = _Norms(exact, storage)
    floor, largest_floor, _ = norms.of(rounded - exact)
    error, largest, worst_row = norms.of(measured - exact)
    differences: Iterable[Tensor] = (value.double() - exact for value in plain)
    arithmetic = [norms.of(difference.masked_fill(special, 0.0)) for difference in differences]
    if noise is not None:
        arithmetic.append(norms.of(noise.double().masked_fill(special, 0.0)))
    float32 = max((found[0] for found in arithmetic), default=0.0)
    float32_largest = max((found[1] for found in arithmetic), default=0.0)
    base = STATISTIC_BUDGET if kind == "statistic" else FLOOR_FACTOR[kind] * floor
    extra = STATISTIC_LARGEST_BUDGET if kind == "statistic" else 0.0
    return Measurement(
        error=error,
        floor=floor,
        float32=float32,
        largest=largest,
        largest_floor=largest_floor,
        budget=max(base, FLOAT32_FACTOR * float32),
        largest_budget=LARGEST_FLOOR_FACTOR * largest_floor + FLOAT32_FACTOR * float32_largest + extra,
        worst_row=worst_row,
        row_errors=norms.over_rows(measured - exact),
        row_floors=norms.over_rows(rounded - exact),
    )


def _judge_stochastic(actual: Tensor | ScaledTensor, exact: Tensor, plain: Sequence[Tensor]) -> Measurement:
    scale = torch.ones_like(exact[..., :1])
    if isinstance(actual, ScaledTensor):
        scale, values, storage = actual.scale.double().unsqueeze(-1), actual.values, SCALED_FP16
    else:
        values, storage = actual, actual.dtype  # type: ignore[assignment]
    measured = actual.to(torch.float64)
    float32 = torch.stack([2.0**-24 * exact.abs(), *((value.double() - exact).abs() for value in plain)]).amax(0)
    slack = FLOAT32_FACTOR * float32
    low, high = (
        _neighbour(x / scale, values.dtype, up) * scale for x, up in ((exact - slack, False), (exact + slack, True))
    )
    inside = (low <= measured) & (measured <= high) | exact.isnan() & measured.isnan()
    # Beyond the largest finite number there is no distance to measure.
    special = inside & ~(low.isfinite() & high.isfinite())
    exact, low, high, measured = (value.masked_fill(special, 0.0) for value in (exact, low, high, measured))
    norms = _Norms(exact, storage)
    below, above = (_neighbour(exact / scale, values.dtype, up) * scale for up in (False, True))
    expected = ((exact - below) * (above - exact)).clamp_min(0).sqrt()
    found = (measured - exact).masked_fill(~inside, math.nan)
    floor, largest_floor, _ = norms.of(expected)
    error, largest, worst_row = norms.of(found)
    budget, largest_budget, _ = norms.of(torch.maximum(exact - low, high - exact))
    return Measurement(
        error=error,
        floor=floor,
        float32=norms.of(float32.masked_fill(special, 0.0))[0],
        largest=largest,
        largest_floor=largest_floor,
        budget=budget,
        largest_budget=largest_budget,
        worst_row=worst_row,
        row_errors=norms.over_rows(found),
        row_floors=norms.over_rows(expected),
    )


def _neighbour(exact: Tensor, dtype: torch.dtype, up: bool) -> Tensor:
    """The nearest number of a 16-bit dtype that is not below (above) float64 `exact`; itself where the dtype has it."""
    nearest = exact.to(dtype)
    bits = nearest.view(torch.int16).to(torch.int32)
    order = torch.where(bits < 0, -(bits & 0x7FFF), bits)  # integers in the order of the numbers
    wrong = nearest.double() < exact if up else nearest.double() > exact
    order = torch.where(wrong, order + (1 if up else -1), order)
    bits = torch.where(order < 0, -order - 0x8000, order).to(torch.int16)
    return torch.where(nearest.isnan(), math.nan, bits.view(dtype).double())


def judge_reference(actual: Tensor | ScaledTensor | Sequence[Tensor], reference: Reference) -> Measurement:
    """`judge` against an oracle.reference. The gradients of several sources are judged one by one; returns the
    worst."""
    if reference.per_source:
        return max((judge_reference(part, reference[i]) for i, part in enumerate(actual)), key=_severity)
    assert isinstance(actual, (Tensor, ScaledTensor))
    return judge(
        actual,
        reference.exact,
        kind=reference.kind,
        plain32=reference.plain32,
        noise=reference.noise,
        stochastic=reference.stochastic,
    )


def judge_all(
    actual: Mapping[str, Tensor | ScaledTensor | Sequence[Tensor]], references: Mapping[str, Reference]
) -> dict[str, Measurement]:
    """`judge_reference` for each named tensor; every reference must have its tensor."""
    return {name: judge_reference(actual[name], reference) for name, reference in references.items()}


class _Norms:
    """Norms of an error in units of the exact result: of the whole tensor, and of each row."""

    def __init__(self, exact: Tensor, storage: torch.dtype | str):
        self.whole = float(exact.norm()) or 1.0
        rms = exact.square().mean(-1, keepdim=True).sqrt() if exact.dim() else exact.abs()
        # a row that is exactly zero is measured in units of the tensor's RMS
        rms = torch.where(rms > 0, rms, float(exact.square().mean().sqrt()) or 1.0)
        smallest = 0.0 if isinstance(storage, str) else torch.finfo(storage).tiny
        self.rows = rms.clamp_min(max(smallest, FLOAT32_RESOLVED))

    def of(self, error: Tensor) -> tuple[float, float, int]:
        """Relative L2 error, largest error, and the row it is in."""
        size = (error.abs() / self.rows).nan_to_num(nan=math.inf)
        position = int(size.argmax())
        largest = float(size.flatten()[position])
        whole = float(error.norm()) / self.whole if math.isfinite(largest) else math.inf
        return whole, largest, position // (size.shape[-1] if size.dim() else 1)

    def over_rows(self, error: Tensor) -> Quantiles:
        """How the errors of the rows are spread; each quantile is the error of the row nearest to it."""
        squares = error.square().mean(-1, keepdim=True) if error.dim() else error.square()
        found = (squares.sqrt() / self.rows).nan_to_num(nan=math.inf).flatten().sort().values
        places = [round(level * (found.numel() - 1)) for level in _LEVELS]
        return Quantiles(*found[places].tolist())


def differing_elements(actual: Tensor | ScaledTensor, expected: Tensor | ScaledTensor) -> int:
    """How many elements of two tensors of one format differ in their bits; NaN equals the same NaN."""
    if isinstance(actual, ScaledTensor) and isinstance(expected, ScaledTensor):
        return sum(
            differing_elements(*pair) for pair in ((actual.values, expected.values), (actual.scale, expected.scale))
        )
    assert isinstance(actual, Tensor)
    assert isinstance(expected, Tensor)
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    return int((actual.contiguous().view(bits) != expected.contiguous().view(bits)).sum())


def _severity(measurement: Measurement) -> float:
    return measurement.severity


def _share(value: float, budget: float) -> float:
    return value / budget if budget else (0.0 if value == 0 else math.inf)
