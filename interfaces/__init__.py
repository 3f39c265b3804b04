"""Attention residuals (AttnRes, arXiv:2603.15031): a softmax mix over depth in place of a transformer's residual sum.

One interface over three backends: CuTe DSL kernels for Hopper, Triton, and plain torch. README.md has the short tour.
"""

from attnres.backend import BackendError, available_backends, use_backend
from attnres.checked_mode import checked
from attnres.explain import Explanation, explain
from attnres.mix import attn_res
from attnres.modules import AttnRes, BlockAttnRes
from attnres.network import block_attn_res
from attnres.numerics import NumericsError
from attnres.phase1 import phase_1
from attnres.phase2 import phase_2
from attnres.scaled import ScaledTensor
from attnres.serve import attn_res_step
from attnres.sites import BlockSites

__version__ = "0.1.0"

__all__ = [
    "AttnRes",
    "BackendError",
    "BlockAttnRes",
    "BlockSites",
    "Explanation",
    "NumericsError",
    "ScaledTensor",
    "attn_res",
    "attn_res_step",
    "available_backends",
    "block_attn_res",
    "checked",
    "explain",
    "phase_1",
    "phase_2",
    "use_backend",
]
