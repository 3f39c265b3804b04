"""What the CuTe kernels take: all limits. Their tiles are in config_<kernel>.py.

Everything is a function of the problem's static shape, so nothing is ever tuned in a user's call. Imports neither the DSL nor the
kernels: the interface layer reads this module at dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

MAX_HIDDEN_SIZE = 8192
MAX_SOURCES = 32
ALIGNMENT = 16  # bytes: what a bulk copy and a 16-byte store need of every row's address
SCALED_FP16 = "fp16_scaled"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
PARAMETER_DTYPES = DTYPES | {torch.float32: "fp32"}
PHASE1_OPS = ("phase1_fwd", "phase1_bwd")
STORAGE = ("mixed storage dtypes", "float32 results of 16-bit storage", "scaled fp16")
# What launches may ask for beyond one dtype of all storage tensors (dtypes.features), by op.
FEATURES = {
    "mix_fwd": STORAGE,
    "mix_bwd": ("mixed storage dtypes", "scaled fp16"),
    "phase1_fwd": ("mixed storage dtypes", "scaled fp16", "stochastic rounding"),
    "phase1_bwd": ("mixed storage dtypes", "scaled fp16", "stochastic rounding"),
    "phase2_fwd": (*STORAGE, "stochastic rounding"),
    "phase2_bwd": ("mixed storage dtypes", "scaled fp16"),
    "serve_step": (*STORAGE, "stochastic rounding"),
}

LANES = 32
VECTOR = 8  # elements of 16 bytes
ITEM_BYTES = 2
SHARED_BYTES = 227 * 1024


def refusal(
    *,
    op: str,
    dtype: torch.dtype,
    hidden_size: int,
    num_sources: int,
    num_queries: int,
    byte_alignment: int,
    features: tuple[str, ...] = (),
) -> str | None:
    """Why the CuTe backend cannot take this call, or None. All limits are stated here."""
    missing = [feature for feature in features if feature not in FEATURES.get(op, ())]
    if missing:
        return f"{op} has no CuTe kernel yet for {' and '.join(missing)}"
    if op in PHASE1_OPS:
        from cute_kernels.config_phase1 import phase1_refusal
        from cute_kernels.config_phase1_bwd import phase1_bwd_refusal

        refuses = phase1_refusal if op == "phase1_fwd" else phase1_bwd_refusal
        return refuses(
            dtype=dtype,
            hidden_size=hidden_size,
            num_sources=num_sources,
            num_queries=num_queries,
            byte_alignment=byte_alignment,
        )
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} is not supported by {op}: use bfloat16 or float16"
    if hidden_size % VECTOR or not VECTOR <= hidden_size <= MAX_HIDDEN_SIZE:
        return f"hidden size {hidden_size} must be a multiple of {VECTOR} and at most {MAX_HIDDEN_SIZE}"
    most = MAX_SOURCES + (op == "serve_step")
    if not op.startswith("phase2") and not 1 <= num_sources <= most:
        return f"{num_sources} sources: {op} takes 1 to {most}" + (" (blocks and prefix)" if op == "serve_step" else "")
    if byte_alignment < ALIGNMENT:
        return f"every row must start at a multiple of {ALIGNMENT} bytes, not of {byte_alignment}"
    if op == "mix_bwd":
        from cute_kernels.config_mix_bwd import mix_bwd_refusal

        return mix_bwd_refusal(hidden_size, num_sources)
    return None


@dataclass(frozen=True)
class QueryGradConfig:
    """Static configuration of query_grad: dtypes as in RowConfig; sizes are dynamic."""

    query: str | None  # read for d_key_weight
    key_weight: str | None
    d_query: str
    d_key_weight: str | None
    d_output_weight: str | None = None  # of the partials' last row
    warps: ClassVar[int] = 8

    @property
    def shared_bytes(self) -> int:
        return self.warps * LANES * 4


def query_grad_config(
    query: torch.dtype | None,
    key_weight: torch.dtype | None,
    d_query: torch.dtype,
    d_key_weight: torch.dtype | None,
    d_output_weight: torch.dtype | None = None,
) -> QueryGradConfig:
    names = PARAMETER_DTYPES | {None: None}
    return QueryGradConfig(names[query], names[key_weight], names[d_query], names[d_key_weight], names[d_output_weight])


def representative_configs() -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """(op, build, config) of shapes that real models have and of every path through the kernels."""
    from cute_kernels import query_grad

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtypes in (
        (bf16, bf16, bf16, bf16),
        (fp32, bf16, fp32, bf16, fp16),
        (None, None, fp16, None),
        (fp32, bf16, fp32, bf16),
        (None, fp16, fp16, None),
    ):
        yield "query_grad", query_grad.build, query_grad_config(*dtypes)
    from cute_kernels.config_mix_bwd import mix_bwd_configs
    from cute_kernels.config_phase1 import phase1_configs
    from cute_kernels.config_phase1_bwd import phase1_bwd_configs
    from cute_kernels.config_phase2_bwd import phase2_bwd_configs
    from cute_kernels.config_rows import row_configs

    yield from row_configs()
    yield from mix_bwd_configs()
    yield from phase1_configs()
    yield from phase1_bwd_configs()
    yield from phase2_bwd_configs()
