"""Decoding kernels: the mLSTM step, and the hybrid step (mLSTM, attention, output gate).

One launch each, with enough programs for one row: each takes some columns of one head's C, or some
slots of one group's ring. They count themselves, and the last one of a group of heads does what
needs all of them. It adds up in a fixed order, so the order of arrival does not change a bit.
The letters and names are those of `triton/common.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import UNSPECIALISED, bound, log_sigmoid

# Score of a slot that is not seen. Finite, so that the difference of two of them is a number.
NEGATIVE = tl.constexpr(-1e30)
# One query head a group is a kernel of its own anyway, by RP. Where that one knows R it takes 48
# registers at D = 64 on sm_90, else 115.
ALL_BUT_R = tuple(name for name in UNSPECIALISED if name != "R")


@triton.jit
def next_sums(k, i, f, n, m):
    """Return the next n and m, and the weights of the old state and of the new token.

    k, n: Dk values, for one head or for a column of heads. The first lines of docs/math.md,
    "Stabilised recurrence".
    """
    log_decay = log_sigmoid(f) + m
    m_new = tl.maximum(log_decay, i)
    decay, write = tl.exp(log_decay - m_new), tl.exp(i - m_new)
    return n * decay + k * write, m_new, decay, write


@triton.jit
def advance_columns(
    q_ptr, k_ptr, v_ptr, i, f, C_ptr, n_ptr, m_ptr, C_row, n_k, tile_v,
    DK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Update BV columns of one head's C by one token, in place, and return their part of h.

    n and m stay as they are, because the head's other programs read them.
    """
    dk, dv = tl.arange(0, DK), tile_v * BV + tl.arange(0, BV)
    q, k = tl.load(q_ptr + dk).to(tl.float32), tl.load(k_ptr + dk).to(tl.float32)
    v = tl.load(v_ptr + dv).to(tl.float32)
    # 32 bits are enough inside one C (`near_rows`). 64 would take half as many registers again.
    tile = C_ptr + dk[:, None] * C_row + dv[None, :]
    C = tl.load(tile)
    n, _, decay, write = next_sums(k, i, f, tl.load(n_ptr + dk * n_k), tl.load(m_ptr))
    C = C * decay + (k * write)[:, None] * v[None, :]
    tl.store(tile, C)
    num, den = tl.sum(q[:, None] * C, 0), tl.sum(q * n, 0)
    return tl.where(den == 0.0, 0.0, num / tl.where(den == 0.0, 1.0, den))


@triton.jit
def is_last(arrived_ptr, count):
    """Count this program; say whether it is the last of `count`, and then reset the counter.

    The last one sees what the others stored before they were counted.
    """
    # The counter is changed by one thread: all others must have stored before.
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last


@triton.jit(do_not_specialize=UNSPECIALISED)
def step_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, f_ptr, C_ptr, n_ptr, m_ptr, index_ptr, arrived_ptr, h_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, i_b, i_h, f_b, f_h, C_b, C_h, C_row, n_b, n_h, n_k, m_b, m_h,
    H, R, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Update BV columns of one head by one token and read them. Grid (B H * DV / BV).

    index_ptr: where each row's state lies; None: in the order of the rows.
    """
    tiles: tl.constexpr = DV // BV
    tile_v, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    row = b
    if index_ptr is not None:
        row = tl.load(index_ptr + b)
    dk, dv = tl.arange(0, DK), tile_v * BV + tl.arange(0, BV)
    i = tl.load(i_ptr + b * i_b + h * i_h).to(tl.float32)
    f = tl.load(f_ptr + b * f_b + h * f_h).to(tl.float32)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    C_ptr += row * C_b + h * C_h
    n_ptr += row * n_b + h * n_h
    m_ptr += row * m_b + h * m_h
    out = advance_columns(
        q_ptr, k_ptr, v_ptr, i, f, C_ptr, n_ptr, m_ptr, C_row, n_k, tile_v, DK, BV
    )
    tl.store(h_ptr + bh * DV + dv, out.to(h_ptr.dtype.element_ty))
    if is_last(arrived_ptr + bh, tiles):
        k = tl.load(k_ptr + dk).to(tl.float32)
        n, m, _, _ = next_sums(k, i, f, tl.load(n_ptr + dk * n_k), tl.load(m_ptr))
        # Several warps load the same m: all must have read it before one of them writes.
        tl.debug_barrier()
        tl.store(n_ptr + dk * n_k, n)
        tl.store(m_ptr, m)


@triton.jit
def attend_slots(
    q_ptr, q_h, keys_ptr, values_ptr, sums_ptr, attended_ptr, first, seen, scale, window, sinks, R,
    D: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Attend from the heads of a group to some slots of its ring, from slot `first` on.

    For each head stores its largest score and the sum of its weights (`sums_ptr`), and the sum of
    the weighted values (`attended_ptr`). `seen` counts the tokens before this one; what a slot
    holds follows from it.
    """
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    slot = first + tl.arange(0, SLOTS)
    in_ring = slot >= sinks
    offset = tl.where(in_ring, slot - sinks, slot)
    # Position, in the document, of the token that the slot holds: in the ring, the latest token
    # before this one whose position is `offset` modulo the window.
    latest = seen - 1 - tl.maximum(seen - 1 - offset, 0) % window
    held = tl.where(in_ring, latest, offset)
    filled = (slot < sinks + window) & (offset < seen)
    # A sink that is still in the ring is read from there, and its own slot is not visible.
    visible = filled & (in_ring == (held > seen - window))
    # 32-bit offsets: a ring has fewer than 2^31 values (`hybrid_step_triton`). 64 bits would take
    # half as many registers again.
    mask = visible[:, None]
    keys = tl.load(keys_ptr + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
    values = tl.load(values_ptr + slot[:, None] * DV + dv[None, :], mask=mask, other=0.0)
    for r in range(R):
        q = tl.load(q_ptr + r * q_h + d).to(tl.float32) * scale
        scores = bound(tl.sum(q[None, :] * keys.to(tl.float32), 1), CAP)
        scores = tl.where(visible, scores, float("-inf"))
        largest = tl.maximum(tl.max(scores, 0), NEGATIVE)
        weights = tl.exp(scores - largest)
        tl.store(sums_ptr + 2 * r, largest)
        tl.store(sums_ptr + 2 * r + 1, tl.sum(weights, 0))
        attended = tl.sum(weights[:, None] * values.to(tl.float32), 0)
        tl.store(attended_ptr + r * DV + dv, attended)


@triton.jit
def join_attention(
    score, value, extra, sums_ptr, attended_ptr, splits, r, R,
    DV: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Join what `attend_slots` stored, and the new token itself: (RP, DV).

    score (RP): the new token's. value (DV). extra (RP): logits that are in the denominator alone,
    or None. r (RP): heads of the group, R of which there are.
    """
    dv, heads = tl.arange(0, DV), r < R
    # Past the first level of the cache, which does not see what other programs store.
    largest = score
    if extra is not None:
        largest = tl.maximum(largest, extra)
    for part in range(splits):
        sums = sums_ptr + 2 * (part * R + r)
        most = tl.load(sums, mask=heads, other=NEGATIVE, cache_modifier=".cg")
        largest = tl.maximum(largest, most)
    total = tl.exp(score - largest)
    out = total[:, None] * value[None, :]
    if extra is not None:
        total += tl.exp(extra - largest)
    for part in range(splits):
        sums = sums_ptr + 2 * (part * R + r)
        most = tl.load(sums, mask=heads, other=NEGATIVE, cache_modifier=".cg")
        weight = tl.exp(most - largest)
        total += weight * tl.load(sums + 1, mask=heads, other=0.0, cache_modifier=".cg")
        tile = attended_ptr + (part * R + r)[:, None] * DV + dv[None, :]
        each = tl.load(tile, mask=heads[:, None], other=0.0, cache_modifier=".cg")
        out += weight[:, None] * each
    return out / total[:, None]


@triton.jit(do_not_specialize=ALL_BUT_R)
def hybrid_step_kernel(
    q_ptr, k_ptr, v_ptr, phi_q_ptr, phi_k_ptr, i_ptr, f_ptr, gate_ptr, C_ptr, n_ptr, m_ptr,
    keys_ptr, values_ptr, before_ptr, lengths_ptr, index_ptr, sink_logits_ptr,
    recalled_ptr, sums_ptr, attended_ptr, arrived_ptr, out_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, phi_q_b, phi_q_h, phi_k_b, phi_k_h, i_b, i_h, f_b, f_h,
    gate_b, gate_h, C_b, C_h, C_row, n_b, n_h, n_k, m_b, m_h, keys_b, keys_h, values_b, values_h,
    scale, G, R, splits, window, sinks,
    D: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, SLOTS: tl.constexpr,
    RP: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Decode one token: mLSTM, attention to ring and sinks, output gate.

    Grid (B G * (splits + R * DV / BV)): of a group, first the parts of the ring, then the columns
    of its heads. C_ptr is None where there is no mLSTM. before_ptr (B): tokens before this one.
    lengths_ptr: where they are counted, None if they are not. sink_logits_ptr (H) or None.
    RP: 1 if R is, else R rounded up to a power of 2 from 4 on.
    recalled (B, H, DV), sums (B, G, splits, R, 2) and attended (B, G, splits, R, DV) are what the
    programs hand to the last one. Both branches are rounded before they are mixed, as in a
    sequence.
    """
    tiles: tl.constexpr = DV // BV
    count = splits
    if C_ptr is not None:
        count += R * tiles
    part, bg = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, g = bg // G, bg % G
    row = b
    if index_ptr is not None:
        row = tl.load(index_ptr + b)
    before = tl.load(before_ptr + b)
    seen = before.to(tl.int32)  # a document has fewer than 2^31 tokens
    first_head = g * R
    q_ptr += b * q_b + first_head * q_h
    v_ptr += b * v_b + g * v_h
    keys_ptr += row * keys_b + g * keys_h
    values_ptr += row * values_b + g * values_h
    sums_ptr += bg * splits * R * 2
    attended_ptr += bg * splits * R * DV
    recalled_ptr += bg * R * DV
    if part < splits:
        attend_slots(
            q_ptr, q_h, keys_ptr, values_ptr, sums_ptr + part * R * 2, attended_ptr + part * R * DV,
            part * SLOTS, seen, scale, window, sinks, R, D, DV, SLOTS, CAP,
        )  # fmt: skip
    elif C_ptr is not None:
        r, tile_v = (part - splits) // tiles, (part - splits) % tiles
        h = first_head + r
        recalled = advance_columns(
            phi_q_ptr + b * phi_q_b + h * phi_q_h, phi_k_ptr + b * phi_k_b + h * phi_k_h, v_ptr,
            tl.load(i_ptr + b * i_b + h * i_h).to(tl.float32),
            tl.load(f_ptr + b * f_b + h * f_h).to(tl.float32),
            C_ptr + row * C_b + h * C_h, n_ptr + row * n_b + h * n_h, m_ptr + row * m_b + h * m_h,
            C_row, n_k, tile_v, DK, BV,
        )  # fmt: skip
        tl.store(recalled_ptr + r * DV + tile_v * BV + tl.arange(0, BV), recalled)
    if is_last(arrived_ptr + bg, count):
        r, d, dv = tl.arange(0, RP), tl.arange(0, D), tl.arange(0, DV)
        h, heads = first_head + r, (r < R)[:, None]
        # The new token is attended to as the ring will hold it, as later steps do.
        key = tl.load(k_ptr + b * k_b + g * k_h + d).to(keys_ptr.dtype.element_ty)
        value = tl.load(v_ptr + dv).to(tl.float32).to(values_ptr.dtype.element_ty)
        q = tl.load(q_ptr + (r * q_h)[:, None] + d[None, :], mask=heads, other=0.0)
        score = bound(tl.sum(q.to(tl.float32) * scale * key.to(tl.float32)[None, :], 1), CAP)
        extra = None
        if sink_logits_ptr is not None:
            extra = tl.load(sink_logits_ptr + h, mask=r < R, other=0.0).to(tl.float32)
        out = join_attention(
            score, value.to(tl.float32), extra, sums_ptr, attended_ptr, splits, r, R, DV, RP
        )
        rounded = out_ptr.dtype.element_ty
        if C_ptr is not None:
            tile = recalled_ptr + r[:, None] * DV + dv[None, :]
            recalled = tl.load(tile, mask=heads, other=0.0, cache_modifier=".cg")
            out, recalled = out.to(rounded).to(tl.float32), recalled.to(rounded).to(tl.float32)
            gate = tl.load(gate_ptr + b * gate_b + h * gate_h, mask=r < R, other=0.0)
            out += gate.to(tl.float32)[:, None] * (recalled - out)
            store_sums(
                phi_k_ptr + b * phi_k_b, i_ptr + b * i_b, f_ptr + b * f_b, n_ptr + row * n_b,
                m_ptr + row * m_b, phi_k_h, i_h, f_h, n_h, n_k, m_h, h, r < R, DK,
            )  # fmt: skip
        tl.store(out_ptr + (bg * R + r)[:, None] * DV + dv[None, :], out.to(rounded), mask=heads)
        # The slot that the new token overwrites is visible to no program.
        ring_slot = sinks + seen % window
        tl.store(keys_ptr + ring_slot * D + d, key)
        tl.store(values_ptr + ring_slot * DV + dv, value)
        if seen < sinks:
            tl.store(keys_ptr + seen * D + d, key)
            tl.store(values_ptr + seen * DV + dv, value)
        if lengths_ptr is not None:  # noqa: SIM102 - known when the kernel is compiled
            # The other groups of the row read its length too.
            if is_last(arrived_ptr + tl.num_programs(0) // count + b, G):
                tl.store(lengths_ptr + b, before + 1)


@triton.jit
def store_sums(
    k_ptr, i_ptr, f_ptr, n_ptr, m_ptr, k_h, i_h, f_h, n_h, n_k, m_h, h, heads, DK: tl.constexpr
):
    """Store the next n and m of heads h."""
    dk, mask = tl.arange(0, DK), heads[:, None]
    n_tile = n_ptr + (h * n_h)[:, None] + (dk * n_k)[None, :]
    k = tl.load(k_ptr + (h * k_h)[:, None] + dk[None, :], mask=mask, other=0.0).to(tl.float32)
    i = tl.load(i_ptr + h * i_h, mask=heads, other=0.0).to(tl.float32)
    f = tl.load(f_ptr + h * f_h, mask=heads, other=0.0).to(tl.float32)
    n, m = tl.load(n_tile, mask=mask, other=0.0), tl.load(m_ptr + h * m_h, mask=heads, other=0.0)
    n, m, _, _ = next_sums(k, i[:, None], f[:, None], n, m[:, None])
    # Several warps load the same m: all must have read it before one of them writes.
    tl.debug_barrier()
    tl.store(n_tile, n, mask=mask)
    tl.store((m_ptr + h * m_h)[:, None], m, mask=mask)
