"""Pieces that the mLSTM kernels share: gates, log-weights and loads of a chunk.

Imported only where Triton is used. Plain pointers and masks: they run on Triton 3.6 to 3.9 and in its interpreter.
Letters: L tokens of a chunk, R = H / G. Gates, stabilisers and weights are float32, sums of log f float64.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels are what Triton makes of a launch: pointers, numbers, tiles.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Log-weight of nothing, as in `xlstm_kernels.state`.
LOG_ZERO = tl.constexpr(-1e30)


def dot_format(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype, str]:
    """Dtype of dot operands, for torch and for Triton, and their precision.

    One TF32 product would cut its operands, not round them (Triton 3.6 to 3.9), and float16 lacks the range of
    unnormalised products: so float16, as float32, takes three.
    """
    return (
        (torch.bfloat16, tl.bfloat16, "ieee")
        if dtype == torch.bfloat16
        else (torch.float32, tl.float32, "tf32x3")
    )


def on_device_of(x: Tensor) -> torch.cuda.device:
    """Make the device of x current, as launches need it; nothing on a CPU. Unlike device_of, dynamo traces it."""
    return torch.cuda.device(x.device.index if x.is_cuda else -1)


@triton.jit
def place():
    """Chunk and head of a program. The heads of all rows are on the grid's x: the others end at 65535."""
    return tl.program_id(1), tl.program_id(0).to(tl.int64)


@triton.jit
def log_sigmoid(x):
    """log(sigmoid(x)); log1p(y) = y log(u) / (u - 1), u = 1 + y, keeps the small digits of open gates."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def max_plus(decay_1, peak_1, decay_2, peak_2):
    """Compose two steps peak <- max(peak + decay, new)."""
    return decay_1 + decay_2, tl.maximum(peak_1 + decay_2, peak_2)


@triton.jit
def gate_kernel(
    i_ptr, f_ptr, runs_ptr, hi_ptr, lo_ptr, peak_ptr, T, H, SEGMENTED: tl.constexpr, L: tl.constexpr
):
    """Per chunk: b_t, the sum of log f since the chunk's start, as hi + lo; peak_t, the largest log-weight at t.

    float32 sums would cancel in b_t - b_s; two floats keep the digits of every difference (docs/math.md).
    Grid (B H, chunks).
    """
    c, bh = place()
    t = c * L + tl.arange(0, L)
    inside = t < T
    at = bh * T + t
    i = tl.load(i_ptr + at, mask=inside, other=LOG_ZERO).to(tl.float32)
    f = tl.load(f_ptr + at, mask=inside, other=0.0).to(tl.float32)
    log_f = tl.where(inside, log_sigmoid(f), 0.0)
    total = tl.cumsum(log_f.to(tl.float64), 0)
    hi = total.to(tl.float32)
    lo = (total - hi.to(tl.float64)).to(tl.float32)
    decay = log_f
    if SEGMENTED:
        runs = runs_ptr + (bh // H) * T + t
        run = tl.load(runs, mask=inside, other=0)
        before = tl.load(runs - 1, mask=inside & (t > 0), other=0)
        decay = tl.where(
            (run != before) & (t > 0), LOG_ZERO, log_f
        )  # a bound of sizes only: no weight is made of it
    _, peak = tl.associative_scan((decay, i), 0, max_plus)
    tl.store(hi_ptr + at, hi, mask=inside)
    tl.store(lo_ptr + at, lo, mask=inside)
    tl.store(peak_ptr + at, peak, mask=inside)


@triton.jit
def load_rows(ptr, stride, t, T, d):
    """Tile (tokens t, features d), zero after the row's end."""
    return tl.load(
        ptr + t[:, None].to(tl.int64) * stride + d[None, :], mask=(t < T)[:, None], other=0.0
    )


@triton.jit
def load_centred(ptr, stride, centre_ptr, t, T, d):
    """Tile (tokens t, features d) of values less their common component; every weight after the row's end is 0."""
    return load_rows(ptr, stride, t, T, d).to(tl.float32) - tl.load(centre_ptr + d)[None, :]


@triton.jit
def load_runs(runs_ptr, b, c, t, T, L: tl.constexpr):
    """Documents of the chunk's tokens (-1 after the end), of the token before it, and of its last token."""
    row = runs_ptr + b * T
    run = tl.load(row + t, mask=t < T, other=-1)
    entering = tl.load(row + tl.maximum(c * L - 1, 0))
    leaving = tl.load(row + tl.minimum(c * L + L, T) - 1)
    return run, entering, leaving


@triton.jit
def entering_stabiliser(m_ptr, m0_ptr, bh, c, T, L: tl.constexpr):
    """m of the token before the chunk; of the initial state for the first chunk."""
    before = tl.load(m_ptr + bh * T + tl.maximum(c * L - 1, 0), mask=c > 0, other=0.0)
    return tl.where(c > 0, before, tl.load(m0_ptr + bh))


@triton.jit
def state_weights(
    hi_ptr,
    lo_ptr,
    i_ptr,
    m_ptr,
    m0_ptr,
    runs_ptr,
    bh,
    b,
    c,
    T,
    SEGMENTED: tl.constexpr,
    L: tl.constexpr,
):
    """Weights of the entering state at each token (L), of each token in the leaving state (L), and the decay."""
    t = c * L + tl.arange(0, L)
    at, end = bh * T + t, bh * T + tl.minimum(c * L + L, T) - 1
    inside = t < T
    hi = tl.load(hi_ptr + at, mask=inside, other=0.0)
    lo = tl.load(lo_ptr + at, mask=inside, other=0.0)
    i = tl.load(i_ptr + at, mask=inside, other=LOG_ZERO).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    m_in = entering_stabiliser(m_ptr, m0_ptr, bh, c, T, L)
    hi_end, lo_end, m_end = tl.load(hi_ptr + end), tl.load(lo_ptr + end), tl.load(m_ptr + end)
    reads, writes, passes = inside, inside, T > 0
    if SEGMENTED:
        run, entering, leaving = load_runs(runs_ptr, b, c, t, T, L)
        reads, writes, passes = run == entering, run == leaving, entering == leaving
    read = tl.exp(tl.where(reads, (hi + (m_in - m)) + lo, LOG_ZERO))
    write = tl.exp(tl.where(writes, ((hi_end - hi) + (i - m_end)) + (lo_end - lo), LOG_ZERO))
    decay = tl.exp(tl.where(passes, (hi_end + (m_in - m_end)) + lo_end, LOG_ZERO))
    return read, write, decay


@triton.jit
def pair_weights(
    hi_ptr, lo_ptr, i_ptr, m_ptr, runs_ptr, bh, b, c, T, SEGMENTED: tl.constexpr, L: tl.constexpr
):
    """exp(D_ts - m_t) of the chunk's pairs (query t, key s), (L, L); 0 where t does not see s."""
    t = c * L + tl.arange(0, L)
    at = bh * T + t
    inside = t < T
    hi = tl.load(hi_ptr + at, mask=inside, other=0.0)
    lo = tl.load(lo_ptr + at, mask=inside, other=0.0)
    i = tl.load(i_ptr + at, mask=inside, other=LOG_ZERO).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    log_w = ((hi[:, None] - hi[None, :]) + (i[None, :] - m[:, None])) + (lo[:, None] - lo[None, :])
    visible = (t[:, None] >= t[None, :]) & inside[:, None]
    if SEGMENTED:
        run = tl.load(runs_ptr + b * T + t, mask=inside, other=-1)
        visible = visible & (run[:, None] == run[None, :])
    return tl.exp(tl.where(visible, log_w, LOG_ZERO))
