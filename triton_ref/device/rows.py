"""What the kernels do with rows of D elements: load in fp32, store, key statistics, softmax merge, RMSNorm and its backward.

A row is a block of BLOCK_D elements, zero past D, so that sums need no mask. o_d is tl.arange(0, BLOCK_D).

A row of scaled fp16 has a scale, a power of two, in another tensor: values * scale is loaded and stored (device/rounding.py has
how). Its squares may leave fp32's range; its unit, the scale if that is above one, brings them back into it exactly.
"""

import triton
import triton.language as tl

from triton_ref.device.rounding import PARTIAL_SUM, inverse, row_scale, stochastic


@triton.jit
def row_of(p_sources, strides, i, t, COUNT: tl.constexpr):
    """Address of row t of source i.

    Selecting among the kernel's pointers lets the loop over sources be a loop, of a bound that the compiler does not
    know: unrolled, the sums of the mix move to the end of the kernel and every row is spilled (640 bytes a thread at 9
    sources). It also keeps 64 sources as quick to compile as two.
    """
    p_source = p_sources[0]
    stride = strides[0]
    for j in tl.static_range(1, COUNT):
        p_source = tl.where(i == j, p_sources[j], p_source)
        stride = tl.where(i == j, strides[j], stride)
    return p_source + t * stride


@triton.jit
def load_row(p_row, o_d, D: tl.constexpr, wanted=True):
    """[BLOCK_D] fp32 from a row of any dtype; zeros where the row is not wanted."""
    return tl.load(p_row + o_d, mask=(o_d < D) & wanted, other=0.0).to(tl.float32)


@triton.jit
def load_scale(p_scale, offset):
    """A row's scale; 1 where rows have none, which the compiler makes nothing of."""
    if p_scale is None:
        return tl.full([], 1.0, tl.float32)
    else:
        return tl.load(p_scale + offset)


@triton.jit
def scale_of(p_scales, strides, i, t, COUNT: tl.constexpr):
    """The scale of row t of source i."""
    if p_scales is None:
        return tl.full([], 1.0, tl.float32)
    else:
        return tl.load(row_of(p_scales, strides, i, t, COUNT))


@triton.jit
def unit_of(scale):
    return tl.maximum(scale, 1.0)


@triton.jit
def store_row(p_row, b_x, o_d, m_d, scale, seed=None, STREAM: tl.constexpr = 0, row=0, first=0):
    """Stores fp32 over its scale, rounded stochastically if there is a seed; returns what is stored now, in fp32.

    STREAM, row and first, the first column, are its place among the random numbers (device/rounding.py).
    """
    b_x = b_x * inverse(scale)
    if seed is not None:
        b_x = stochastic(b_x, p_row.dtype.element_ty, seed, STREAM, row, first)
    b_stored = b_x.to(p_row.dtype.element_ty)
    tl.store(p_row + o_d, b_stored, mask=m_d)
    return b_stored.to(tl.float32) * scale


@triton.jit
def store_sum(p_row, p_scale, offset, b_x, o_d, m_d, seed, row):
    """store_row of a whole row of a partial sum, whose scale is chosen here; returns the scale, too."""
    if p_scale is None:
        scale = load_scale(p_scale, offset)
    else:
        scale = row_scale(b_x)
        tl.store(p_scale + offset, scale)
    return store_row(p_row, b_x, o_d, m_d, scale, seed, PARTIAL_SUM, row), scale


@triton.jit
def element(b_x, o_x, i):
    """x[i] of a small block."""
    return tl.sum(tl.where(o_x == i, b_x, 0.0), axis=0)


@triton.jit
def load_key(p_query, p_key_weight, o_d, D: tl.constexpr):
    """u = q * w, or q where there is no key weight."""
    b_u = load_row(p_query, o_d, D)
    if p_key_weight is not None:
        b_u *= load_row(p_key_weight, o_d, D)
    return b_u


@triton.jit
def load_keys(p_queries, query_stride, p_key_weights, key_weight_stride, o_s, m_s, o_d, D: tl.constexpr):
    """[BLOCK_S, BLOCK_D] of u = q * w for the queries o_s [BLOCK_S]; o_d is [1, BLOCK_D]."""
    o_rows = o_s.to(tl.int64)[:, None]
    m_rows = m_s[:, None]
    b_u = load_row(p_queries + o_rows * query_stride, o_d, D, m_rows)
    if p_key_weights is not None:
        b_u *= load_row(p_key_weights + o_rows * key_weight_stride, o_d, D, m_rows)
    return b_u


@triton.jit
def inverse_rms(b_v, eps, D: tl.constexpr, unit, axis: tl.constexpr = 0):
    """(mean(v^2) + eps)^(-1/2), correctly rounded steps: one scalar a row, so the cost is nothing."""
    down = inverse(unit)
    b_v = b_v * down
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_v * b_v, axis=axis) / D + eps * down * down)) * down


@triton.jit
def key_logit(b_v, b_u, eps, scale, D: tl.constexpr, unit):
    """r and scale * r * <u, v> of one source row."""
    rstd = inverse_rms(b_v, eps, D, unit)
    return rstd, scale * (rstd * tl.sum(b_u * b_v, axis=0))


@triton.jit
def merge(b_mix, total, peak, b_v, logit):
    """One more source into an online softmax: b_mix / total is the mean so far, weights relative to exp(peak)."""
    new_peak = tl.maximum(peak, logit)
    keep = tl.exp(peak - new_peak)
    add = tl.exp(logit - new_peak)
    return b_mix * keep + b_v * add, total * keep + add, new_peak


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def rms_norm(b_m, p_weight, eps, o_d, D: tl.constexpr, unit):
    return b_m * inverse_rms(b_m, eps, D, unit) * load_row(p_weight, o_d, D)


@triton.jit
def rms_norm_backward(b_d_out, b_m, p_weight, eps, o_d, D: tl.constexpr, unit):
    """d_m, and this row's share d_out * m_hat of the weight's gradient."""
    rstd = inverse_rms(b_m, eps, D, unit)
    b_hat = b_m * rstd
    b_d_hat = b_d_out * load_row(p_weight, o_d, D)
    b_d_m = rstd * (b_d_hat - b_hat * (tl.sum(b_d_hat * b_hat, axis=0) / D))
    return b_d_m, b_d_out * b_hat
