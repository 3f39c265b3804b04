"""The formulas kernels evaluate, in float32, with the rounding noise they must be expected to have.

For each operation: outputs and gradients by the closed form of DESIGN 1, softmax in base 2 through a stored
natural-log lse; and beside each result a tensor of the same shape with the standard deviation of its float32 error.
The noise is first order: every product, sum of products and transcendental carries one unit roundoff of its own
magnitude, errors are independent, and they propagate through the formula. It is no bound and needs none:
oracle.reference takes the larger of it and two actual float32 evaluations. (It is within 4x of theirs wherever theirs
is not a matter of luck; a test says so.)

Phase 2 is the same mix with two sources: the partial sum, and the inter-block output whose logit is inter_lse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnres import scaled

# unit roundoff of float32
ROUNDOFF = 2.0**-24
# of a sum over D, in units of the root sum of squares of its terms: each level of a pairwise sum rounds once more
SUM_ROUNDOFF = 2 * ROUNDOFF


class Noisy(NamedTuple):
    value: Tensor
    noise: Tensor


Results = dict[str, Noisy]


def evaluate(
    op: str,
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grads: Mapping[str, Tensor],
    storage: torch.dtype | str,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float32 results and their noise, by the names of oracle.reference. Sources are stacked [L, T, D].

    dtype: float64 gives the noise of float32 arithmetic with an unlimited range.
    """
    given: dict[str, Any] = {name: value.detach().to(dtype) for name, value in tensors.items()} | dict(options)
    upstream = {name: grad.to(dtype) for name, grad in grads.items()}
    results = {"mix": _mix, "phase1": _phase1, "phase2": _phase2}[op](given, upstream, storage)
    return {name: pair.value for name, pair in results.items()}, {name: pair.noise for name, pair in results.items()}


@dataclass
class _Site:
    """One query's mix of sources [L, T, D] (the last one with a given logit where inter_lse is), and its gradients."""

    sources: Tensor
    query: Tensor
    key_weight: Tensor | None
    eps: float
    scale: float
    inter_lse: Tensor | None = None
    output_weight: Tensor | None = None
    output_eps: float = 0.0

    def __post_init__(self) -> None:
        v = self.sources
        self.u = self.query if self.key_weight is None else self.query * self.key_weight
        keyed = v if self.inter_lse is None else v[:-1]
        self.r = (keyed.square().mean(-1) + self.eps).rsqrt()
        products = self.u * keyed
        self.c = products.sum(-1)
        logit = self.scale * self.r * self.c
        # of r and its products, and of the terms of c
        self.noise_logit = torch.hypot(ROUNDOFF * logit, SUM_ROUNDOFF * self.scale * self.r * products.norm(dim=-1))
        if self.inter_lse is not None:
            logit = torch.cat([logit, self.inter_lse[None]])
            self.noise_logit = torch.cat([self.noise_logit, torch.zeros_like(self.inter_lse)[None]])
        top = logit.amax(0)
        exponentials = ((logit - top) / math.log(2)).exp2()
        # of the exponent in base 2
        self.noise_logit = torch.hypot(self.noise_logit, ROUNDOFF * (logit - top))
        total = exponentials.sum(0)
        p = exponentials / total
        # [k, i] = d log(p_i) / d logit_k = (i == k) - p_k; the diagonal is summed, for p_k near one
        own = torch.eye(len(p), device=p.device).unsqueeze(-1)
        self.slope = own * ((1 - own) * p).sum(1) - (1 - own) * p.unsqueeze(1)
        noise_log_p = (self.noise_logit.unsqueeze(1) * self.slope).norm(dim=0)
        self.noise_p = p * _hypot(noise_log_p, torch.full_like(p, ROUNDOFF))
        self.weights, lse = Noisy(p, self.noise_p), top + total.log()
        self.lse = Noisy(lse, _hypot(ROUNDOFF * lse, (p * self.noise_logit).norm(dim=0)))
        if self.inter_lse is None:
            # what backward makes of the stored logits and lse; adding log(total) cannot lose more than log(total)
            self.p = ((logit - lse) / math.log(2)).exp2()
            self.noise_stored = torch.minimum(ROUNDOFF * lse.abs(), total.log())
        else:
            # phase 2 stores no lse, it takes the sigmoid again
            self.p, self.noise_stored = p, torch.zeros_like(lse)
        mixed = (p.unsqueeze(-1) * v).sum(0)
        spread = (p * self.noise_logit).unsqueeze(-1) * (v - mixed)
        noise_mixed = _hypot(spread.norm(dim=0), (ROUNDOFF * p.unsqueeze(-1) * v).norm(dim=0), ROUNDOFF * mixed)
        self.mixed = self.out = Noisy(mixed, noise_mixed)
        if self.output_weight is not None:
            self.output_rstd = (mixed.square().mean(-1, keepdim=True) + self.output_eps).rsqrt()
            normed = mixed * self.output_rstd
            self.normed = Noisy(normed, _hypot(noise_mixed * self.output_rstd, ROUNDOFF * normed))
            out = normed * self.output_weight
            self.out = Noisy(out, _hypot(self.normed.noise * self.output_weight, ROUNDOFF * out))

    def backward(self, d_out: Tensor | None, d_lse: Tensor | None = None) -> Results:
        """d_sources [L, T, D], d_query [D]; d_key_weight, d_output_weight [D], d_inter_lse [T] where there are such
        inputs."""
        v, p, keyed = self.sources, self.p, len(self.r)
        d_out = torch.zeros_like(v[0]) if d_out is None else d_out
        results: Results = {}
        dm, noise_dm = d_out, torch.zeros_like(d_out)
        if self.output_weight is not None:
            normed, noise = self.normed
            results["d_output_weight"] = _sum_tokens(d_out * normed, _hypot(d_out * noise, ROUNDOFF * d_out * normed))
            weighted = d_out * self.output_weight
            along = (weighted * normed).mean(-1, keepdim=True)
            dm = self.output_rstd * (weighted - along * normed)
            noise_dm = self.output_rstd * _hypot(ROUNDOFF * weighted, ROUNDOFF * along * normed, along * noise)
        a = (dm * v).sum(-1)
        d = (p * a).sum(0)
        centered, noise_d, chain = a - d, ROUNDOFF * d, self.scale * self.r
        if self.inter_lse is not None:
            centered, noise_d, chain = p.flip(0) * (a - a.flip(0)), 0 * d, torch.cat([chain, torch.ones_like(p[:1])])
        e = centered + (torch.zeros_like(d) if d_lse is None else d_lse)
        cp = chain * p
        g = cp * e

        # independent errors of each a_i and logit_i, of lse and of d; noise in dm counts by what it does to a_i - d
        from_dm = (noise_dm * (v - self.mixed.value)).norm(dim=-1)
        noise_a = _hypot(ROUNDOFF * a, SUM_ROUNDOFF * (dm * v).norm(dim=-1), from_dm)
        noise_logit, noise_lse = self.noise_logit, self.noise_stored
        by_a = cp * (self.slope * noise_a.unsqueeze(1)).norm(dim=0)
        by_logit = cp * (noise_logit.unsqueeze(1) * (self.slope * e - (p * centered).unsqueeze(1))).norm(dim=0)
        noise_g = _hypot(by_a, by_logit, noise_lse * cp * (e - d), cp * noise_d, ROUNDOFF * g)
        noise_p = _hypot(self.noise_p, p * noise_lse)
        if self.inter_lse is not None:
            results["d_inter_lse"] = Noisy(g[-1], noise_g[-1])

        to_source, to_key = (self.r.square() * self.c / v.shape[-1]).unsqueeze(-1) * v[:keyed], g[:keyed].unsqueeze(-1)
        d_sources, noise = p.unsqueeze(-1) * dm, _hypot(noise_p.unsqueeze(-1) * dm, p.unsqueeze(-1) * noise_dm)
        d_sources[:keyed] += to_key * (self.u - to_source)
        noise[:keyed] = _hypot(
            noise[:keyed],
            noise_g[:keyed].unsqueeze(-1) * (self.u - to_source),
            ROUNDOFF * to_key * self.u,
            ROUNDOFF * to_key * to_source,
        )
        results["d_sources"] = Noisy(d_sources, _hypot(noise, ROUNDOFF * d_sources))

        terms = to_key * v[:keyed]
        token, mean = terms.sum(0), (cp[:keyed].unsqueeze(-1) * v[:keyed]).sum(0)
        unit = chain.clone().unsqueeze(-1) * v
        if self.inter_lse is not None:
            unit[-1] = 0
        from_a = (p * noise_a).unsqueeze(-1) * (unit - mean)
        from_logit = (p * noise_logit).unsqueeze(-1) * (e.unsqueeze(-1) * unit - token - centered.unsqueeze(-1) * mean)
        from_lse = noise_lse.unsqueeze(-1) * (token - d.unsqueeze(-1) * mean)
        noise_terms = [from_a, from_logit, from_lse[None], noise_d.unsqueeze(-1) * mean[None], ROUNDOFF * terms]
        d_u = _sum_tokens(terms.flatten(0, 1), torch.cat(noise_terms).flatten(0, 1))
        if self.key_weight is None:
            results["d_query"] = d_u
        else:
            results["d_query"] = Noisy(d_u.value * self.key_weight, d_u.noise * self.key_weight.abs())
            results["d_key_weight"] = Noisy(d_u.value * self.query, d_u.noise * self.query.abs())
        return results


def _mix(given: dict[str, Any], grads: Mapping[str, Tensor], storage: torch.dtype | str) -> Results:
    eps = given.get("rms_eps", 1e-6)
    site = _Site(
        given["residuals"],
        given["query"],
        given.get("rms_weight"),
        eps,
        given.get("scale", 1.0),
        output_weight=given.get("output_rms_weight"),
        output_eps=given.get("output_rms_eps", eps),
    )
    results: Results = {"out": site.out, "weights": site.weights}
    if grads:
        found = site.backward(grads["out"])
        names = {"d_sources": "d_residuals", "d_key_weight": "d_rms_weight", "d_output_weight": "d_output_rms_weight"}
        results |= {names.get(name, name): pair for name, pair in found.items()}
    return results


def _phase1(given: dict[str, Any], grads: Mapping[str, Tensor], storage: torch.dtype | str) -> Results:
    sources, queries, weights = given["block_representations"], given["pseudo_queries"], given.get("rms_weight")
    shared = weights is not None and weights.dim() == 1
    outs, lses, found = [], [], []
    for index, query in enumerate(queries):
        weight = weights if weights is None or shared else weights[index]
        site = _Site(sources, query, weight, given["eps"], given.get("scale", 1.0))
        outs.append(site.out)
        lses.append(site.lse)
        if grads:
            d_out, d_lse = (grads[name][index] if name in grads else None for name in ("out", "lse"))
            found.append(site.backward(d_out, d_lse))
    results = {"out": _over_sites(outs), "lse": _over_sites(lses)}
    if grads:
        results["d_block_representations"] = _over_sites([each["d_sources"] for each in found], added=True)
        results["d_pseudo_queries"] = _over_sites([each["d_query"] for each in found])
        if weights is not None:
            results["d_rms_weight"] = _over_sites([each["d_key_weight"] for each in found], added=shared)
    return results


def _phase2(given: dict[str, Any], grads: Mapping[str, Tensor], storage: torch.dtype | str) -> Results:
    eps, delta = given["eps"], given.get("delta")
    x = given["partial_sum"] if delta is None else scaled.rounded(given["partial_sum"] + delta, storage)
    site = _Site(
        torch.stack([x, given["inter_out"]]),
        given["pseudo_query"],
        given.get("rms_weight"),
        eps,
        given.get("scale", 1.0),
        given["inter_lse"],
        given.get("output_rms_weight"),
        given.get("output_rms_eps", eps),
    )
    results: Results = {"out": site.out}
    if delta is not None:
        results["new_partial"] = Noisy(x, torch.zeros_like(x))
    if grads:
        found = site.backward(grads.get("out"))
        d_sources = found.pop("d_sources")
        d_partial, results["d_inter_out"] = (Noisy(d_sources.value[i], d_sources.noise[i]) for i in range(2))
        if "new_partial" in grads:
            total = d_partial.value + grads["new_partial"]
            d_partial = Noisy(total, _hypot(d_partial.noise, ROUNDOFF * total))
        results["d_partial_sum"] = d_partial
        if delta is not None:
            results["d_delta"] = d_partial
        names = {"d_query": "d_pseudo_query", "d_key_weight": "d_rms_weight", "d_output_weight": "d_output_rms_weight"}
        results |= {names.get(name, name): pair for name, pair in found.items()}
    return results


def _hypot(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.hypot(first, other)
    return first.abs()


def _sum_tokens(value: Tensor, noise: Tensor) -> Noisy:
    # squares of noise leave the range of float32
    return Noisy(value.sum(0), noise.double().norm(dim=0).to(value.dtype))


def _over_sites(pairs: list[Noisy], added: bool = False) -> Noisy:
    values, noises = (torch.stack(list(parts)) for parts in zip(*pairs, strict=True))
    return Noisy(values.sum(0), noises.norm(dim=0)) if added else Noisy(values, noises)
