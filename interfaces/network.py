"""The whole network by Block AttnRes: a chain of layers and the mixes between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from attnres import contracts
from attnres.memory_saving import Chain, SiteWeights, run_saving_memory
from attnres.mix import attn_res
from attnres.recompute import Layer, trainable
from attnres.registration import needs_grad


def block_attn_res(
    inputs: Tensor,
    pseudo_queries: Tensor,
    layers: Sequence[Layer] | torch.nn.ModuleList,
    block_size: int,
    eps: float = 1e-6,
    rms_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    output_rms_weight: Tensor | None = None,
    memory_saving: bool = True,
    keep_last_block: bool = True,
    preserve_rng_state: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Runs a chain of layers with Block AttnRes in place of the residual sum (arXiv:2603.15031).

        b_0 = inputs; blocks of block_size layers, the last one as many as are left
        input of layer i = the mix of the finished blocks and of the partial sum of its own block's outputs so far, by row i
        b_k = the sum of block k's outputs
        out = the mix of b_0, b_1, ... by the last row

    Args:
        inputs: the embedding [..., D], bfloat16, float16 or float32.
        pseudo_queries: [len(layers) + 1, D].
        layers: Modules or callables [..., D] -> [..., D]: the sublayers, without residual connection. Their outputs are converted
            to inputs' dtype. A layer must not work in place on its input.
        block_size: layers in a block; at most 64 block representations, the embedding among them.
        eps: epsilon of the keys' RMSNorm, and of the output norms.
        rms_weight: weight of the keys' RMSNorm: [D] for all sites, or [len(layers) + 1, D]; None is a weight of ones.
        scale: factor of the logits.
        output_rms_weight: weights [len(layers) + 1, D] of an RMSNorm of each mix, fused: the PreNorm of the layer that follows.
        memory_saving: with gradient, keep only the block representations and run each block once more in the backward (see below).
            False leaves every operation to autograd, which keeps all that each of them saves: under torch.utils.checkpoint, for
            layers whose parameters change between calls (FSDP), and for what torch.compile is to trace.
        keep_last_block: with memory_saving, also keep what the last block's backward needs, so that it is not run again. False
            saves that memory while the loss is computed.
        preserve_rng_state: with memory_saving, give the recomputed layers the random numbers of the forward (dropout).
        backend: "auto", "cute", "triton" or "torch"; None leaves it to use_backend and ATTNRES_BACKEND.

    Returns:
        out [..., D] in inputs' dtype.

    Memory saving. Kept for the backward: inputs, the block representations and, of the output's mix, logits, 1/rms and lse. The
    backward runs each block but the last once more, phases and layers (the cost: at most one more forward), with the forward's
    autocast state and random numbers, and keeps of one block at a time: phase 1's results, the partial sums, and what its layers
    save. The parameters of layers that are Modules get their gradients as inputs of one autograd node: their hooks run once, and a
    parameter that several layers use gets the sum. A callable that is no Module must have no parameters. Neither parameters nor
    inputs may be changed in place before the backward. There is no second derivative. What else a layer does (batch statistics),
    it does twice.

    Without gradient nothing is kept but the blocks and the current block's phase 1. Arithmetic and byte counts are those of
    phase_1, phase_2 and attn_res; the same inputs give the same bits, gradients included, and both modes the same output.

    Raises:
        TypeError, ValueError: an argument or what a layer returns cannot be used; the message names it.
        BackendError: the named backend cannot take a launch.
    """
    contracts.check_network(
        inputs, pseudo_queries, layers, block_size, eps, rms_weight, scale, output_rms_weight=output_rms_weight
    )
    key_weight = None if rms_weight is None else rms_weight.expand(pseudo_queries.shape)
    weights = SiteWeights(pseudo_queries, key_weight, output_rms_weight)
    chain = Chain(tuple(layers), block_size, eps, scale, backend)
    if memory_saving and needs_grad(inputs, *weights, *(p for layer in chain.layers for p in trainable(layer))):
        return run_saving_memory(chain, inputs, weights, keep_last_block, preserve_rng_state)
    blocks = chain.run(inputs, weights)
    query, key, output = weights.row(-1)
    return cast(Tensor, attn_res(query, blocks, key, output, eps, scale, backend=backend))
