"""What the public functions accept.

Each check raises before anything is launched, naming the argument, its value and what is allowed. The checks read only metadata
(type, shape, dtype, device, strides), so torch.compile can trace through them; addresses are read at launch (`byte_alignment`).
Nothing is cast or copied to make an argument fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres.backend import MAX_SOURCES, Spec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TOKENS = 2**31 - 1


def check_mix(
    query: Tensor,
    residuals: Sequence[Tensor] | Tensor,
    rms_weight: Tensor | None = None,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    return_weights: bool = False,
    checkpoint_level: int = 1,
) -> list[Tensor]:
    """Checks attn_res's arguments; returns the residuals as a list: L tensors [..., D], or the one stacked [L, ..., D]."""
    sources, first = _sources("residuals", residuals)
    _query("query", query, first)
    _parameter("rms_weight", rms_weight, first)
    _parameter("output_rms_weight", output_rms_weight, first)
    _eps("rms_eps", rms_eps)
    _number("scale", scale)
    if checkpoint_level not in (0, 1):
        raise ValueError(
            f"checkpoint_level is {checkpoint_level!r}; allowed are 0 (keep the mixed residual) and 1 (recompute)"
        )
    return sources


def check_phase_1(
    block_representations: Sequence[Tensor] | Tensor,
    pseudo_queries: Tensor,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
) -> list[Tensor]:
    """Checks phase_1's arguments; returns the block representations as a list, as check_mix does."""
    sources, first = _sources("block_representations", block_representations)
    _floating("pseudo_queries", pseudo_queries, first)
    size = first.shape[-1]
    if pseudo_queries.dim() != 2 or pseudo_queries.shape[1] != size or pseudo_queries.shape[0] == 0:
        raise ValueError(
            f"pseudo_queries has shape {_shape(pseudo_queries)}; allowed is [S, D] with S >= 1 and D = {size}"
        )
    if rms_weight is not None:
        _floating("rms_weight", rms_weight, first)
        if tuple(rms_weight.shape) not in ((size,), tuple(pseudo_queries.shape)):
            raise ValueError(
                f"rms_weight has shape {_shape(rms_weight)}; allowed are [{size}] and {_shape(pseudo_queries)}"
            )
    _eps("eps", eps)
    _number("scale", scale)
    return sources


def check_phase_2(
    partial_sum: Tensor,
    pseudo_query: Tensor,
    inter_out: Tensor,
    inter_lse: Tensor,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    delta: Tensor | None = None,
    output_rms_weight: Tensor | None = None,
    output_rms_eps: float | None = None,
) -> None:
    """Checks phase_2's arguments."""
    _storage("partial_sum", partial_sum)
    _like("inter_out", inter_out, "partial_sum", partial_sum)
    if delta is not None:
        _like("delta", delta, "partial_sum", partial_sum)
    _tensor("inter_lse", inter_lse)
    if inter_lse.dtype != torch.float32 or inter_lse.shape != partial_sum.shape[:-1]:
        raise ValueError(
            f"inter_lse is {describe(inter_lse)}; allowed is float32 {list(partial_sum.shape[:-1])}, as phase_1 returns it"
        )
    _same_device("inter_lse", inter_lse, partial_sum)
    _query("pseudo_query", pseudo_query, partial_sum)
    _parameter("rms_weight", rms_weight, partial_sum)
    _parameter("output_rms_weight", output_rms_weight, partial_sum)
    _eps("eps", eps)
    if output_rms_eps is not None:
        _eps("output_rms_eps", output_rms_eps)
    _number("scale", scale)


def check_network(
    inputs: Tensor,
    pseudo_queries: Tensor,
    layers: Sequence[Any] | torch.nn.ModuleList,
    block_size: int,
    eps: float,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    output_rms_weight: Tensor | None = None,
) -> None:
    """Checks block_attn_res's arguments; what the layers return is checked as it comes (check_update)."""
    _storage("inputs", inputs)
    if isinstance(layers, torch.nn.Module) and not isinstance(layers, torch.nn.ModuleList):
        raise TypeError(f"layers is a {type(layers).__name__}; allowed are a sequence of layers and a ModuleList")
    if not isinstance(layers, (Sequence, torch.nn.ModuleList)):
        raise TypeError(f"layers is a {type(layers).__name__}; allowed are a sequence of layers and a ModuleList")
    for index, layer in enumerate(layers):
        if not callable(layer):
            raise TypeError(f"layers[{index}] is a {type(layer).__name__}; allowed is a Module or a callable")
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size is a {type(block_size).__name__}; allowed is an int")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; allowed are 1 and more")
    count = -(-len(layers) // block_size) + 1
    if count > MAX_SOURCES:
        raise ValueError(
            f"block_size is {block_size}: {len(layers)} layers and the embedding make {count} block representations; allowed are "
            f"at most {MAX_SOURCES}, block_size {-(-len(layers) // (MAX_SOURCES - 1))} and more"
        )
    size, sites = inputs.shape[-1], len(layers) + 1
    _floating("pseudo_queries", pseudo_queries, inputs)
    if tuple(pseudo_queries.shape) != (sites, size):
        raise ValueError(
            f"pseudo_queries has shape {_shape(pseudo_queries)}; allowed is [{sites}, {size}]: a row for each of the "
            f"{len(layers)} layers and one for the output"
        )
    if rms_weight is not None:
        _floating("rms_weight", rms_weight, inputs)
        if tuple(rms_weight.shape) not in ((size,), (sites, size)):
            raise ValueError(f"rms_weight has shape {_shape(rms_weight)}; allowed are [{size}] and [{sites}, {size}]")
    if output_rms_weight is not None:
        _floating("output_rms_weight", output_rms_weight, inputs)
        if tuple(output_rms_weight.shape) != (sites, size):
            raise ValueError(f"output_rms_weight has shape {_shape(output_rms_weight)}; allowed is [{sites}, {size}]")
    _eps("eps", eps)
    _number("scale", scale)


def check_update(index: int, update: Any, hidden: Tensor) -> None:
    """Checks what a layer made of its input."""
    if not isinstance(update, Tensor):
        raise TypeError(f"layers[{index}] returned a {type(update).__name__}; allowed is a tensor {_shape(hidden)}")
    if update.shape != hidden.shape or not update.is_floating_point():
        raise ValueError(f"layers[{index}] returned {describe(update)}; allowed is floating point {_shape(hidden)}")
    _same_device(f"what layers[{index}] returned", update, hidden)


def one_run(tensor: Tensor) -> bool:
    """Whether the leading dimensions of [..., D] are one run of rows, each contiguous."""
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    leading = [
        (extent, stride) for extent, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if extent != 1
    ]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in itertools.pairwise(leading))


def check_step(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor | None,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_norm_eps: float,
) -> None:
    """Checks attn_res_step's arguments."""
    _storage("prefix", prefix)
    if prefix.dim() != 2:
        raise ValueError(f"prefix has shape {_shape(prefix)}; allowed is [T, D]")
    if delta is not None:
        _like("delta", delta, "prefix", prefix)
    _storage("blocks", blocks)
    _same_device("blocks", blocks, prefix)
    tokens, size = prefix.shape
    if blocks.dim() != 3 or blocks.shape[0] != tokens or blocks.shape[2] != size or blocks.dtype != prefix.dtype:
        raise ValueError(
            f"blocks is {describe(blocks)}; allowed is {_name(prefix.dtype)} [T, blocks, D] with T = {tokens} and D = {size}"
        )
    for name, written, wanted in (("prefix", prefix, delta is not None), ("blocks", blocks, block_write_idx >= 0)):
        if wanted and written.shape[0] > 1 and written.stride(0) == 0:
            raise ValueError(
                f"{name} is expanded (stride 0 over tokens) and is written in place; pass memory of its own"
            )
    _parameter("norm_weight", norm_weight, prefix)
    _parameter("qk_weight", qk_weight, prefix, required=True)
    _parameter("output_norm_weight", output_norm_weight, prefix)
    count = blocks.shape[1]
    if not 0 <= num_blocks <= min(count, MAX_SOURCES - 1):
        raise ValueError(
            f"num_blocks is {num_blocks}; allowed are 0 to {min(count, MAX_SOURCES - 1)} (blocks has {count})"
        )
    if block_write_idx != -1 and not num_blocks <= block_write_idx < count:
        raise ValueError(
            f"block_write_idx is {block_write_idx}; allowed are -1 (no write) and {num_blocks} to {count - 1}: a block that this "
            "call mixes cannot be overwritten by it"
        )
    _eps("eps", eps)
    _eps("output_norm_eps", output_norm_eps)
    given = (prefix, delta, blocks, norm_weight, qk_weight, output_norm_weight)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        raise ValueError(
            "attn_res_step works in place and has no gradient, but an argument requires grad; call it under torch.no_grad() or "
            "torch.inference_mode(), or use attn_res"
        )


def rows(tensor: Tensor) -> Tensor:
    """A checked storage tensor [..., D] as rows [T, D]: a view."""
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])


def vector(tensor: Tensor) -> Tensor:
    """A contiguous tensor in one dimension: a pseudo-query [D] or [D, 1], a statistic [...] of the tokens."""
    return tensor if tensor.dim() == 1 else tensor.view(-1)


def unstack(sources: list[Tensor], stacked: bool) -> list[Tensor]:
    """Checked sources as rows: L views [T, D]."""
    return [rows(source) for source in (sources[0].unbind(0) if stacked else sources)]


def spec(op: str, tensors: Sequence[Tensor], num_sources: int = 1, num_queries: int = 1) -> Spec:
    """What the backends are asked about a launch; `tensors` are all its storage tensors, as rows [T, D]."""
    first, alignment = tensors[0], byte_alignment(tensors)
    return Spec(op, first.device, first.dtype, first.shape[-1], num_sources, num_queries, alignment)


def step_spec(prefix: Tensor, delta: Tensor | None, blocks: Tensor, num_blocks: int) -> Spec:
    """`spec` of the serving step."""
    tensors = [prefix, *blocks[:, :2].unbind(1)]  # two blocks tell the alignment of the block stride
    return spec("serve_step", tensors if delta is None else [*tensors, delta], num_blocks + 1)


def byte_alignment(tensors: Sequence[Tensor]) -> int:
    """The largest power of two, 16 at most, that divides every row's address of the tensors [T, D], of one dtype."""
    bits, strides = 16, 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
        strides |= tensor.stride(0)
    bits |= strides * tensors[0].element_size()
    return bits & -bits


def describe(value: Tensor) -> str:
    """dtype and shape."""
    return f"{_name(value.dtype)} {_shape(value)}"


def _sources(name: str, value: Any) -> tuple[list[Tensor], Tensor]:
    """The sources as a list (one stacked tensor alone), and one of them [..., D]."""
    if isinstance(value, Tensor):
        if value.dim() < 2:
            raise ValueError(f"{name} has shape {_shape(value)}; one stacked tensor must be [L, ..., D]")
        _count(name, value.shape[0])
        _floating(name, value, None)
        first = value[0]
        _storage(f"{name}[0]", first)
        return [value], first
    if not isinstance(value, Sequence):
        raise TypeError(
            f"{name} is a {type(value).__name__}; allowed are a sequence of tensors [..., D] or one [L, ..., D]"
        )
    _count(name, len(value))
    first = value[0]
    _storage(f"{name}[0]", first)
    for i in range(1, len(value)):
        _like(f"{name}[{i}]", value[i], f"{name}[0]", first)
    return list(value), first


def _count(name: str, count: int) -> None:
    if not 1 <= count <= MAX_SOURCES:
        raise ValueError(f"{name} has {count} sources; allowed are 1 to {MAX_SOURCES}")


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed is a torch.Tensor")


def _floating(name: str, value: Any, reference: Tensor | None) -> None:
    _tensor(name, value)
    if value.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {_name(value.dtype)}; allowed are {', '.join(map(_name, DTYPES))}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; allowed is torch.strided")
    if reference is not None:
        _same_device(name, value, reference)
    if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {value.stride(-1)} in its last dimension; allowed is 1: call {name}.contiguous()"
        )


def _storage(name: str, value: Any) -> None:
    """A tensor [..., D] whose leading dimensions are one run of rows."""
    _floating(name, value, None)
    if value.dim() < 1 or value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {_shape(value)}; allowed is [..., D] with D >= 1")
    if value.dim() != 2:
        try:
            value.view(-1, value.shape[-1])
        except RuntimeError:
            raise ValueError(
                f"{name} has strides {tuple(value.stride())} for shape {_shape(value)}: its leading dimensions are not one run of "
                f"rows; call {name}.contiguous()"
            ) from None
    if value.numel() // value.shape[-1] > MAX_TOKENS:
        raise ValueError(f"{name} has {value.numel() // value.shape[-1]} tokens; allowed are at most {MAX_TOKENS}")


def _like(name: str, value: Any, reference_name: str, reference: Tensor) -> None:
    """A tensor with the shape, dtype and device of one that has been checked."""
    if (
        isinstance(value, Tensor)
        and value.shape == reference.shape
        and value.dtype == reference.dtype
        and value.stride() == reference.stride()
        and value.layout == reference.layout
        and value.device == reference.device
    ):
        return  # What was found of the reference holds for it: a third of the time of the checks below.
    _storage(name, value)
    if value.shape != reference.shape or value.dtype != reference.dtype:
        raise ValueError(f"{name} is {describe(value)}; allowed is {describe(reference)}, as {reference_name}")
    _same_device(name, value, reference)


def _query(name: str, value: Any, reference: Tensor) -> None:
    _floating(name, value, reference)
    size = reference.shape[-1]
    if value.shape != (size,) and value.shape != (size, 1):
        raise ValueError(f"{name} has shape {_shape(value)}; allowed are [{size}] and [{size}, 1]")
    if size > 1 and value.stride(0) != 1:
        raise ValueError(
            f"{name} has stride {value.stride(0)} between its elements; allowed is 1: call {name}.contiguous()"
        )


def _parameter(name: str, value: Any, reference: Tensor, required: bool = False) -> None:
    if value is None and not required:
        return
    _floating(name, value, reference)
    if value.shape != reference.shape[-1:]:
        raise ValueError(f"{name} has shape {_shape(value)}; allowed is [{reference.shape[-1]}]")


def _same_device(name: str, value: Tensor, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{name} is on {value.device}; allowed is {reference.device}, where the other tensors are")


def _eps(name: str, value: Any) -> None:
    _number(name, value)
    if value < 0:
        raise ValueError(f"{name} is {value}; allowed are numbers >= 0")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed is a float")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; allowed are finite numbers")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(value: Tensor) -> list[int]:
    return list(value.shape)
