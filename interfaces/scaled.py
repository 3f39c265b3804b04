"""Scaled fp16: rows stored as float16 with one power-of-two scale each, so that fp16's mantissa has float32's range.

    value = values * scale        values float16 [..., D]        scale float32 [...], a power of two

Three mantissa bits more than bfloat16 for the same bytes, and no overflow whatever the magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

SCALED_FP16 = "fp16_scaled"  # the name of the format, as `storage=` takes it

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INFINITE_BITS = 0x7F800000  # of a float32: exponent field 255 and no mantissa
_PEAK_EXPONENT = 14  # a row's largest scaled magnitude lies in [2^14, 2^15): one binade of headroom below 65504


class ScaledTensor:
    """A tensor [..., D] in scaled fp16. It takes the place of a plain one as a source, block representation or partial sum.

    Attributes:
        values: float16 [..., D]; scale: float32 [...], powers of two. What the tensor stands for is values * scale, exactly.
        dtype: the dtype it acts as: that of results made from it and of its gradient. `from_tensor` keeps the tensor's.

    The scale of a row, by integer arithmetic on the bits of its largest finite magnitude m (`row_scale`), so that every
    backend finds the same:

    - m in [2^e, 2^(e+1)): 2^(e - 14). The largest scaled magnitude lies in [2^14, 2^15), rounding takes it to 2^15 at most.
      Elements down to 2^-28 of m keep 11 significant bits, smaller ones are rounded to multiples of 2^-38 of m's binade.
    - m < 2^-112, subnormal numbers included: 2^-126, the smallest normal number. Elements from 2^-140 up keep 11 significant
      bits, smaller ones are exact.
    - m = 0, or no finite element: 1. Infinity and NaN play no part in m and stay as they are.
    - Results of phase_1: m is not the largest magnitude of the row, but what bounds it before the mix is made,
      sum_i p_i max |v_i|. Where sources cancel, smaller elements of the row keep fewer bits than stated above, but more than
      the float32 sums that they come from.

    Only a magnitude that rounds to 2^128 itself, within 2^-12 of float32's largest number, comes back as infinity.

    Gradients are those of the represented tensor, in `dtype`, straight through the rounding: they reach the tensor that
    `from_tensor` was given, flow from phase_2 to the phase_1 that made its input, and gather in `grad` of a leaf
    (`requires_grad_`). A pytree node of torch.utils._pytree.
    """

    def __init__(self, values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32):
        if values.dtype != torch.float16 or not values.dim() or not values.shape[-1]:
            raise ValueError(
                f"values is {values.dtype} {list(values.shape)}; allowed is torch.float16 [..., D], D >= 1"
            )
        if scale.dtype != torch.float32 or scale.shape != values.shape[:-1]:
            raise ValueError(
                f"scale is {scale.dtype} {list(scale.shape)}; allowed is torch.float32 {list(values.shape[:-1])}: one for each row"
            )
        if scale.device != values.device:
            raise ValueError(f"scale is on {scale.device}; allowed is {values.device}, where the values are")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}; allowed are bfloat16, float16 and float32")
        if values.requires_grad or scale.requires_grad:
            raise ValueError(
                "values or scale requires grad; gradients are of the represented tensor: use requires_grad_()"
            )
        self.values, self.scale = values, scale
        # The represented tensor's place in the autograd graph: its shape, dtype and history, and one element of memory.
        self.stand_in = new_stand_in(values, values.shape, dtype)

    @classmethod
    def from_parts(cls, values: Tensor, scale: Tensor, stand_in: Tensor) -> ScaledTensor:
        """One with a given place in the autograd graph; nothing is checked."""
        self = cls.__new__(cls)
        self.values, self.scale, self.stand_in = values, scale, stand_in
        return self

    @classmethod
    def from_tensor(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> ScaledTensor:
        """Each row of a bfloat16, float16 or float32 tensor [..., D] with its scale, rounded to nearest even.

        dtype: the one to act as; None: the tensor's.
        """
        dtype = tensor.dtype if dtype is None else dtype
        for name, value in (("tensor", tensor.dtype), ("dtype", dtype)):
            if value not in _DTYPES:
                raise ValueError(f"{name} is {value}; allowed are bfloat16, float16 and float32")
        if not tensor.dim() or not tensor.shape[-1]:
            raise ValueError(f"tensor has shape {list(tensor.shape)}; allowed is [..., D] with D >= 1")
        values, scale = pack(tensor.detach().float())
        stand_in = new_stand_in(values, tensor.shape, dtype)
        if tensor.requires_grad and torch.is_grad_enabled():
            stand_in = _AsIfFrom.apply(tensor, stand_in)
        return cls.from_parts(values, scale, stand_in)

    def to(self, dtype: torch.dtype | None = None) -> Tensor:
        """The represented tensor as a plain one, exact in float32 and float64; differentiable. None: `self.dtype`."""
        value = unpack(self.values, self.scale, self.dtype if dtype is None else dtype)
        return _AsIfFrom.apply(self.stand_in, value) if self.requires_grad and torch.is_grad_enabled() else value

    @property
    def dtype(self) -> torch.dtype:
        return self.stand_in.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        return self.stand_in.requires_grad

    @property
    def grad(self) -> Tensor | None:
        return self.stand_in.grad

    def dim(self) -> int:
        return self.values.dim()

    def requires_grad_(self, requires_grad: bool = True) -> ScaledTensor:
        self.stand_in.requires_grad_(requires_grad)
        return self

    def detach(self) -> ScaledTensor:
        """The same memory, without history."""
        return ScaledTensor.from_parts(self.values, self.scale, self.stand_in.detach())

    def clone(self) -> ScaledTensor:
        """Memory of its own and the same history."""
        return ScaledTensor.from_parts(self.values.clone(), self.scale.clone(), self.stand_in)

    def __getitem__(self, index: Any) -> ScaledTensor:
        """Rows: an index into the leading dimensions alone."""
        values, scale = self.values[index], self.scale[index]
        if values.shape != (*scale.shape, self.shape[-1]):
            raise IndexError(f"{index!r} indexes the last dimension of {self!r}; a row stays whole")
        if self.requires_grad:
            return ScaledTensor.from_parts(values, scale, self.stand_in[index])
        return ScaledTensor.from_parts(values, scale, new_stand_in(values, values.shape, self.dtype))

    def unbind(self, dim: int = 0) -> tuple[ScaledTensor, ...]:
        """The slices along a leading dimension."""
        if not 0 <= dim < self.dim() - 1:
            raise IndexError(f"dim is {dim}; allowed are the leading dimensions, 0 to {self.dim() - 2}")
        parts = zip(self.values.unbind(dim), self.scale.unbind(dim), self.stand_in.unbind(dim), strict=True)
        return tuple(ScaledTensor.from_parts(*part) for part in parts)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[ScaledTensor]:
        return iter(self.unbind())

    def __repr__(self) -> str:
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"ScaledTensor({list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}{grad})"

    def state(self, name: str) -> dict[str, Tensor]:
        """Its two tensors by name, for safetensors.torch.save_file or a state_dict."""
        return {f"{name}.values": self.values, f"{name}.scale": self.scale}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype = torch.float32) -> ScaledTensor:
        """What `state` gave; dtype is the one to act as."""
        return cls(tensors[f"{name}.values"], tensors[f"{name}.scale"], dtype)


def row_scale(rows: Tensor) -> Tensor:
    """The scale [...] of float32 rows [..., D], as ScaledTensor states it."""
    return scale_of(peak(rows))


def peak(rows: Tensor) -> Tensor:
    """The largest finite magnitude [...] of float32 rows [..., D]; 0 where there is none."""
    bits = rows.contiguous().view(torch.int32) & 0x7FFFFFFF
    return torch.where(bits < _INFINITE_BITS, bits, 0).amax(-1).to(torch.int32).view(torch.float32)


def scale_of(bound: Tensor) -> Tensor:
    """The scale [...] of rows of at most these float32 magnitudes; NaN bounds nothing, and is taken for 0."""
    bits = bound.contiguous().view(torch.int32).clamp_max(_INFINITE_BITS - 1)
    bits = torch.where(bound.isnan(), 0, bits)
    exponent = ((bits >> 23) - _PEAK_EXPONENT).clamp_min(1)
    return (torch.where(bits == 0, 127, exponent) << 23).to(torch.int32).view(torch.float32)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, exactly."""
    return ((254 << 23) - scale.contiguous().view(torch.int32)).view(torch.float32)


def pack(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 rows [..., D] -> values, scale."""
    scale = row_scale(rows)
    return (rows * inverse(scale).unsqueeze(-1)).to(torch.float16), scale


def unpack(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (values.to(wide) * scale.to(wide).unsqueeze(-1)).to(dtype)


def rounded(exact: Tensor, storage: torch.dtype | str) -> Tensor:
    """What storage makes of a tensor [..., D], in the tensor's own dtype."""
    if isinstance(storage, str):
        return unpack(*pack(exact.float()), exact.dtype)
    return exact.to(storage).to(exact.dtype)


def new_stand_in(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    return like.new_empty_strided(tuple(shape), (0,) * len(shape), dtype=dtype)


class _AsIfFrom(torch.autograd.Function):
    """A value as if it had been made from `origin`, with derivative one."""

    @staticmethod
    def forward(ctx: Any, origin: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = origin.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def _flatten(scaled: ScaledTensor) -> tuple[list[Tensor], torch.dtype]:
    parts = [scaled.values, scaled.scale]
    return ([*parts, scaled.stand_in] if scaled.requires_grad else parts), scaled.dtype


def _flatten_with_keys(scaled: ScaledTensor) -> tuple[list[tuple[Any, Tensor]], torch.dtype]:
    parts, dtype = _flatten(scaled)
    names = ("values", "scale", "stand_in")
    return [(_pytree.GetAttrKey(name), part) for name, part in zip(names, parts, strict=False)], dtype


def _unflatten(parts: Any, dtype: torch.dtype) -> ScaledTensor:
    values, scale, *rest = parts
    if not rest and isinstance(values, Tensor):  # else tree_map has put something into its place
        rest = [new_stand_in(values, values.shape, dtype)]
    return ScaledTensor.from_parts(values, scale, *(rest or [None]))


_pytree.register_pytree_node(
    ScaledTensor,
    _flatten,
    _unflatten,
    serialized_type_name="attnres.ScaledTensor",
    flatten_with_keys_fn=_flatten_with_keys,
)
