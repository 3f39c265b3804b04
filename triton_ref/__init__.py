"""The operations of `attnres` in portable Triton, the reference backend: a module for each launcher, of its name."""

__all__ = [
    "mix_bwd",
    "mix_fwd",
    "phase1_bwd",
    "phase1_fwd",
    "phase2_bwd",
    "phase2_fwd",
    "query_grad",
    "serve_step",
]
