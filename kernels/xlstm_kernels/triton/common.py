"""Code that the Triton kernels share: gates, log-weights and loads of a chunk.

Only code that needs Triton imports this module. The kernels use plain pointers and masks, so they
run on Triton 3.6 to 3.9 and in its interpreter. Gates, stabilisers and weights are float32; sums of
log f are float64.

Letters and names in all kernels, beyond the legend in `xlstm_kernels`:

- L: tokens of a chunk or block. BT: tokens of a tile of a chunk. R = H / G: query heads of a group.
- DK, DV: the head dims Dk and Dv. BK, BV: the part of them that a program holds as one tile.
- c: chunk or block. a, j: tile of a chunk. b: row of the batch. h: head of the row.
- span: chunks of a super-chunk, which a program walks. u: super-chunk of a row.
- bh, bg: heads of all rows, numbered.
- t, s: tokens of a row. t0, s0: the first ones of a tile. d, dk, dv: features.
- row: place of a token in a (B, H, T) tensor. slot: that of a chunk in (B H, chunks, ...).
- q_b, q_h, q_t: strides of q for batch, head and token; likewise for other tensors.
- C, n, m, D: as in docs/math.md. A leading d is a gradient: dC is that of C.
- sum_high + sum_low: b_t, the sum of log f from the start of the chunk, as two float32.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Log-weight of nothing, as in `xlstm_kernels.state`.
LOG_ZERO = tl.constexpr(-1e30)
# Elements between a token and the next: 128 tokens are a tile, and 2^31 the last offset.
FARTHEST = 2**24
# Counts, limits, and addresses and strides of the gates' single numbers. Triton would compile a
# kernel anew for a 1, for what 16 divides and for the rest: other kernels than the self-check ran,
# and new ones for each length. No load is wider for knowing them. Other addresses and strides are
# specialised: only so are loads of rows of features wide, and those of single numbers that adjoin.
UNSPECIALISED = (
    "T", "H", "G", "R", "heads", "chunks", "blocks", "span", "window", "sinks", "splits",
    "i_ptr", "f_ptr", "gate_ptr", "i_b", "f_b", "gate_b", "m_b",
)  # fmt: skip


def dot_format(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype, str]:
    """Return the dtype of kept states, the one of dot operands, and the precision of products.

    Only bfloat16 is multiplied as it is. One TF32 product would truncate its operands instead of
    rounding them (Triton 3.6 to 3.9), and float16 lacks the range that unnormalised products need.
    So float16 and float32 inputs are multiplied as three TF32 products. States are kept in float16
    there, which has three more binary digits than bfloat16; they come with a scale.
    """
    if dtype == torch.bfloat16:
        return torch.float16, tl.bfloat16, "ieee"
    return torch.float32, tl.float32, "tf32x3"


def on_device_of(x: Tensor) -> torch.cuda.device:
    """Make the device of x current, because Triton launches there; do nothing on a CPU."""
    # torch.cuda.device_of does the same, but dynamo cannot trace it.
    return torch.cuda.device(x.device.index if x.is_cuda else -1)


def contiguous_rows(x: Tensor) -> Tensor:
    """Copy x unless its last dimension is adjacent in memory, and tokens are not far apart.

    Inside a tile of tokens, kernels compute offsets with 32 bits (`load_tile`). All other strides
    are free.
    """
    return x if x.stride(-1) == 1 and x.stride(-2) < FARTHEST else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """Name the strides of (B, heads, T, features) tensors as kernels do: q_b, q_h, q_t for q."""
    named = {}
    for name, x in tensors.items():
        named[f"{name}_b"], named[f"{name}_h"], named[f"{name}_t"] = x.stride()[:3]
    return named


@triton.jit
def unit_chunk_and_head(unit, units, chunks):
    """Return the chunk and the head of one of `units` = chunks * heads programs or groups of them.

    All kernels number them on axis 0, because the other axes end at 65535 programs.
    """
    # Neighbours are heads of one chunk: heads of a group read the same values. The head is int64,
    # because what is computed from it are offsets, which can pass 2^31.
    heads = units // chunks
    return unit // heads, (unit % heads).to(tl.int64)


@triton.jit
def chunk_and_head(chunks):
    """Return the chunk and the head of this program, which is one of chunks * heads."""
    return unit_chunk_and_head(tl.program_id(0), tl.num_programs(0), chunks)


@triton.jit
def chunk_tile_and_head(chunks, TILES: tl.constexpr):
    """Return the chunk, its tile and the head of this program, one of chunks * heads * TILES."""
    # Tiles of a chunk are neighbours: they read the same state.
    units = tl.num_programs(0) // TILES
    c, head = unit_chunk_and_head(tl.program_id(0) // TILES, units, chunks)
    return c, tl.program_id(0) % TILES, head


@triton.jit
def tile_head_and_super_chunk(program, tiles_k, tiles_v, super_chunks):
    """Return the tile (of keys, of values) of the state, the head and the super-chunk."""
    tile = program % (tiles_k * tiles_v)
    unit = program // (tiles_k * tiles_v)
    head = (unit // super_chunks).to(tl.int64)
    return tile % tiles_k, tile // tiles_k, head, unit % super_chunks


@triton.jit
def log_sigmoid(x):
    """Compute log(sigmoid(x)) = min(x, 0) - log1p(exp(-|x|))."""
    # log1p(y) = y log(u) / (u - 1) with u = 1 + y: log(u) alone loses the small digits of an open
    # gate.
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def max_plus(decay_1, max_1, decay_2, max_2):
    """Compose two steps x <- max(x + decay, max); associative, so that a scan can use it."""
    return decay_1 + decay_2, tl.maximum(max_1 + decay_2, max_2)


@triton.jit
def sum_gates(
    i_ptr, f_ptr, runs_ptr, sum_high_ptr, sum_low_ptr, max_log_weight_ptr, bh, c, T, H,
    SEGMENTED: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Sum the forget gates of one chunk.

    Writes b_t, the sum of log f from the start of the chunk, as sum_high + sum_low; and the largest
    log-weight that a token of the chunk has at t.
    """
    t = c * L + tl.arange(0, L)
    inside = t < T
    row = bh * T + t
    i = tl.load(i_ptr + row, mask=inside, other=LOG_ZERO).to(tl.float32)
    f = tl.load(f_ptr + row, mask=inside, other=0.0).to(tl.float32)
    log_f = tl.where(inside, log_sigmoid(f), 0.0)
    # Sums in float32 would cancel in b_t - b_s. Two floats keep the digits of every difference
    # (docs/kernels.md).
    total = tl.cumsum(log_f.to(tl.float64), 0)
    sum_high = total.to(tl.float32)
    sum_low = (total - sum_high.to(tl.float64)).to(tl.float32)
    decay = log_f
    if SEGMENTED:
        runs = runs_ptr + (bh // H) * T + t
        run = tl.load(runs, mask=inside, other=0)
        before = tl.load(runs - 1, mask=inside & (t > 0), other=0)
        # The maximum restarts with each document. It only bounds the weights; none is computed from
        # it.
        decay = tl.where((run != before) & (t > 0), LOG_ZERO, log_f)
    _, max_log_weight = tl.associative_scan((decay, i), 0, max_plus)
    tl.store(sum_high_ptr + row, sum_high, mask=inside)
    tl.store(sum_low_ptr + row, sum_low, mask=inside)
    tl.store(max_log_weight_ptr + row, max_log_weight, mask=inside)


@triton.jit
def load_rows(ptr, stride, t, T, d):
    """Load the tile (tokens t, features d); 0 after the end of the row."""
    inside = (t < T)[:, None]
    # int64, because a long row of wide features can pass 2^31 values.
    tile = ptr + t[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(tile, mask=inside, other=0.0)


@triton.jit
def load_tile(ptr, stride, first, T, d, BT: tl.constexpr):
    """Load the tile (BT tokens from the first one on, features d); 0 after the end of the row."""
    # As `load_rows`; but only the first token's offset takes 64 bits, which saves registers.
    # `contiguous_rows` makes sure that 32 bits do inside of a tile.
    rows = tl.arange(0, BT)
    tile = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + d[None, :])
    return tl.load(tile, mask=(rows < T - first)[:, None], other=0.0)


@triton.jit
def load_centred(ptr, stride, centre_ptr, first, T, d, BT: tl.constexpr):
    """Load a tile of the values, as `load_tile`, and subtract their common component."""
    # After the end of the row this is -centre and not 0, but every weight there is 0.
    values = load_tile(ptr, stride, first, T, d, BT).to(tl.float32)
    return values - tl.load(centre_ptr + d)[None, :]


@triton.jit
def finite(x):
    """Put 0 for what is not finite.

    In units of an infinite bound all that is finite would be 0. Below one that is too small it
    becomes inf, which shows.
    """
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def scale_below(bound):
    """Return the largest power of two that is not above bound / 2^14, and its inverse.

    In units of it, what the bound holds for is below 2^15: float16 ends at 2^16. So entries down
    to 2^-28 of the bound keep all their digits. Both lie in 2^-126 to 2^126, so products with them
    are exact.
    """
    bound = tl.minimum(tl.maximum(bound, 1.925929944387236e-34), 3.4028234663852886e38)
    exponent = (bound.to(tl.int32, bitcast=True) & 0x7F800000) - 0x07000000
    inverse = 0x7F000000 - exponent  # 254 less the exponent, which float32 offsets by 127
    return exponent.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def dot_state(x, state, total, PRECISION: tl.constexpr):
    """Add the product of x and of a tile of a state, as it is kept, to `total`.

    A state in float16 has more digits than a bfloat16. It is multiplied as two of them, which
    together are exact.
    """
    if PRECISION == "ieee":
        high = state.to(x.dtype)
        low = (state.to(tl.float32) - high.to(tl.float32)).to(x.dtype)
        total = tl.dot(x, high, total, input_precision=PRECISION)
        total = tl.dot(x, low, total, input_precision=PRECISION)
    else:
        total = tl.dot(x, state, total, input_precision=PRECISION)
    return total


@triton.jit
def load_run(runs_ptr, b, t, T):
    """Load the documents of tokens; those after the end of the row have document -1."""
    return tl.load(runs_ptr + b * T + t, mask=t < T, other=-1)


@triton.jit
def run_before(runs_ptr, b, c, T, L: tl.constexpr):
    """Load the document of the token before a chunk; for the first chunk, of its first token."""
    return tl.load(runs_ptr + b * T + tl.maximum(c * L - 1, 0))


@triton.jit
def last_token(c, T, L: tl.constexpr):
    """Return the last token of a chunk."""
    return tl.minimum(c * L + L, T) - 1


@triton.jit
def entering_stabiliser(m_ptr, m0_ptr, bh, c, T, L: tl.constexpr):
    """Load m of the token before the chunk; for the first chunk, m of the initial state."""
    before = tl.load(m_ptr + bh * T + tl.maximum(c * L - 1, 0), mask=c > 0, other=0.0)
    return tl.where(c > 0, before, tl.load(m0_ptr + bh))


# In all of these weights, differences of the large parts come first, so that the small parts are
# not lost in a large sum.
@triton.jit
def read_weights(
    sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, t, T,
    SEGMENTED: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Compute the weight of the state that enters chunk c at its tokens t."""
    row, reads = bh * T + t, t < T
    sum_high = tl.load(sum_high_ptr + row, mask=t < T, other=0.0)
    sum_low = tl.load(sum_low_ptr + row, mask=t < T, other=0.0)
    m = tl.load(m_ptr + row, mask=t < T, other=0.0)
    m_in = entering_stabiliser(m_ptr, m0_ptr, bh, c, T, L)
    if SEGMENTED:
        reads = load_run(runs_ptr, b, t, T) == run_before(runs_ptr, b, c, T, L)
    log_read = (sum_high + (m_in - m)) + sum_low
    return tl.exp(tl.where(reads, log_read, LOG_ZERO))


@triton.jit
def write_weights(
    sum_high_ptr, sum_low_ptr, i_ptr, m_end, runs_ptr, bh, b, c, t, T,
    SEGMENTED: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Compute the weight of the tokens t of chunk c in the state that leaves it.

    m_end: m of the chunk's last token.
    """
    end = last_token(c, T, L)
    row, writes = bh * T + t, t < T
    sum_high = tl.load(sum_high_ptr + row, mask=t < T, other=0.0)
    sum_low = tl.load(sum_low_ptr + row, mask=t < T, other=0.0)
    i = tl.load(i_ptr + row, mask=t < T, other=LOG_ZERO).to(tl.float32)
    high_end, low_end = tl.load(sum_high_ptr + bh * T + end), tl.load(sum_low_ptr + bh * T + end)
    if SEGMENTED:
        writes = load_run(runs_ptr, b, t, T) == tl.load(runs_ptr + b * T + end)
    log_write = ((high_end - sum_high) + (i - m_end)) + (low_end - sum_low)
    return tl.exp(tl.where(writes, log_write, LOG_ZERO))


@triton.jit
def chunk_decay(
    sum_high_ptr, sum_low_ptr, m_in, m_end, runs_ptr, bh, b, c, T,
    SEGMENTED: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Compute the weight of the state that enters chunk c in the one that leaves it.

    m_in, m_end: m of the token before the chunk and of its last one.
    """
    end, passes = last_token(c, T, L), T > 0
    high_end, low_end = tl.load(sum_high_ptr + bh * T + end), tl.load(sum_low_ptr + bh * T + end)
    if SEGMENTED:
        passes = run_before(runs_ptr, b, c, T, L) == tl.load(runs_ptr + b * T + end)
    return tl.exp(tl.where(passes, (high_end + (m_in - m_end)) + low_end, LOG_ZERO))


@triton.jit
def chunk_log_f(
    sum_high_ptr, sum_low_ptr, runs_ptr, bh, b, c, T, SEGMENTED: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Compute the sum of log f of chunk c in float64, or LOG_ZERO if a document ends in it."""
    # A sum over many chunks in float32 would cancel, as in `sum_gates`.
    end, passes = last_token(c, T, L), T > 0
    high_end, low_end = tl.load(sum_high_ptr + bh * T + end), tl.load(sum_low_ptr + bh * T + end)
    if SEGMENTED:
        passes = run_before(runs_ptr, b, c, T, L) == tl.load(runs_ptr + b * T + end)
    return tl.where(passes, high_end.to(tl.float64) + low_end.to(tl.float64), LOG_ZERO)


@triton.jit
def pair_weights(
    sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, t, s, T,
    SEGMENTED: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Compute exp(D_ts - m_t) of the pairs (query t, key s) of two tiles of one chunk.

    The weight is 0 where t does not see s. With KEYS_FIRST the rows are the keys s.
    """
    # No kernel transposes a product to multiply it again: Triton 3.4 to 3.7.0 makes wrong code of
    # that on Hopper. What is needed the other way round is computed that way from the start.
    query, key = bh * T + t, bh * T + s
    high_t = tl.load(sum_high_ptr + query, mask=t < T, other=0.0)
    high_s = tl.load(sum_high_ptr + key, mask=s < T, other=0.0)
    # The small parts go with m and i: two numbers a token take fewer registers than three.
    m = tl.load(m_ptr + query, mask=t < T, other=0.0)
    m -= tl.load(sum_low_ptr + query, mask=t < T, other=0.0)
    i = tl.load(i_ptr + key, mask=s < T, other=LOG_ZERO).to(tl.float32)
    i -= tl.load(sum_low_ptr + key, mask=s < T, other=0.0)
    if KEYS_FIRST:
        log_weight = (high_t[None, :] - high_s[:, None]) + (i[:, None] - m[None, :])
        visible = (t[None, :] >= s[:, None]) & (t < T)[None, :]
    else:
        log_weight = (high_t[:, None] - high_s[None, :]) + (i[None, :] - m[:, None])
        visible = (t[:, None] >= s[None, :]) & (t < T)[:, None]
    if SEGMENTED:
        run_t, run_s = load_run(runs_ptr, b, t, T), load_run(runs_ptr, b, s, T)
        if KEYS_FIRST:
            visible = visible & (run_s[:, None] == run_t[None, :])
        else:
            visible = visible & (run_t[:, None] == run_s[None, :])
    return tl.exp(tl.where(visible, log_weight, LOG_ZERO))


@triton.jit
def tanh(x):
    """Compute tanh(x) to a few units of the last place.

    Triton's own is a library's, which the interpreter has not. Source of the polynomial: Cephes,
    tanhf.
    """
    size = tl.abs(x)
    y = tl.exp(-2.0 * size)
    far = (1.0 - y) / (1.0 + y)
    # Near 0 the difference above would lose the small digits.
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    near = x + x * z * series
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def bound(scores, CAP: tl.constexpr):
    """Bound scores as c tanh(x / c); CAP is c, or 0 where there is no bound."""
    if CAP > 0:
        scores = CAP * tanh(scores / CAP)
    return scores


@triton.jit
def through_bound(grad, bounded, CAP: tl.constexpr):
    """Bring the gradient of bounded scores back to the scores: 1 - tanh^2."""
    if CAP > 0:
        share = bounded / CAP
        grad = grad * (1.0 - share * share)
    return grad
