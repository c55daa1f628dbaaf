"""Forward kernels of the chunkwise mLSTM.

First, in two launches, what the others need to know of each chunk and of the row's values. Then the
states, chunk after chunk; then the outputs of all chunks at once (docs/kernels.md).
Where a walk over whole rows leaves processors idle, super-chunks are walked at once: first for
what each adds to the state at its end, then from the state at its start.
The letters and names are those of `triton/common.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import (
    LOG_ZERO,
    UNSPECIALISED,
    chunk_decay,
    chunk_log_f,
    chunk_tile_and_head,
    dot_state,
    finite,
    last_token,
    load_centred,
    load_run,
    load_tile,
    pair_weights,
    read_weights,
    run_before,
    scale_below,
    sum_gates,
    tile_head_and_super_chunk,
    unit_chunk_and_head,
    write_weights,
)


@triton.jit
def sum_values(
    v_ptr, v_parts_ptr, v_t, bg, c, T, chunks, L: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """Write of each feature of a chunk's values: sum, sum of squares, smallest, largest."""
    COLUMNS: tl.constexpr = min(32, DV)
    inside = (c * L + tl.arange(0, L) < T)[:, None]
    parts = v_parts_ptr + (bg * chunks + c) * 4 * DV
    for d in range(0, DV, COLUMNS):
        dv = d + tl.arange(0, COLUMNS)
        v = load_tile(v_ptr, v_t, c * L, T, dv, L).to(tl.float32)
        tl.store(parts + dv, tl.sum(v, 0))
        tl.store(parts + DV + dv, tl.sum(v * v, 0))
        tl.store(parts + 2 * DV + dv, tl.min(tl.where(inside, v, float("inf")), 0))
        tl.store(parts + 3 * DV + dv, tl.max(tl.where(inside, v, float("-inf")), 0))


@triton.jit(do_not_specialize=UNSPECIALISED)
def chunk_kernel(
    i_ptr, f_ptr, v_ptr, runs_ptr, sum_high_ptr, sum_low_ptr, max_log_weight_ptr, v_parts_ptr,
    v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, L: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Sum the values of a chunk of a value head, or the forget gates of one of a head.

    Grid (chunks * B G * (1 + R)). v_parts (B G, chunks, 4, DV): of `sum_values`.
    """
    size = 1 + R
    c, bg = unit_chunk_and_head(tl.program_id(0) // size, tl.num_programs(0) // size, chunks)
    role = tl.program_id(0) % size
    if role == 0:  # the one with the most work comes first
        G = H // R
        v_ptr += (bg // G) * v_b + (bg % G) * v_h
        sum_values(v_ptr, v_parts_ptr, v_t, bg, c, T, chunks, L, DV)
    else:
        sum_gates(
            i_ptr, f_ptr, runs_ptr, sum_high_ptr, sum_low_ptr, max_log_weight_ptr,
            bg * R + role - 1, c, T, H, SEGMENTED, L,
        )  # fmt: skip


@triton.jit
def common_component(
    parts_ptr, T, chunks, DV: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Compute a vector c near the mean of a head's values: the mean on a coarse grid.

    h(v - c) = h(v) - c, and the gradients do not change. But the gradients cancel v against h:
    without c, both are small there, and so is their rounding. The step of the grid is a power of 2
    near the standard deviation. So c is 0 for values without a common component, and v - c is exact
    in bfloat16, or nearly so.
    """
    dv = tl.arange(0, DV)
    total, squares = tl.zeros((ROWS, DV), tl.float32), tl.zeros((ROWS, DV), tl.float32)
    for first in range(0, chunks, ROWS):
        c = first + tl.arange(0, ROWS)
        part = parts_ptr + c[:, None] * (4 * DV) + dv[None, :]
        total += tl.load(part, mask=(c < chunks)[:, None], other=0.0)
        squares += tl.load(part + DV, mask=(c < chunks)[:, None], other=0.0)
    mean = tl.sum(total, 0) / T
    variance = tl.maximum(tl.sum(squares, 0) / T - mean * mean, 0.0)
    spread = tl.maximum(tl.sqrt(variance), tl.abs(mean) / 256)
    # A float without its fraction: the power of 2 that is not above it.
    step = (spread.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Values too large to be squared give inf, and values that are all 0 give 0: these get c = 0.
    has_step = (step > 0.0) & (step < float("inf"))
    step = tl.where(has_step, step, 1.0)
    return tl.where(has_step, step * tl.floor(mean / step + 0.5), 0.0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def centre_kernel(
    v_parts_ptr, C0_ptr, n0_ptr, centre_ptr, v_max_ptr, C0_max_ptr, T, H, R, chunks,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Compute the common component of the values of a head, and the bounds of states. Grid (B H).

    Writes C0_max (B H, DK), which bounds each row of C0 - n0 centreᵀ; and, for the first head of a
    group, centre (B G, DV) and v_max (B G, chunks), the largest |v - centre| of each chunk. Of each
    chunk, because what comes later, or is forgotten, must not set a state's scale.
    """
    ROWS: tl.constexpr = 16
    _, _, bh, _ = tile_head_and_super_chunk(tl.program_id(0), 1, 1, 1)
    b, h = bh // H, bh % H
    bg, dv = b * (H // R) + h // R, tl.arange(0, DV)
    parts_ptr = v_parts_ptr + bg * chunks * 4 * DV
    # Each head of the group computes the same: none waits for another.
    centre = common_component(parts_ptr, T, chunks, DV, ROWS)
    if h % R == 0:
        tl.store(centre_ptr + bg * DV + dv, centre)
        for first in range(0, chunks, ROWS):
            c = first + tl.arange(0, ROWS)
            part = parts_ptr + c[:, None] * (4 * DV) + dv[None, :]
            low = tl.load(part + 2 * DV, mask=(c < chunks)[:, None], other=0.0)
            high = tl.load(part + 3 * DV, mask=(c < chunks)[:, None], other=0.0)
            most = tl.max(tl.maximum(high - centre[None, :], centre[None, :] - low), 1)
            tl.store(v_max_ptr + bg * chunks + c, finite(most), mask=c < chunks)
    centre_max = tl.max(tl.abs(centre), 0)
    for d in range(0, DK, ROWS):
        dk = d + tl.arange(0, ROWS)
        C0 = tl.load(C0_ptr + (bh * DK + dk[:, None]) * DV + dv[None, :])
        n0 = tl.load(n0_ptr + bh * DK + dk)
        C0_max = finite(tl.max(tl.abs(C0), 1)) + tl.abs(n0) * centre_max
        tl.store(C0_max_ptr + bh * DK + dk, C0_max)


@triton.jit
def next_stabiliser(
    sum_high_ptr, max_log_weight_ptr, runs_ptr, m, bh, b, c, T,
    SEGMENTED: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Compute m of the last token of chunk c; m: that of the token before the chunk."""
    end, passes = last_token(c, T, L), T > 0
    if SEGMENTED:
        passes = run_before(runs_ptr, b, c, T, L) == tl.load(runs_ptr + b * T + end)
    high_end = tl.load(sum_high_ptr + bh * T + end)
    max_of_chunk = tl.load(max_log_weight_ptr + bh * T + end)
    return tl.maximum(max_of_chunk, tl.where(passes, high_end + m, LOG_ZERO))


@triton.jit
def carry(
    C, n, bound, m, m_end, k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr, sum_high_ptr, sum_low_ptr,
    runs_ptr, k_t, v_t, bh, b, c, dk, dv, T,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Carry a tile of C, its n and its bound over chunk c.

    m, m_end: of the token before the chunk and of its last one.
    """
    v_max = tl.load(v_max_ptr + c)
    decay = chunk_decay(sum_high_ptr, sum_low_ptr, m, m_end, runs_ptr, bh, b, c, T, SEGMENTED, L)
    C, n, bound = C * decay, n * decay, bound * decay
    for a in tl.static_range(0, L, BT):
        t0 = c * L + a
        t = t0 + tl.arange(0, BT)
        write = write_weights(
            sum_high_ptr, sum_low_ptr, i_ptr, m_end, runs_ptr, bh, b, c, t, T, SEGMENTED, L
        )
        v = load_centred(v_ptr, v_t, centre_ptr, t0, T, dv, BT).to(DOT)
        # The weight goes on k and not on v: features are positive, and the rounding of the
        # weighted ones averages out in q . k. On v it put df in bfloat16 over its bound.
        key = load_tile(k_ptr, k_t, t0, T, dk, BT).to(tl.float32) * write[:, None]
        C = tl.dot(tl.trans(key.to(DOT)), v, C, input_precision=PRECISION)
        n += tl.sum(key, 0)
        bound += tl.sum(tl.abs(key), 0) * v_max
    return C, n, bound


@triton.jit(do_not_specialize=UNSPECIALISED)
def state_end_kernel(
    k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr, sum_high_ptr, sum_low_ptr, max_log_weight_ptr,
    runs_ptr, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, end_m_ptr,
    k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks, span,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute a tile of what a super-chunk adds to the state at its end.

    Grid (B H * (super-chunks - 1) * DV / BV * DK / BK): all super-chunks but the last. Each starts
    from nothing, so that end_m is the stabiliser of its own tokens. end_log_f: its sum of log f.
    """
    others = tl.cdiv(chunks, span) - 1
    tile_k, tile_v, bh, u = tile_head_and_super_chunk(tl.program_id(0), DK // BK, DV // BV, others)
    b, h = bh // H, bh % H
    dk, dv = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    centre_ptr += (b * (H // R) + h // R) * DV
    v_max_ptr += (b * (H // R) + h // R) * chunks
    C = tl.zeros((BK, BV), tl.float32)
    n, bound = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    m = tl.full((), LOG_ZERO, tl.float32)
    log_f = tl.full((), 0.0, tl.float64)
    for step in range(span):
        c = u * span + step
        m_end = next_stabiliser(
            sum_high_ptr, max_log_weight_ptr, runs_ptr, m, bh, b, c, T, SEGMENTED, L
        )
        C, n, bound = carry(
            C, n, bound, m, m_end, k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr,
            sum_high_ptr, sum_low_ptr, runs_ptr, k_t, v_t, bh, b, c, dk, dv, T,
            SEGMENTED, PRECISION, DOT, L, BT,
        )  # fmt: skip
        log_f += chunk_log_f(sum_high_ptr, sum_low_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L)
        m = m_end
    slot = bh * others + u
    tl.store(end_C_ptr + slot * DK * DV + dk[:, None] * DV + dv[None, :], C)
    if tile_v == 0:
        tl.store(end_n_ptr + slot * DK + dk, n)
        tl.store(end_bound_ptr + slot * DK + dk, bound)
    if (tile_k == 0) & (tile_v == 0):
        tl.store(end_log_f_ptr + slot, log_f)
        tl.store(end_m_ptr + slot, m)


@triton.jit
def stabiliser_after(end_log_f_ptr, end_m_ptr, slot, m):
    """Compute m at the end of a super-chunk, from m at its start."""
    # The same numbers in the same order in each program, so that all programs find the same m.
    return tl.maximum(tl.load(end_m_ptr + slot), (tl.load(end_log_f_ptr + slot) + m).to(tl.float32))


@triton.jit
def join_ends(
    C, n, bound, m, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, end_m_ptr, first_slot, u,
    dk, dv, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Carry a tile of C, its n, its bound and m from the row's start to that of super-chunk u."""
    for before in range(u):
        slot = first_slot + before
        m_end = stabiliser_after(end_log_f_ptr, end_m_ptr, slot, m)
        decay = tl.exp((tl.load(end_log_f_ptr + slot) + (m - m_end)).to(tl.float32))
        weight = tl.exp(tl.load(end_m_ptr + slot) - m_end)
        tile = slot * DK * DV + dk[:, None] * DV + dv[None, :]
        C = C * decay + tl.load(end_C_ptr + tile) * weight
        n = n * decay + tl.load(end_n_ptr + slot * DK + dk) * weight
        bound = bound * decay + tl.load(end_bound_ptr + slot * DK + dk) * weight
        m = m_end
    return C, n, bound, m


@triton.jit
def walk(
    program,
    k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr, sum_high_ptr, sum_low_ptr, max_log_weight_ptr,
    runs_ptr, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, end_m_ptr,
    C0_ptr, C0_max_ptr, n0_ptr, m0_ptr, C_ptr, C_scale_ptr, n_ptr, m_ptr, C_end_ptr, n_end_ptr,
    k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks, span,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry one (BK, BV) tile of the memory C over the chunks of a super-chunk.

    Stores the state as it enters each chunk and as it leaves the last one. C is kept in units of
    C_scale (B H, chunks, Dk), in which float16 holds it. The first program of a head and
    super-chunk also writes the stabiliser m (B, H, T) of every token. The pointers of the ends of
    super-chunks are None if one is a whole row; those of m and of what leaves the last chunk, where
    these are known.
    """
    super_chunks = tl.cdiv(chunks, span)
    tile_k, tile_v, bh, u = tile_head_and_super_chunk(program, DK // BK, DV // BV, super_chunks)
    b, h = bh // H, bh % H
    dk, dv = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    tile = dk[:, None] * DV + dv[None, :]
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    centre_ptr += (b * (H // R) + h // R) * DV
    centre = tl.load(centre_ptr + dv)
    n = tl.load(n0_ptr + bh * DK + dk)
    C = tl.load(C0_ptr + bh * DK * DV + tile) - n[:, None] * centre[None, :]
    # The programs of a head agree on the scale of a row, because each carries the same bound of
    # |C|: what the row would be if no terms cancelled.
    v_max_ptr += (b * (H // R) + h // R) * chunks
    bound = tl.load(C0_max_ptr + bh * DK + dk)
    m = tl.load(m0_ptr + bh)
    m_border = m
    if end_C_ptr is not None:
        first_slot = bh * (super_chunks - 1)
        C, n, bound, m = join_ends(
            C, n, bound, m, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, end_m_ptr,
            first_slot, u, dk, dv, DK, DV,
        )  # fmt: skip
        # The last super-chunk has no next one; it computes another's border and does not use it.
        slot = first_slot + tl.minimum(u, super_chunks - 2)
        m_border = stabiliser_after(end_log_f_ptr, end_m_ptr, slot, m)
    for step in range(tl.minimum(span, chunks - u * span)):
        c = u * span + step
        slot = bh * chunks + c
        scale, inverse = scale_below(bound)
        tl.store(C_ptr + slot * DK * DV + tile, (C * inverse[:, None]).to(C_ptr.dtype.element_ty))
        if tile_v == 0:
            tl.store(C_scale_ptr + slot * DK + dk, scale)
            tl.store(n_ptr + slot * DK + dk, n)
        m_end = next_stabiliser(
            sum_high_ptr, max_log_weight_ptr, runs_ptr, m, bh, b, c, T, SEGMENTED, L
        )
        if end_C_ptr is not None:
            # The next super-chunk starts from this m, of which m_end is another rounding.
            m_end = tl.where((step == span - 1) & (c < chunks - 1), m_border, m_end)
        if m_ptr is not None:  # noqa: SIM102 - decided when it is compiled
            if (tile_k == 0) & (tile_v == 0):
                t = c * L + tl.arange(0, L)
                row, reads = bh * T + t, t < T
                if SEGMENTED:
                    reads = load_run(runs_ptr, b, t, T) == run_before(runs_ptr, b, c, T, L)
                max_log_weight = tl.load(max_log_weight_ptr + row, mask=t < T, other=LOG_ZERO)
                sum_high = tl.load(sum_high_ptr + row, mask=t < T, other=0.0)
                m_t = tl.maximum(max_log_weight, tl.where(reads, sum_high + m, LOG_ZERO))
                if end_C_ptr is not None:
                    m_t = tl.where(t == last_token(c, T, L), m_end, m_t)
                tl.store(m_ptr + row, m_t, mask=t < T)
        C, n, bound = carry(
            C, n, bound, m, m_end, k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr,
            sum_high_ptr, sum_low_ptr, runs_ptr, k_t, v_t, bh, b, c, dk, dv, T,
            SEGMENTED, PRECISION, DOT, L, BT,
        )  # fmt: skip
        m = m_end
    # Inside the loop C is that of the centred values; C + n centreᵀ is that of the values
    # themselves.
    if C_end_ptr is not None:  # noqa: SIM102 - as above
        if u == super_chunks - 1:
            tl.store(C_end_ptr + bh * DK * DV + tile, C + n[:, None] * centre[None, :])
            if tile_v == 0:
                tl.store(n_end_ptr + bh * DK + dk, n)


@triton.jit(do_not_specialize=UNSPECIALISED)
def state_kernel(
    k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr, sum_high_ptr, sum_low_ptr, max_log_weight_ptr,
    runs_ptr, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, end_m_ptr,
    C0_ptr, C0_max_ptr, n0_ptr, m0_ptr, C_ptr, C_scale_ptr, n_ptr, m_ptr, C_end_ptr, n_end_ptr,
    k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks, span,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry the memory over the chunks: `walk`. Grid (B H * super-chunks * DV / BV * DK / BK)."""
    walk(
        tl.program_id(0), k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr, sum_high_ptr, sum_low_ptr,
        max_log_weight_ptr, runs_ptr, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, end_m_ptr,
        C0_ptr, C0_max_ptr, n0_ptr, m0_ptr, C_ptr, C_scale_ptr, n_ptr, m_ptr, C_end_ptr, n_end_ptr,
        k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks, span,
        SEGMENTED, PRECISION, DOT, L, BT, DK, DV, BK, BV,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def output_kernel(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    C_ptr, C_scale_ptr, n_ptr, h_ptr, h_centred_ptr, h_scale_ptr, den_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute h and its denominator for a tile of a chunk. Grid (chunks * B H * L / BT, DV / BV).

    Reads the state that enters the chunk, and the chunk's tokens up to the tile's end. Also writes
    `h_centred`, which is h less the common component of the values, in units of `h_scale`
    (B, H, DV / BV, T), unless their pointers are None (nothing requires gradients).
    """
    c, a, bh = chunk_tile_and_head(chunks, L // BT)
    tile_v = tl.program_id(1)
    b, h = bh // H, bh % H
    slot = bh * chunks + c
    t0 = c * L + a * BT
    t = t0 + tl.arange(0, BT)
    dv = tile_v * BV + tl.arange(0, BV)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    centre_ptr += (b * (H // R) + h // R) * DV
    num = tl.zeros((BT, BV), tl.float32)
    den = tl.zeros((BT,), tl.float32)
    for d in range(0, DK, BK):
        dk = d + tl.arange(0, BK)
        q = load_tile(q_ptr, q_t, t0, T, dk, BT).to(tl.float32)
        C = tl.load(C_ptr + slot * DK * DV + dk[:, None] * DV + dv[None, :])
        scale = tl.load(C_scale_ptr + slot * DK + dk)
        n = tl.load(n_ptr + slot * DK + dk)
        num = dot_state((q * scale[None, :]).to(DOT), C, num, PRECISION)
        den += tl.sum(q * n[None, :], 1)
    read = read_weights(
        sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, t, T, SEGMENTED, L
    )
    num, den = num * read[:, None], den * read
    for j in range(a + 1):
        s0 = c * L + j * BT
        s = s0 + tl.arange(0, BT)
        scores = tl.zeros((BT, BT), tl.float32)
        for d in range(0, DK, BK):
            dk = d + tl.arange(0, BK)
            q = load_tile(q_ptr, q_t, t0, T, dk, BT).to(DOT)
            k = load_tile(k_ptr, k_t, s0, T, dk, BT).to(DOT)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        weights = scores * pair_weights(
            sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, t, s, T, SEGMENTED, False
        )
        v = load_centred(v_ptr, v_t, centre_ptr, s0, T, dv, BT).to(DOT)
        num = tl.dot(weights.to(DOT), v, num, input_precision=PRECISION)
        den += tl.sum(weights, 1)
    # A denominator of exactly 0 is stored as inf, which makes h and its gradient 0.
    den = tl.where(den == 0.0, float("inf"), den)
    h_centred = num / den[:, None]
    has_weight = tl.where(den == float("inf"), 0.0, 1.0)
    output = has_weight[:, None] * tl.load(centre_ptr + dv)[None, :] + h_centred
    out = bh * T * DV + t[:, None].to(tl.int64) * DV + dv[None, :]
    tl.store(h_ptr + out, output.to(h_ptr.dtype.element_ty), mask=(t < T)[:, None])
    if h_centred_ptr is not None:
        scale, inverse = scale_below(tl.max(tl.abs(h_centred), 1))
        h_centred = (h_centred * inverse[:, None]).to(h_centred_ptr.dtype.element_ty)
        tl.store(h_centred_ptr + out, h_centred, mask=(t < T)[:, None])
        tl.store(h_scale_ptr + (bh * (DV // BV) + tile_v) * T + t, scale, mask=t < T)
    if tile_v == 0:
        tl.store(den_ptr + bh * T + t, den, mask=t < T)
