"""The sites of one block in turn, by the schedule that moves the fewest bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from attnres import contracts
from attnres.mix import attn_res
from attnres.phase1 import phase_1
from attnres.phase2 import phase_2
from attnres.scaled import ScaledTensor
from attnres.serve import attn_res_step


def direct_is_cheaper(num_blocks: int, num_sites: int) -> bool:
    """Whether direct mixes move fewer bytes than two phases through a block of S sites after N finished blocks, without gradient.

    In units of T D elements: two phases read the blocks once for all sites (N + S), then 3 at the second site and 5 at each later
    one, whose add is fused. Direct mixes move N + 1, N + 2, N + 5 with the third site's add by itself, and N + 4 at each later one,
    an attn_res_step in place. So direct mixes win with one finished block alone. With gradient they never do: the backward of two
    phases moves 3 N + S for all sites and 6 a site, that of a direct mix 5 N + 6 a site, because every site adds to the gradient of
    every block.
    """
    return direct_elements(num_blocks, num_sites) < two_phase_elements(num_blocks, num_sites)


def two_phase_elements(num_blocks: int, num_sites: int) -> int:
    """What the mixes of a block move, in units of T D elements."""
    return num_blocks + num_sites + 3 * (num_sites >= 2) + 5 * max(0, num_sites - 2)


def direct_elements(num_blocks: int, num_sites: int) -> int:
    sites = num_blocks + 1, num_blocks + 2, num_blocks + 5
    return sum(sites[:num_sites]) + (num_blocks + 4) * max(0, num_sites - 3)


class BlockSites:
    """Block AttnRes around layers that the caller runs: a block's S sites, one `mix` each, then `close`.

        sites = BlockSites(block_representations, pseudo_queries, eps)
        delta = None
        for layer in layers:
            delta = layer(sites.mix(delta))
        block_representations.append(sites.close(delta))

    Phase 1 runs once for all sites. Each later site is one launch, which adds the last layer's output to the partial sum, merges
    the sum and, where output_rms_weight is given, applies the next layer's PreNorm: for the prefill of a serving model as for
    training, with gradient where the arguments want one. Without gradient, direct mixes take the place of the phases where they
    move fewer bytes (`direct_is_cheaper`); that rounds differently.

    Args:
        block_representations: the N finished blocks [..., D], the embedding first.
        pseudo_queries: [S, D].
        eps, rms_weight ([D] or [S, D]), scale, backend: as phase_1 takes them.
        output_rms_weight: weights [S, D] of the norm of each site's mix, with the same eps; None for no norm.
        two_phases: two phases whatever the bytes, for the same bits with and without gradient.
        storage: "fp16_scaled" keeps phase 1's results and the partial sum in scaled fp16 (two phases then); None in the blocks'
            dtype.

    The blocks may be plain tensors or all of them ScaledTensor; `close` returns the new one in the same format.

    Raises what phase_1, phase_2 and attn_res raise, and ValueError for a site too many or without the last layer's output.
    """

    def __init__(
        self,
        block_representations: Sequence[Tensor | ScaledTensor],
        pseudo_queries: Tensor,
        eps: float,
        rms_weight: Tensor | None = None,
        scale: float = 1.0,
        *,
        output_rms_weight: Tensor | None = None,
        two_phases: bool = False,
        storage: str | None = None,
        backend: str | None = None,
    ):
        self._blocks, self._queries = list(block_representations), pseudo_queries
        self._key_weights = None if rms_weight is None else rms_weight.expand(pseudo_queries.shape)
        self._output_weights = output_rms_weight
        self._eps, self._scale, self._storage, self._backend = eps, scale, storage, backend
        self._site = 0
        self._partial: Tensor | ScaledTensor | None = None
        self._inter: list[tuple[Tensor | ScaledTensor, Tensor]] | None = None
        self._scaled_blocks = any(isinstance(block, ScaledTensor) for block in self._blocks)
        two_phases = two_phases or storage is not None or self._scaled_blocks or torch.is_grad_enabled()
        if two_phases or not direct_is_cheaper(len(self._blocks), len(pseudo_queries)):
            out, lse = phase_1(
                self._blocks, pseudo_queries, eps, self._key_weights, scale, storage=storage, backend=backend
            )
            # one unbind: its gradient is one stack, where each indexing would make a full-size tensor
            self._inter = list(zip(out.unbind(0), lse.unbind(0), strict=True))

    def mix(self, delta: Tensor | None = None) -> Tensor:
        """The next site's mix [..., D], given the last layer's output [..., D] (None at the first site)."""
        site = self._site
        if site == len(self._queries):
            raise ValueError(
                f"mix is called for site {site}; allowed are {site} calls, one for each row of pseudo_queries"
            )
        if (delta is None) != (site == 0):
            raise ValueError(
                f"delta is {'None' if delta is None else 'a tensor'} at site {site}; allowed is None at site 0 and there alone"
            )
        self._site += 1
        if self._inter is None:
            return self._direct(site, delta)
        query, key_weight, output_weight = self._weights(site)
        inter_out, inter_lse = self._inter[site]
        if delta is None:
            return self._first(query, inter_out, output_weight)
        first = self._partial is None
        partial = delta if self._partial is None else self._partial
        found = phase_2(
            partial,
            query,
            inter_out,
            inter_lse,
            self._eps,
            key_weight,
            self._scale,
            delta=None if first else delta,
            output_rms_weight=output_weight,
            storage=None if first else self._storage,
            backend=self._backend,
        )
        hidden, self._partial = (cast(Tensor, found), partial) if first else cast(tuple[Tensor, Tensor], found)
        return hidden

    def close(self, delta: Tensor) -> Tensor | ScaledTensor:
        """The new block representation [..., D], given the last layer's output."""
        total = self._added(delta)
        if self._scaled_blocks:
            return ScaledTensor.from_tensor(total, self._blocks[0].dtype)
        return total.to(delta.dtype)

    def _added(self, delta: Tensor) -> Tensor:
        """The partial sum and delta: in float32 where the sum is scaled fp16."""
        if self._partial is None:
            return delta
        return delta + (self._partial.to(torch.float32) if isinstance(self._partial, ScaledTensor) else self._partial)

    def _direct(self, site: int, delta: Tensor | None) -> Tensor:
        query, key_weight, output_weight = self._weights(site)
        if self._partial is not None and delta is not None and site >= 3 and self._scale == 1.0:
            # the partial sum is this block's own since the third site
            block = contracts.rows(cast(Tensor, self._blocks[0])).unsqueeze(1)
            given = (
                contracts.rows(cast(Tensor, self._partial)),
                contracts.rows(delta),
                block,
                key_weight,
                query,
                output_weight,
            )
            return attn_res_step(*given, 1, -1, self._eps, self._eps, backend=self._backend).view(delta.shape)
        if delta is not None:
            self._partial = self._added(delta)
        sources = self._blocks if self._partial is None else [*self._blocks, self._partial]
        found = attn_res(query, sources, key_weight, output_weight, self._eps, self._scale, backend=self._backend)
        return cast(Tensor, found)

    def _first(self, query: Tensor, inter_out: Tensor | ScaledTensor, output_weight: Tensor | None) -> Tensor:
        """Phase 1's result as it is; with a norm, by the mix of a single source, which is that source."""
        if output_weight is None:
            return inter_out.to() if isinstance(inter_out, ScaledTensor) else inter_out
        return cast(Tensor, attn_res(query, [inter_out], None, output_weight, self._eps, backend=self._backend))

    def _weights(self, site: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The site's query, key weight and output weight."""
        key, output = self._key_weights, self._output_weights
        return self._queries[site], None if key is None else key[site], None if output is None else output[site]
