"""Named inputs: the shapes, dtypes and formats (formats.py) and kinds of values that the accuracy report and the tests run every
operation on. `KINDS` describes the kinds of values: all of them, gradients of them and their squares in a row stay
inside fp16's range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnres import oracle
from attnres.backend import MAX_SOURCES
from attnres.formats import DTYPES, MAIN, OTHERS, Format, torch_dtype
from attnres.scaled import ScaledTensor

OPS = ("mix", "phase1", "phase2", "step")
KINDS: Mapping[str, str] = {
    "normal": "unit normals, logits of standard deviation 1.5",
    "outliers": "every eighth token has four channels 200 times as large (massive activations)",
    "depth": "source i has RMS 0.15 * 2^(9 i / (L - 1)): residual streams grow with depth",
    "ties": "all sources within 2^-6 of a common one: logits nearly tie, query gradients cancel",
    "peaked": "logits of standard deviation 24: one source takes nearly all the weight, the others' gradients are tiny",
    "captured": "real activations: the ones in data/ (D = 384, up to 13 sources), or a file of the user's",
}
EPS = 1e-6
OUTPUT_EPS = 1e-5
SEED = 2**40 + 7  # of stochastic rounding


@dataclass(frozen=True)
class Shape:
    """T tokens of D elements, L sources (for phase 2 and the step: the last one is the partial sum), S queries."""

    tokens: int
    hidden_size: int
    sources: int
    queries: int = 1
    key_weight: bool = True
    output_norm: bool = True
    delta: bool = True
    scale: float = 1.0
    # of the direct mix: 0 saves the mixed residual for the backward of the output norm
    checkpoint_level: int = 1

    def for_op(self, op: str) -> str:
        sizes = f"T{self.tokens} D{self.hidden_size} "
        if op == "phase1":
            return sizes + f"N{self.sources} S{self.queries}" + (" w" if self.key_weight else "")
        flags = " w" * self.key_weight + " norm" * self.output_norm
        flags += " add" * (self.delta and op in ("phase2", "step")) + " saved" * (not self.checkpoint_level)
        return sizes + (f"L{self.sources}" if op != "phase2" else f"N{max(1, self.sources - 1)}") + flags


@dataclass(frozen=True)
class Capture:
    """Activations from a file."""

    name: str
    sources: Tensor  # [L, T, D]
    queries: Tensor | None = None  # [S, D]
    rms_weight: Tensor | None = None  # [D]


@dataclass(frozen=True)
class Case:
    """One call: the public arguments by name with one token axis, and gradients of the outputs by name (none for the
    step)."""

    op: str
    shape: Shape
    kind: str
    dtype: str
    arguments: dict[str, Any]
    grad_outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of sources, outputs and their gradients."""
        return DTYPES[self.dtype].dtype

    @property
    def shape_name(self) -> str:
        return self.shape.for_op(self.op)

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.shape_name} {self.kind}"


_BASE_KINDS = ("normal", "outliers", "depth", "ties", "peaked")

Plan = tuple[tuple[Shape, tuple[str, ...], tuple[str, ...]], ...]  # shape, kinds, dtypes

_CPU: Plan = (
    (Shape(5, 72, 4, 3), _BASE_KINDS, MAIN),
    (Shape(3, 37, 1, 1, key_weight=False, output_norm=False, delta=False), ("normal",), MAIN),
    (Shape(2, 130, 9, 2, output_norm=False, scale=0.5), ("normal", "outliers"), ("bf16", "fp32")),
    (Shape(4, 384, 13, 2), ("captured",), MAIN),
    # error against depth, all else equal
    *((Shape(2, 64, sources), ("normal",), ("bf16",)) for sources in (2, 4, 8, 16)),
    (Shape(3, 40, 3, 2), ("normal",), OTHERS),
)
CPU_PLAN: Mapping[str, Plan] = {
    "mix": (*_CPU, (Shape(5, 72, 4, checkpoint_level=0), ("normal",), MAIN)),
    "phase1": _CPU,
    "phase2": _CPU,
    "step": _CPU,
}
_PLAIN = {"key_weight": False, "output_norm": False, "delta": False}
_CAPTURED: Plan = ((Shape(144, 384, 13, 8), ("captured",), MAIN),)
_FORMATS: Plan = ((Shape(67, 512, 3, 4), ("normal",), OTHERS),)  # small: each format compiles kernels of its own
_BF16 = (("normal", "outliers"), ("bf16",))
GPU_PLAN: Mapping[str, Plan] = {
    "mix": (
        (Shape(517, 2304, 9), _BASE_KINDS, MAIN),
        (Shape(8192, 7168, 9, **_PLAIN), ("normal",), ("bf16",)),
        (Shape(331, 7168, 9), *_BF16),
        (Shape(1031, 4096, 5, output_norm=False, scale=0.5), *_BF16),
        (Shape(1031, 2048, 17, **_PLAIN), *_BF16),
        (Shape(263, 384, 29), *_BF16),
        (Shape(67, 7186, 5), *_BF16),
        (Shape(1, 7168, 1), *_BF16),
        (Shape(517, 2304, 9, checkpoint_level=0), ("normal",), MAIN),
        *_FORMATS,
        *_CAPTURED,
    ),
    "phase1": (
        (Shape(517, 2048, 8, 16), _BASE_KINDS, MAIN),
        (Shape(131, 7168, 8, 24), *_BF16),
        (Shape(1031, 2048, 4, 8, key_weight=False), *_BF16),
        (Shape(515, 4096, 8, 16, key_weight=False, scale=0.5), *_BF16),
        (Shape(259, 384, 29, 5), *_BF16),
        (Shape(67, 7186, 3, 2), *_BF16),
        (Shape(1, 2304, 1, 1), *_BF16),
        *_FORMATS,
        *_CAPTURED,
    ),
    "phase2": (
        (Shape(1031, 4096, 9), _BASE_KINDS, MAIN),
        (Shape(16384, 2048, 5, **_PLAIN), ("normal",), ("bf16",)),
        (Shape(1031, 7168, 9), *_BF16),
        (Shape(517, 2304, 5, output_norm=False), *_BF16),
        (Shape(67, 7186, 5), *_BF16),
        (Shape(1, 384, 2, **_PLAIN), *_BF16),
        *_FORMATS,
        *_CAPTURED,
    ),
    "step": (
        (Shape(259, 7168, 9), _BASE_KINDS, MAIN),
        (Shape(8192, 7168, 9), ("normal",), ("bf16",)),
        (Shape(1, 7168, 9), *_BF16),
        (Shape(67, 2304, 17, output_norm=False), *_BF16),
        (Shape(64, 2048, 1), *_BF16),
        (Shape(67, 7186, 5, key_weight=False), *_BF16),
        *_FORMATS,
        *_CAPTURED,
    ),
}


@cache
def captured_sources() -> Capture:
    """The shipped activations: sources [13, 144, 384] in float32."""
    with resources.as_file(resources.files("attnres") / "data" / "captured_sources.safetensors") as path:
        return load_capture(path)


def load_capture(path: str | Path) -> Capture:
    """Activations from a safetensors file of these tensors, each of bfloat16, float16, float32 or float64 and finite:

    - sources [L, T, D], 1 to 64 sources: the embedding and the sublayer outputs (or finished blocks) of T tokens;
    - queries [S, D], optional: trained pseudo-queries, else random ones;
    - rms_weight [D], optional: the key norm's trained weight, else a random one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    if "sources" not in tensors:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise ValueError(f"{path}: needs a tensor 'sources' [L, T, D]; it holds {found}")
    width = tensors["sources"].shape[-1] if tensors["sources"].dim() else 0
    wanted = {"sources": ("[L, T, D]", 3), "queries": (f"[S, {width}]", 2), "rms_weight": (f"[{width}]", 1)}
    for name in sorted(tensors.keys() - wanted):
        raise ValueError(f"{path}: unknown tensor '{name}'; allowed are sources, queries and rms_weight")
    for name, value in tensors.items():
        form, dims = wanted[name]
        if value.dim() != dims or value.shape[-1] != width or not value.numel():
            raise ValueError(f"{path}: '{name}' has shape {list(value.shape)}, expected a non-empty {form}")
        if value.dtype not in _FILE_DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FILE_DTYPES)
            raise ValueError(f"{path}: '{name}' has dtype {value.dtype}, expected one of {allowed}")
        bad = ~value.float().isfinite()
        if bad.any():
            first = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{path}: '{name}' has NaN or infinite values (in float32): {int(bad.sum())} of {bad.numel()}, the "
                f"first at {first}"
            )
    if len(tensors["sources"]) > MAX_SOURCES:
        raise ValueError(f"{path}: 'sources' has {len(tensors['sources'])} sources, at most {MAX_SOURCES} are mixed")
    floats = {name: value.float() for name, value in tensors.items()}
    return Capture(path.stem, floats["sources"], floats.get("queries"), floats.get("rms_weight"))


_FILE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def make_case(
    op: str,
    shape: Shape,
    kind: str = "normal",
    dtype: str = "bf16",
    device: torch.device | str = "cpu",
    seed: int = 0,
    capture: Capture | None = None,
) -> Case:
    """The named case; the same values for the same arguments on the same kind of device."""
    if kind == "captured":
        capture = capture or captured_sources()
        layers, tokens, width = capture.sources.shape
        shape = replace(shape, tokens=min(tokens, shape.tokens), hidden_size=width, sources=min(layers, shape.sources))
        if capture.queries is not None:
            shape = replace(shape, queries=min(len(capture.queries), shape.queries))
    values = _Values(shape, kind, DTYPES[dtype], torch.device(device), seed, capture)
    arguments, grad_outputs = {"mix": _mix, "phase1": _phase1, "phase2": _phase2, "step": _step}[op](values)
    return Case(op, shape, kind, dtype, arguments, grad_outputs)


class _Values:
    def __init__(
        self, shape: Shape, kind: str, stored_as: Format, device: torch.device, seed: int, capture: Capture | None
    ):
        self.shape, self.kind, self.stored_as, self.device, self.capture = shape, kind, stored_as, device, capture
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, generator=self.generator)

    def rows(self, count: int) -> Tensor:
        """float32 [count, T, D]: sources that are still to be stored"""
        size = (count, self.shape.tokens, self.shape.hidden_size)
        if self.kind == "captured":
            assert self.capture is not None
            wrapped = torch.arange(count) % len(self.capture.sources)
            value = self.capture.sources[wrapped, : self.shape.tokens].to(self.device)
        elif self.kind == "ties":
            value = self.normal(1, *size[1:]) + 2.0**-6 * self.normal(*size)
        else:
            value = self.normal(*size)
        if self.kind == "outliers":
            channels = torch.arange(4, device=self.device) * size[2] // 4
            value[:, ::8, channels] *= 200
        if self.kind == "depth":
            value *= 0.15 * 2 ** (9 * torch.arange(count, device=self.device) / max(1, count - 1)).view(-1, 1, 1)
        return value

    def sources(self, rows: Tensor) -> list[Tensor | ScaledTensor]:
        """float32 [count, T, D] in the sources' format"""
        return [self.stored_as.stored(value, self.stored_as.sources) for value in rows]

    def queries(self, count: int) -> Tensor:
        """[count, D] in the parameters' dtype"""
        if self.capture is not None and self.capture.queries is not None:
            return self._parameter(self.capture.queries[torch.arange(count)].to(self.device))
        deviation = 24.0 if self.kind == "peaked" else 1.5
        return self._parameter(
            self.normal(count, self.shape.hidden_size) * (deviation / math.sqrt(self.shape.hidden_size))
        )

    def key_weight(self) -> Tensor | None:
        if not self.shape.key_weight:
            return None
        if self.capture is not None and self.capture.rms_weight is not None:
            return self._parameter(self.capture.rms_weight.to(self.device))
        return self._weight()

    def output_weight(self) -> Tensor | None:
        return self._weight() if self.shape.output_norm else None

    def grad_out(self, *size: int) -> Tensor:
        return self.normal(*size).to(torch_dtype(self.stored_as.out))

    def options(self, *names: str) -> dict[str, Any]:
        """Of these keyword arguments, which say how results are stored, those that the format has."""
        out = torch_dtype(self.stored_as.out)
        found = {
            "out_dtype": None if out == self.stored_as.dtype else out,
            "storage": self.stored_as.storage,
            "stochastic_seed": SEED if self.stored_as.stochastic else None,
        }
        return {name: found[name] for name in names if found[name] is not None}

    def _weight(self) -> Tensor:
        return self._parameter(1 + 0.25 * self.normal(self.shape.hidden_size))

    def _parameter(self, value: Tensor) -> Tensor:
        return value.to(torch_dtype(self.stored_as.parameters))


def _mix(values: _Values) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shape = values.shape
    arguments = {
        "query": values.queries(1)[0],
        "residuals": values.sources(values.rows(shape.sources)),
        "rms_weight": values.key_weight(),
        "output_rms_weight": values.output_weight(),
        "rms_eps": EPS,
        "scale": shape.scale,
        **values.options("out_dtype"),
    }
    return arguments, {"out": values.grad_out(shape.tokens, shape.hidden_size)}


def _phase1(values: _Values) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shape = values.shape
    arguments = {
        "block_representations": values.sources(values.rows(shape.sources)),
        "pseudo_queries": values.queries(shape.queries),
        "eps": EPS,
        "rms_weight": values.key_weight(),
        "scale": shape.scale,
        **values.options("out_dtype", "storage", "stochastic_seed"),
    }
    out = values.grad_out(shape.queries, shape.tokens, shape.hidden_size)
    return arguments, {"out": out, "lse": values.normal(shape.queries, shape.tokens)}


def _phase2(values: _Values) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shape, stored_as = values.shape, values.stored_as
    *finished, partial, delta = values.rows(max(1, shape.sources - 1) + 2)
    query, weight = values.queries(1), values.key_weight()
    blocks = values.sources(torch.stack(finished))
    inter = oracle.phase1(blocks, query, EPS, weight, shape.scale, dtype=torch.float32)
    arguments = {
        "partial_sum": stored_as.stored(partial, stored_as.sources),
        "pseudo_query": query[0],
        "inter_out": stored_as.stored(inter.out[0], stored_as.inter_out),
        "inter_lse": inter.lse[0],
        "eps": EPS,
        "rms_weight": weight,
        "scale": shape.scale,
        "delta": stored_as.stored(delta, stored_as.delta) if shape.delta else None,
        "output_rms_weight": values.output_weight(),
        "output_rms_eps": OUTPUT_EPS,
        **values.options("out_dtype", *("storage", "stochastic_seed") * shape.delta),
    }
    gradients = {"out": values.grad_out(shape.tokens, shape.hidden_size)}
    if shape.delta:
        gradients["new_partial"] = values.normal(shape.tokens, shape.hidden_size).to(stored_as.dtype)
    return arguments, gradients


def _step(values: _Values) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shape, stored_as = values.shape, values.stored_as
    count = shape.sources - 1
    *finished, prefix, delta = values.rows(count + 2)
    # two blocks not finished yet: nothing may read them
    blocks = torch.full((shape.tokens, count + 2, shape.hidden_size), math.nan, device=values.device)
    for index, block in enumerate(finished):
        blocks[:, index] = block
    arguments = {
        "prefix": stored_as.stored(prefix, stored_as.sources),
        "delta": stored_as.stored(delta, stored_as.delta) if shape.delta else None,
        "blocks": stored_as.stored(blocks, stored_as.sources),
        "norm_weight": values.key_weight(),
        "qk_weight": values.queries(1)[0],
        "output_norm_weight": values.output_weight(),
        "num_blocks": count,
        "block_write_idx": count if shape.delta else -1,
        "eps": EPS,
        "output_norm_eps": OUTPUT_EPS,
        **values.options("out_dtype", *("stochastic_seed",) * shape.delta),
    }
    return arguments, {}
