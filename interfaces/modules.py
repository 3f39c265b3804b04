"""The operations as modules that hold their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnres.mix import attn_res
from attnres.network import block_attn_res


class AttnRes(nn.Module):
    """One site of Full AttnRes: `attn_res` with a pseudo-query of its own.

    Args:
        dim: D, the size of the sources' last dimension.
        eps, scale, backend: as attn_res takes them (rms_eps, scale, backend).
        key_weight: whether the keys' RMSNorm has a weight `rms_weight` [D].
        output_norm: whether the mix goes through an RMSNorm with weight `output_rms_weight` [D], the PreNorm of the sublayer.
        device, dtype: of the parameters.

    The pseudo-query starts at zero: all logits are then equal, and training starts from the plain mean of the sources. Weights
    start at one.
    """

    pseudo_query: nn.Parameter
    rms_weight: nn.Parameter | None
    output_rms_weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        scale: float = 1.0,
        *,
        key_weight: bool = False,
        output_norm: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim, self.eps, self.scale, self.backend = dim, eps, scale, backend
        _add_parameters(self, "pseudo_query", (dim,), key_weight, output_norm, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self.pseudo_query, self.rms_weight, self.output_rms_weight)

    def forward(self, residuals: Sequence[Tensor] | Tensor) -> Tensor:
        """residuals: 1 to 64 sources [..., D], or one stacked [L, ..., D]. Returns the mix [..., D]."""
        weights = self.rms_weight, self.output_rms_weight
        found = attn_res(self.pseudo_query, residuals, *weights, self.eps, self.scale, backend=self.backend)
        return cast(Tensor, found)

    def extra_repr(self) -> str:
        return _describe(self, f"{self.dim}")


class BlockAttnRes(nn.Module):
    """A chain of sublayers with Block AttnRes in place of the residual sum: `block_attn_res` with its parameters.

    Args:
        layers: the sublayers, Modules [..., D] -> [..., D] without residual connection.
        dim: D.
        block_size: sublayers in a block.
        eps, scale, memory_saving, keep_last_block, preserve_rng_state, backend: as block_attn_res takes them.
        key_weight: whether the keys' RMSNorm of every site has a weight: `rms_weight` [len(layers) + 1, D].
        output_norm: whether every mix goes through an RMSNorm, the sublayer's PreNorm: `output_rms_weight` [len(layers) + 1, D].
        device, dtype: of the parameters made here; layers are taken as they are.

    `pseudo_queries` [len(layers) + 1, D] start at zero: all logits are then equal, and training starts from plain means. Weights
    start at one.
    """

    pseudo_queries: nn.Parameter
    rms_weight: nn.Parameter | None
    output_rms_weight: nn.Parameter | None

    def __init__(
        self,
        layers: Iterable[nn.Module],
        dim: int,
        block_size: int,
        eps: float = 1e-6,
        scale: float = 1.0,
        *,
        key_weight: bool = False,
        output_norm: bool = False,
        memory_saving: bool = True,
        keep_last_block: bool = True,
        preserve_rng_state: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dim, self.block_size, self.eps, self.scale = dim, block_size, eps, scale
        self.memory_saving, self.keep_last_block = memory_saving, keep_last_block
        self.preserve_rng_state, self.backend = preserve_rng_state, backend
        shape, options = (len(self.layers) + 1, dim), {"device": device, "dtype": dtype}
        _add_parameters(self, "pseudo_queries", shape, key_weight, output_norm, options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Of the pseudo-queries and weights; the layers' parameters are theirs."""
        _reset(self.pseudo_queries, self.rms_weight, self.output_rms_weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: the embedding [..., D]. Returns the network's output [..., D]."""
        return block_attn_res(
            inputs,
            self.pseudo_queries,
            self.layers,
            self.block_size,
            self.eps,
            self.rms_weight,
            self.scale,
            output_rms_weight=self.output_rms_weight,
            memory_saving=self.memory_saving,
            keep_last_block=self.keep_last_block,
            preserve_rng_state=self.preserve_rng_state,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return _describe(self, f"{self.dim}, block_size={self.block_size}") + (
            "" if self.memory_saving else ", memory_saving=False"
        )


def _add_parameters(
    module: nn.Module, query: str, shape: tuple[int, ...], key_weight: bool, output_norm: bool, options: dict[str, Any]
) -> None:
    for name, wanted in ((query, True), ("rms_weight", key_weight), ("output_rms_weight", output_norm)):
        module.register_parameter(name, nn.Parameter(torch.empty(shape, **options)) if wanted else None)


def _reset(queries: Tensor, *weights: Tensor | None) -> None:
    nn.init.zeros_(queries)
    for weight in weights:
        if weight is not None:
            nn.init.ones_(weight)


def _describe(module: Any, sizes: str) -> str:
    parts = [sizes, f"eps={module.eps}"]
    if module.scale != 1.0:
        parts.append(f"scale={module.scale}")
    parts += ["key_weight=True"] * (module.rms_weight is not None)
    parts += ["output_norm=True"] * (module.output_rms_weight is not None)
    return ", ".join(parts + ([] if module.backend is None else [f"backend={module.backend!r}"]))
