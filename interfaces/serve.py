"""The serving site: residual add, block write, mix and output norm of one AttnRes site in one pass, in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnres import backend as backends
from attnres import checked_mode, contracts
from attnres.registration import empty_as, register, with_options
from attnres.repeated import Call, recall, remember


class Options(NamedTuple):
    """What the operator takes beyond plain tensors."""

    num_blocks: int
    block_write_idx: int
    eps: float
    output_norm_eps: float
    backend: str
    origin: str
    prefix_scale: Tensor | None = None
    blocks_scale: Tensor | None = None
    out_dtype: torch.dtype | None = None
    seed: int | None = None


def attn_res_step(
    prefix: contracts.Rows,
    delta: Tensor | None,
    blocks: contracts.Rows,
    norm_weight: Tensor | None,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_norm_eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    stochastic_seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One site of a serving model (the argument list of vLLM's Kimi K3 `attn_res`). In place, without gradient.

        prefix += delta, rounded to prefix's storage before it is used; blocks[:, block_write_idx] = prefix where the index is >= 0
        out = the mix of blocks[:, :num_blocks] and prefix under the query qk_weight, then RMSNorm(out) * output_norm_weight

    Args:
        prefix: running sum of the current block [T, D], bfloat16, float16, float32 or a ScaledTensor; updated in place when delta
            is given.
        delta: output of the last sublayer [T, D], or None.
        blocks: finished block representations [T, B, D] stored as prefix is, with any token and block strides.
        norm_weight: weight of the keys' RMSNorm [D]; None is a weight of ones.
        qk_weight: the site's query [D].
        output_norm_weight: weight of the output norm [D], or None for no norm.
        num_blocks: how many blocks take part, 0 to min(B, 63); with 0 the mix is prefix itself.
        block_write_idx: where to store the updated prefix: -1 for nowhere, else num_blocks to B - 1.
        eps, output_norm_eps: epsilons of the keys' and of the output norm.
        out_dtype: dtype of out, of those that dtypes.TABLE lists; None is prefix's.
        stochastic_seed: with delta, an int rounds the new prefix stochastically, with this seed, as phase_2 does its new partial
            sum; None to nearest.
        backend: "auto", "cute", "triton" or "torch"; None leaves it to use_backend and ATTNRES_BACKEND.

    Returns:
        out [T, D].

    Least traffic: (num_blocks + 4) T D elements with delta, and one more for a block write.

    Raises:
        TypeError, ValueError: an argument cannot be used, or one requires grad; the message names it.
        BackendError: the named backend cannot take the call.
    """
    tensors = (prefix, delta, blocks, norm_weight, qk_weight, output_norm_weight)
    numbers = (num_blocks, block_write_idx, eps, output_norm_eps)
    key = ("step", backend, *numbers, out_dtype) if stochastic_seed is None else None
    given: tuple[Any, Any, Any, Any, Any, Any] = tensors
    call = recall(tensors, key)
    if call is None:
        contracts.check_step(*tensors, *numbers, out_dtype=out_dtype, stochastic_seed=stochastic_seed)
        prefix_rows, *scale = contracts.memory(prefix)
        block_rows, *scales = contracts.memory(blocks)
        options = Options(
            *numbers,
            *backends.requested(backend),
            scale[0] if scale else None,
            scales[0] if scales else None,
            prefix.dtype if out_dtype is None else out_dtype,
            stochastic_seed,
        )
        call = remember(Call(False, options), tensors, key)
        given = (prefix_rows, delta, block_rows, norm_weight, qk_weight, output_norm_weight)
    if torch.compiler.is_compiling():
        return torch.ops.attnres.step(*given, *call.options)
    return _step(*given, call.options, call)


def _step(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor | None,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    options: Options,
    call: Call | None = None,
) -> Tensor:
    out = empty_as(prefix, options.out_dtype)
    tensors = (prefix, delta, blocks, qk_weight, norm_weight, output_norm_weight)
    if call is not None and call.replay((*tensors, out)):
        return out
    num_blocks, block_write_idx, eps, output_norm_eps, backend, origin, prefix_scale, blocks_scale, _, seed = options
    scaled = prefix_scale is not None
    asked = contracts.step_spec(prefix, delta, blocks, num_blocks, stored=(out.dtype,), scaled=scaled, seed=seed)
    name = backends.choose(asked, (backend, origin))
    if not prefix.shape[0]:
        return out
    stored = contracts.scaled_or_plain(prefix, prefix_scale), contracts.scaled_or_plain(blocks, blocks_scale)
    check = checked_mode.is_on()
    before = [value.clone() for value in stored] if check else []
    arguments = (*tensors, num_blocks, block_write_idx, eps, output_norm_eps, out)
    precision = {"prefix_scale": prefix_scale, "blocks_scale": blocks_scale, "seed": seed}
    launcher = backends.launch("serve_step", name, prefix.device, *arguments, **precision)
    if check:
        oracle = {
            "prefix": before[0],
            "delta": delta,
            "blocks": before[1],
            "norm_weight": norm_weight,
            "qk_weight": qk_weight,
            "output_norm_weight": output_norm_weight,
            "num_blocks": num_blocks,
            "block_write_idx": block_write_idx,
            "eps": eps,
            "output_norm_eps": output_norm_eps,
        }
        checked_mode.verify_step(name, oracle, out, *stored, stochastic=seed is not None)
    elif call is not None:
        call.record("serve_step", name, launcher, (*tensors, out), arguments)
    return out


def _fake(prefix: Tensor, *others: Any) -> Tensor:
    return prefix.new_empty(prefix.shape, dtype=others[-1].out_dtype)


register(
    "step",
    "(Tensor(a!) prefix, Tensor? delta, Tensor(b!) blocks, Tensor? norm_weight, Tensor qk_weight, Tensor? output_norm_weight, "
    "int num_blocks, int block_write_idx, float eps, float output_norm_eps, str backend, str origin, "
    "Tensor(c!)? prefix_scale, Tensor(d!)? blocks_scale, ScalarType? out_dtype, int? seed) -> Tensor",
    with_options(Options, _step),
    with_options(Options, _fake),
)
