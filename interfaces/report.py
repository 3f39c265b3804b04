"""The accuracy report: every operation x backend x format x shape x input, forward and gradients, against oracle and
floor.

A format (formats.py) is a combination of dtypes and storage formats: bf16, fp16, fp32, bf16 with fp32 queries and weights
and scaled fp16 run on every shape and input, every other one that dtypes.TABLE allows on one shape. `run` calls the public
functions with backend= on the named cases of inputs.py and judges every output and every gradient by numerics.py; then it
compares the backends with each other on the same inputs. A backend that refuses a case gets a row with its reason, which is
no error unless no backend of the run takes the case; where the gradient runs on another backend than asked for
(backend.choose_backward), its rows say on which and why. Where CuTe cannot run, every one of its kernels is compiled for
sm_90a instead and its registers, spills and shared memory are reported; a spill is a broken row. Where captured activations
are run, precision.py tells what 16-bit storage would lose of them, and storage.py what a storage format costs two phases:
scaled fp16 at most a quarter of bf16's error.

Not worse than Triton means: CuTe's error is at most 1 % above the larger of Triton's error and the floor, plus the
error of plain float32 evaluation. Two kernels that are equally good differ by that much: a 16-bit result rounds
another way where float32 noise pushes it over a tie, which moves the error by far less than 1 %, and float32 results
differ by their noise. For lse and weights a tenth of their budget (3 float32 ulps) is added, for hardware exp2 and
log2.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib import metadata as packages
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnres
from attnres import formats, inputs, numerics, oracle, precision, storage
from attnres.backend import BackendError
from attnres.inputs import Capture, Case, Shape
from attnres.numerics import Measurement, Quantiles, Reference
from attnres.precision import SourceRisk
from attnres.scaled import ScaledTensor
from attnres.storage import StorageError
from cute_kernels.processes import in_processes, processors

BACKENDS = ("torch", "triton", "cute")
PUBLIC: Mapping[str, Callable[..., Any]] = {
    "mix": attnres.attn_res,
    "phase1": attnres.phase_1,
    "phase2": attnres.phase_2,
    "step": attnres.attn_res_step,
}
NOT_WORSE_FACTOR = 1.01
NOT_WORSE_STATISTIC = 0.1 * numerics.STATISTIC_BUDGET
# tokens that are used of a user's file, and to compare storage formats: the interpreter is slow, and the oracle keeps ten
# float64 copies on the GPU
CAPTURE_TOKENS = {"cpu": 8, "cuda": 16384}
MOST_WORKERS = 16
WORKER_MEMORY = 8 << 30  # bytes of a GPU that are there for each
CASES_PER_WORKER = 8  # at least: a process takes seconds to start

Results = dict[str, Tensor | ScaledTensor | list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One tensor of one call."""

    op: str
    direction: str  # forward, gradient
    tensor: str
    backend: str
    dtype: str
    shape: str
    kind: str
    verdict: str  # ok, broken, refused
    error: float | None = None
    floor: float | None = None
    ratio: float | None = None
    float32: float | None = None
    budget: float | None = None
    largest: float | None = None
    largest_floor: float | None = None
    largest_budget: float | None = None
    used: float | None = None  # share of the tighter of the two budgets
    row_errors: Quantiles | None = None
    row_floors: Quantiles | None = None
    sources: int = 0  # mixed by the call
    ran_on: str = ""  # where `backend` has no kernel for the gradient: the backend that has; note says why
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """The same tensor of two backends."""

    op: str
    tensor: str
    dtype: str
    shape: str
    kind: str
    first: str
    second: str
    difference: float  # relative L2, in units of the exact result
    error_first: float
    error_second: float
    verdict: str = ""  # of CuTe against Triton: ok, worse


@dataclass(frozen=True)
class Kernel:
    """A CuTe kernel compiled for sm_90a."""

    op: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    verdict: str  # ok, broken


Judged = Row | Pair | Kernel | StorageError


@dataclass
class Report:
    metadata: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    precision_at_risk: list[SourceRisk] = field(default_factory=list)
    storage: list[StorageError] = field(default_factory=list)

    @property
    def broken(self) -> list[Judged]:
        found: list[Judged] = [row for row in self.rows if row.verdict == "broken"]
        found += [error for error in self.storage if error.verdict == "broken"]
        found += [pair for pair in self.pairs if pair.verdict == "worse"]
        return found + [kernel for kernel in self.kernels if kernel.verdict == "broken"]

    @property
    def ok(self) -> bool:
        return not self.broken


class Job(NamedTuple):
    op: str
    shape: Shape
    kind: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.shape.for_op(self.op)} {self.kind}"


def jobs(ops: Iterable[str], dtypes: Sequence[str], device: torch.device, capture: Capture | None = None) -> list[Job]:
    """The cases of a run. With a capture of the user's own, those activations only."""
    plan = inputs.GPU_PLAN if device.type == "cuda" else inputs.CPU_PLAN
    if capture is not None:
        layers, tokens, width = capture.sources.shape
        queries = 2 if capture.queries is None else len(capture.queries)
        shape = Shape(min(tokens, CAPTURE_TOKENS[device.type]), width, layers, queries)
        return [Job(op, shape, "captured", dtype) for op in ops for dtype in dtypes if formats.read(op, dtype)]
    return [
        Job(op, shape, kind, dtype)
        for op in ops
        for shape, kinds, allowed in plan[op]
        for dtype in dtypes
        for kind in kinds
        if dtype in allowed and formats.read(op, dtype)
    ]


def run(
    chosen: Sequence[Job],
    backends: Sequence[str],
    device: torch.device,
    capture: Capture | None = None,
    compile_reason: str | None = None,
    progress: Callable[[str], None] = lambda done: None,
) -> Report:
    """Runs the jobs on the backends (all of them able to run); compiles the CuTe kernels where compile_reason says
    why."""
    report = Report(describe(device))
    if any(job.kind == "captured" for job in chosen):
        captured = capture or inputs.captured_sources()
        layers, tokens, width = captured.sources.shape
        report.metadata["activations"] = f"{captured.name}: {layers} sources, {tokens} tokens, D {width}"
        report.precision_at_risk = precision.at_risk(captured.sources)
        if layers >= 3 and any(job.kind == "captured" and job.op in ("phase1", "phase2") for job in chosen):
            report.storage = storage.measure(captured.sources[:, : CAPTURE_TOKENS[device.type]], backends, device)
            progress("storage formats")
    if backends:
        evaluated = in_processes(
            _workers(len(chosen), device, capture), partial(_evaluate, backends, device, capture), chosen
        )
        for job, (rows, pairs) in zip(chosen, evaluated, strict=True):
            report.rows += rows
            report.pairs += pairs
            progress(str(job))
    if compile_reason is not None:
        report.metadata["cute"] = f"compiled, not run: {compile_reason}"
        for kernel in compiled_kernels():
            report.kernels.append(kernel)
            progress(f"compile {kernel.op}")
    return report


def _workers(cases: int, device: torch.device, capture: Capture | None) -> int:
    """Processes that so many cases are shared out to: on a GPU, most of a first run's time is its compilers'.

    One where the capture is the user's own, with few cases, since it would have to be sent with each.
    """
    if device.type == "cpu" or capture is not None:
        return 1
    room = torch.cuda.get_device_properties(device).total_memory // WORKER_MEMORY
    return max(1, min(processors() // 2, room, MOST_WORKERS, cases // CASES_PER_WORKER))


def _evaluate(
    backends: Sequence[str], device: torch.device, capture: Capture | None, job: Job
) -> tuple[list[Row], list[Pair]]:
    try:
        return evaluate(inputs.make_case(*job, device=device, capture=capture), backends)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the other workers' cases


def evaluate(case: Case, backends: Sequence[str]) -> tuple[list[Row], list[Pair]]:
    """The rows of one case, and its backends compared."""
    references = oracle.reference(case.op, case.arguments, case.grad_outputs)
    rows: list[Row] = []
    results: dict[str, Results] = {}
    refusals: dict[str, str] = {}
    for backend in backends:
        try:
            results[backend] = call(case, backend)
        except BackendError as error:
            refusals[backend] = str(error)
    for backend, reason in refusals.items():
        note = reason if results else f"no backend of this run takes it: {reason}"
        rows.append(_row(case, "forward", "", backend, "refused" if results else "broken", note=note))
    measured: dict[str, dict[str, Measurement]] = {}
    for backend, found in results.items():
        measured[backend] = numerics.judge_all(found, references)
        elsewhere = _gradient_elsewhere(case, backend)
        for name, measurement in measured[backend].items():
            rows.append(_measured_row(case, name, backend, measurement, elsewhere))
        if case.op == "step":
            rows += _in_place_rows(case, backend, found, references)
    pairs = [
        _pair(case, name, reference, (first, second), results, measured)
        for first, second in combinations(results, 2)
        for name, reference in references.items()
    ]
    return rows, pairs


def call(case: Case, backend: str) -> Results:
    """Outputs and gradients of one public call, by the names of oracle.reference; for the step, prefix and blocks
    too."""
    given = dict(case.arguments)
    if case.op == "step":
        given |= {"prefix": given["prefix"].clone(), "blocks": given["blocks"].clone()}
        out = PUBLIC["step"](**given, backend=backend)
        return {"out": out, "prefix": given["prefix"], "blocks": given["blocks"]}
    leaves = {name: _leaves(value) for name, value in given.items() if isinstance(value, (Tensor, ScaledTensor, list))}
    given |= leaves
    if case.op == "mix":
        given |= {"return_weights": True, "checkpoint_level": case.shape.checkpoint_level}
    found = PUBLIC[case.op](**given, backend=backend)
    names = {"mix": ("out", "weights"), "phase1": ("out", "lse"), "phase2": ("out", "new_partial")}[case.op]
    outputs = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=False))
    flat = [_node(leaf) for value in leaves.values() for leaf in (value if isinstance(value, list) else [value])]
    upstream = case.grad_outputs
    grads = iter(torch.autograd.grad([_node(outputs[name]) for name in upstream], flat, list(upstream.values())))
    results: Results = {name: value.detach() for name, value in outputs.items()}
    for name, value in leaves.items():
        results[f"d_{name}"] = [next(grads) for _ in value] if isinstance(value, list) else next(grads)
    return results


def compiled_kernels() -> Iterator[Kernel]:
    """Every CuTe kernel, compiled for sm_90a and inspected."""
    from cute_kernels.inspect import compile_all

    for found in compile_all():
        verdict = "broken" if found.spill_bytes else "ok"
        counts = dict(found.instructions)
        yield Kernel(found.op, found.config, found.registers, found.spill_bytes, found.shared_bytes, counts, verdict)


def describe(device: torch.device) -> dict[str, str]:
    """Where and with what a run was made."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "kernel sources": source_digest(),
    }
    for package in ("attnres", "torch", "triton", "nvidia-cutlass-dsl"):
        try:
            found[package] = packages.version(package)
        except packages.PackageNotFoundError:
            found[package] = "not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        found["triton"] += " (interpreter)"
    return found


def source_digest() -> str:
    """sha256 over the paths and contents of the Python sources of attnres, cute_kernels and triton_ref, sorted by
    path."""
    import cute_kernels
    import triton_ref

    digest = hashlib.sha256()
    for package in (attnres, cute_kernels, triton_ref):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _leaves(value: Any) -> Any:
    if isinstance(value, list):
        return [_leaves(each) for each in value]
    return value.detach().clone().requires_grad_()


def _node(value: Tensor | ScaledTensor) -> Tensor:
    """Its place in the autograd graph."""
    return value if isinstance(value, Tensor) else value.stand_in


def _row(case: Case, direction: str, tensor: str, backend: str, verdict: str, **numbers: Any) -> Row:
    where = (case.op, direction, tensor, backend, case.dtype, case.shape_name, case.kind)
    return Row(*where, verdict, sources=case.shape.sources, **numbers)


def _gradient_elsewhere(case: Case, backend: str) -> dict[str, str]:
    """ran_on and note of the rows of a gradient that runs on another backend than its forward."""
    found = attnres.explain(PUBLIC[case.op], **case.arguments, backend=backend)
    if found.backward in (None, backend):
        return {}
    *_, of_gradient = found.refusals.values()
    return {"ran_on": str(found.backward), "note": str(of_gradient[backend])}


def _measured_row(case: Case, name: str, backend: str, found: Measurement, elsewhere: Mapping[str, str]) -> Row:
    gradient = name.startswith("d_")
    return _row(
        case,
        "gradient" if gradient else "forward",
        name,
        backend,
        "ok" if found.ok else "broken",
        **(elsewhere if gradient else {}),
        error=found.error,
        floor=found.floor,
        ratio=found.ratio,
        float32=found.float32,
        budget=found.budget,
        largest=found.largest,
        largest_floor=found.largest_floor,
        largest_budget=found.largest_budget,
        used=found.severity,
        row_errors=found.row_errors,
        row_floors=found.row_floors,
    )


def _in_place_rows(case: Case, backend: str, found: Results, references: Mapping[str, Reference]) -> Iterator[Row]:
    """Of what a step leaves in place; a prefix that is rounded stochastically is among the references."""
    for name, expected in oracle.after_step(case.arguments).items():
        if name in references:
            continue
        got = found[name]
        assert not isinstance(got, list)
        differing = numerics.differing_elements(got, expected)
        note = f"{differing} elements differ" if differing else "in place, to the bit"
        used = math.inf if differing else 0.0
        yield _row(case, "forward", name, backend, "broken" if differing else "ok", used=used, note=note)


def _pair(
    case: Case,
    name: str,
    reference: Reference,
    backends: tuple[str, str],
    results: Mapping[str, Results],
    measured: Mapping[str, Mapping[str, Measurement]],
) -> Pair:
    first, second = backends
    values = [results[backend][name] for backend in backends]
    # one source after the other: their float64 copies need not fit together
    parts: list[Any] = (
        list(zip(*values, reference.exact, strict=True)) if reference.per_source else [(*values, reference.exact)]
    )
    size = sum(float(exact.square().sum()) for _, _, exact in parts) ** 0.5 or 1.0
    errors = {
        backend: sum(float((part[index].to(torch.float64) - part[2]).square().sum()) for part in parts) ** 0.5 / size
        for index, backend in enumerate(backends)
    }
    differences = (a.to(torch.float64) - b.to(torch.float64) for a, b, _ in parts)
    difference = sum(float(each.square().sum()) for each in differences) ** 0.5 / size
    verdict = ""
    if set(backends) == {"cute", "triton"}:
        fine = not_worse(errors["cute"], errors["triton"], measured["cute"][name], reference.kind)
        verdict = "ok" if fine else "worse"
    where = (case.op, name, case.dtype, case.shape_name, case.kind)
    return Pair(*where, first, second, difference, errors[first], errors[second], verdict)


def not_worse(cute: float, triton: float, measured: Measurement, kind: numerics.Kind) -> bool:
    """Whether CuTe's error is Triton's, within the tolerance of the module's docstring; `measured` has floor and
    float32."""
    allowed = NOT_WORSE_FACTOR * max(triton, measured.floor) + measured.float32
    return cute <= allowed + (NOT_WORSE_STATISTIC if kind == "statistic" else 0.0)
