"""A chain of layers as one autograd node that keeps the block representations and recomputes the rest, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attnres import backend as backends
from attnres import mix, phase1, phase2
from attnres.recompute import Layer, LayerParameters, LayerRun, Surroundings, call_layer, run_layer
from attnres.sites import BlockSites


class SiteWeights(NamedTuple):
    """The parameters of the mixes of all sites, of some or of one; or their gradients."""

    query: Tensor  # [S, D]
    key: Tensor | None  # [S, D]
    output: Tensor | None  # [S, D]

    def rows(self, sites: range) -> SiteWeights:
        return self._each(lambda weight: weight[sites.start : sites.stop])

    def row(self, site: int) -> SiteWeights:
        return self._each(lambda weight: weight[site])

    def zeros(self) -> SiteWeights:
        """For gradients: in float32, because two operations contribute to a site's."""
        return self._each(lambda weight: weight.new_zeros(weight.shape, dtype=torch.float32))

    def tensors(self, *wanted: str) -> list[Tensor]:
        """Those named, an empty tensor for None: gradients as the operations fill them."""
        found = (getattr(self, name) for name in wanted)
        return [self.query.new_empty(0) if weight is None else weight for weight in found]

    def _each(self, function: Callable[[Tensor], Tensor]) -> SiteWeights:
        return SiteWeights(
            function(self.query),
            None if self.key is None else function(self.key),
            None if self.output is None else function(self.output),
        )


class Chain(NamedTuple):
    """Layers and how they are mixed."""

    layers: tuple[Layer, ...]
    block_size: int
    eps: float
    scale: float
    backend: str | None

    @property
    def blocks(self) -> list[range]:
        """The layers of each block."""
        count = len(self.layers)
        return [range(start, min(start + self.block_size, count)) for start in range(0, count, self.block_size)]

    def mix_options(self, scale: float, request: tuple[str, str]) -> mix.Options:
        return mix.Options(self.eps, scale, False, True, False, False, *request)

    def run(self, inputs: Tensor, weights: SiteWeights) -> list[Tensor]:
        """The block representations, inputs first."""
        found = [inputs]
        for sites in self.blocks:
            found.append(self.run_block(sites, found, weights))
        return found

    def run_block(self, sites: range, blocks: list[Tensor], weights: SiteWeights, two_phases: bool = False) -> Tensor:
        query, key, output = weights.rows(sites)
        mixes = BlockSites(
            blocks,
            query,
            self.eps,
            key,
            self.scale,
            output_rms_weight=output,
            two_phases=two_phases,
            backend=self.backend,
        )
        hidden = mixes.mix()
        for index in sites[:-1]:
            update = call_layer(self.layers[index], index, hidden)
            # each gone before the next is made
            del hidden
            hidden = mixes.mix(update)
            del update
        return cast(Tensor, mixes.close(call_layer(self.layers[sites[-1]], sites[-1], hidden)))


class _Gradients(NamedTuple):
    """What the backward has found so far."""

    blocks: list[Tensor]  # of the block representations that are left
    inter: SiteWeights  # through phase 1 and the output's mix
    intra: SiteWeights  # through phase 2
    parameters: list[Tensor | None]

    def of_weights(self, weights: SiteWeights) -> list[Tensor | None]:
        """Each rounded once to its weight's dtype."""
        return [
            None if weight is None or inter is None or intra is None else (inter + intra).to(weight.dtype)
            for weight, inter, intra in zip(weights, self.inter, self.intra, strict=True)
        ]


@torch._disable_dynamo  # as torch.utils.checkpoint.checkpoint is; the layers may be compiled
def run_saving_memory(
    chain: Chain, inputs: Tensor, weights: SiteWeights, keep_last_block: bool, preserve_rng_state: bool
) -> Tensor:
    """The network's output [..., D]."""
    parameters = LayerParameters(chain.layers)
    surroundings = Surroundings(inputs.device, preserve_rng_state)
    options = chain, parameters, surroundings, backends.requested(chain.backend)
    return _MemorySaving.apply(options, keep_last_block, inputs, *weights, *parameters.tensors)


_Options = tuple[Chain, LayerParameters, Surroundings, tuple[str, str]]


class _MemorySaving(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: _Options,
        keep_last_block: bool,
        inputs: Tensor,
        query: Tensor,
        key_weight: Tensor | None,
        output_weight: Tensor | None,
        *_: Tensor,
    ) -> Tensor:
        chain, _parameters, surroundings, request = options
        weights = SiteWeights(query, key_weight, output_weight)
        blocks, rng_states, ctx.kept = [inputs], [], None
        with surroundings.autocast():
            for sites in chain.blocks:
                rng_states.append(surroundings.rng_state())
                if keep_last_block and sites.stop == len(chain.layers):
                    ctx.kept = _Block(chain, sites, blocks, weights.rows(sites), request)
                    blocks.append(ctx.kept.first_run(surroundings))
                else:
                    blocks.append(chain.run_block(sites, blocks, weights, two_phases=True))
        outputs = mix.forward(blocks, *weights.row(-1), chain.mix_options(chain.scale, request))
        out, _mixed, logits, rstd, lse, _weights = outputs
        ctx.save_for_backward(*blocks, *weights, logits, rstd, lse)
        ctx.options, ctx.rng_states = options, rng_states
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        chain, parameters, surroundings, request = ctx.options
        parameters.check_unmodified()
        *blocks, query, key_weight, output_weight, logits, rstd, lse = ctx.saved_tensors
        weights = SiteWeights(query, key_weight, output_weight)
        d_blocks = [block.new_empty(block.shape) for block in blocks]
        gradients = _Gradients(d_blocks, weights.zeros(), weights.zeros(), [None] * len(parameters.tensors))
        mix.fill_gradients(
            [*d_blocks, *gradients.inter.row(-1).tensors("query", "key", "output")],
            d_out,
            blocks,
            *weights.row(-1),
            None,
            logits,
            rstd,
            lse,
            chain.mix_options(chain.scale, request),
        )
        kept, ctx.kept = ctx.kept, None
        for sites, rng_state in zip(reversed(chain.blocks), reversed(ctx.rng_states), strict=True):
            del blocks[-1]
            if kept is None:
                kept = _Block(chain, sites, blocks, weights.rows(sites), request)
                kept.run_again(surroundings, rng_state)
            kept.backward(parameters, gradients)
            kept = None  # before the next block
        found = (gradients.blocks[0], *gradients.of_weights(weights), *gradients.parameters)
        needed = zip(found, ctx.needs_input_grad[2:], strict=True)
        return (None,) * 2 + tuple(gradient if wanted else None for gradient, wanted in needed)


class _Site(NamedTuple):
    """A site that has been run with gradient."""

    layer: LayerRun
    # phase 2: x [..., D], logit [...], rstd [...]; the norm of a first site: logits, rstd, lse; nothing without a norm
    saved: tuple[Tensor, ...]


class _Block:
    """One block with all that its backward needs: run, and then taken apart from its last site to its first."""

    def __init__(
        self, chain: Chain, sites: range, blocks: list[Tensor], weights: SiteWeights, request: tuple[str, str]
    ):
        self.chain, self.sites, self.sources, self.weights, self.request = chain, sites, list(blocks), weights, request
        shape, count = blocks[0].shape, len(sites)
        # Phase 1's results and their gradients share memory: site s has its result in row s and its gradient in row s + 1, whose
        # result has been used by then.
        self.rows = blocks[0].new_empty((count + 1, *shape))  # [S + 1, ..., D]
        self.lse = blocks[0].new_empty((count, *shape[:-1]), dtype=torch.float32)  # [S, ...]
        tokens = self.lse[0].numel()
        self.logits = self.lse.new_empty((count, len(blocks), tokens))  # [S, N, T]
        self.rstd = self.lse.new_empty((len(blocks), tokens))  # [N, T]
        self.sites_run: list[_Site] = []

    def _phase_1_options(self) -> phase1.Options:
        return phase1.Options(self.chain.eps, self.chain.scale, False, True, *self.request)

    def _phase_2_options(self) -> phase2.Options:
        return phase2.Options(self.chain.eps, self.chain.eps, self.chain.scale, True, *self.request)

    def first_run(self, surroundings: Surroundings) -> Tensor:
        """In the forward, of a block that is kept: its representation [..., D]."""
        partial, update = self._run(surroundings)
        return update if partial is None else partial + update

    def run_again(self, surroundings: Surroundings, rng_state: tuple[Tensor, ...]) -> None:
        with surroundings.with_rng_state(rng_state):
            self._run(surroundings)

    def _run(self, surroundings: Surroundings) -> tuple[Tensor | None, Tensor]:
        """Fills what the backward needs; returns the partial sum before the last layer's output, and that output."""
        chain, (query, key, _) = self.chain, self.weights
        outputs = (self.rows[:-1], self.lse, self.logits, self.rstd, None, None)
        phase1.fill_outputs(outputs, self.sources, query, key, self._phase_1_options())
        partial = update = None
        for site, index in enumerate(self.sites):
            hidden, partial, saved = self._mix(site, partial, update)
            update = None  # gone before the layer runs
            layer, update = run_layer(chain.layers[index], index, hidden, surroundings)
            self.sites_run.append(_Site(layer, saved))
        assert update is not None
        return partial, update

    def _mix(
        self, site: int, partial: Tensor | None, update: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """The site's mix, the partial sum in it, and what its backward needs: the arithmetic of BlockSites, to the bit."""
        chain, (query, key, output), inter_out = self.chain, self.weights.row(site), self.rows[site]
        if update is None:
            if output is None:
                # .data has a version counter of its own: the layer's graph keeps this row, and others of the buffer are written to
                return inter_out.data, None, ()
            options = chain.mix_options(1.0, self.request)
            hidden, _, *saved, _ = mix.forward([inter_out], query, None, output, options)
            return hidden, None, tuple(saved)
        x, delta = (update, None) if partial is None else (partial, update)
        hidden, total, logit, rstd, *_ = phase2.forward(
            x, delta, query, key, inter_out, self.lse[site], output, self._phase_2_options()
        )
        x = x if delta is None else total
        return hidden, x, (x, logit, rstd)

    def backward(self, parameters: LayerParameters, gradients: _Gradients) -> None:
        """Adds the block's part to the gradients; the last of gradients.blocks, its own, is taken off."""
        query, key, _ = self.weights
        d_lse = torch.zeros_like(self.lse)
        d_update = gradients.blocks.pop()
        for site in reversed(range(len(self.sites))):
            d_update = self._site_backward(site, d_update, d_lse[site], parameters, gradients)
        phase1.fill_gradients(
            [*gradients.blocks, *gradients.inter.rows(self.sites).tensors("query", "key")],
            True,
            self.rows[1:],
            d_lse,
            self.sources,
            query,
            key,
            self.lse,
            self.logits,
            self.rstd,
            self._phase_1_options(),
        )

    def _site_backward(
        self, site: int, d_update: Tensor, d_lse: Tensor, parameters: LayerParameters, gradients: _Gradients
    ) -> Tensor:
        """Given the gradient of the layer's output, which the partial sum before it has as well, that of the output before."""
        chain, index, (query, key, output) = self.chain, self.sites[site], self.weights.row(site)
        layer, saved = self.sites_run.pop()
        d_hidden, found = layer.gradients(d_update, parameters.of(index))
        del layer
        parameters.add(gradients.parameters, index, found)
        inter_out, d_inter_out, intra = self.rows[site], self.rows[site + 1], gradients.intra.row(index)
        if site > 0:
            x, logit, rstd = saved
            # not in d_update itself: a layer's gradients may share its memory
            d_x = x.new_empty(x.shape)
            phase2.fill_gradients(
                [d_x, d_inter_out, d_lse, *intra.tensors("query", "key", "output")],
                d_hidden,
                d_update,
                x,
                query,
                key,
                inter_out,
                self.lse[site],
                output,
                logit,
                rstd,
                self._phase_2_options(),
            )
            return d_x
        if output is None:
            d_inter_out.copy_(d_hidden)
            return d_update
        logits, rstd, lse = saved
        mix.fill_gradients(
            [d_inter_out, torch.empty_like(intra.query), query.new_empty(0), *intra.tensors("output")],
            d_hidden,
            [inter_out],
            query,
            None,
            output,
            None,
            logits,
            rstd,
            lse,
            chain.mix_options(1.0, self.request),
        )
        return d_update
