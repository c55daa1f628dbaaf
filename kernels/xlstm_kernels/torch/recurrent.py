"""One decoding step, in place: of the mLSTM, of the window, and of the whole hybrid mixer.

Decoding small models is bound by the number of operators, so there are few of them here, and no
conversion to a dtype that a tensor has already. Callers switch autograd and autocast off: nothing
here is differentiable, and products keep their dtypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.state import MLSTMState, Ring, RingSlots
from xlstm_kernels.torch.bounded import bound, wide_product


def mlstm_step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState,
    index: Tensor | None = None,
) -> Tensor:
    """Update `state` by one token and read it: the four lines of docs/math.md.

    Shapes as in `xlstm_kernels.mlstm_step`, which checks the arguments. Returns h in v's dtype.
    """
    if index is not None:
        # torch's operators take no rows by index, so the rows of this step are copied out and back.
        rows = MLSTMState(*(x.index_select(0, index) for x in state))
        h = mlstm_step_in_place(q, k, v, i, f, rows)
        for held, new in zip(state, rows, strict=True):
            held.index_copy_(0, index, new)
        return h
    C, n, m = state
    (B, H, Dk, Dv), G = C.shape, v.shape[1]
    given = v.dtype
    if not q.dtype == k.dtype == v.dtype == i.dtype == f.dtype == C.dtype:
        q, k, v, i, f = (x.to(C.dtype) for x in (q, k, v, i, f))
    log_decay = F.logsigmoid(f).add_(m)
    m_new = torch.maximum(log_decay, i)
    decay = log_decay.sub_(m_new).exp_().unsqueeze(-1)  # (B, H, 1)
    key = k * (i - m_new).exp_().unsqueeze(-1)  # (B, H, Dk)
    torch.addcmul(key, n, decay, out=n)
    C.mul_(decay.unsqueeze(-1))
    # The heads of a group share v, which is broadcast over them and never repeated in memory.
    groups = (B, G, H // G, Dk)
    C.view(*groups, Dv).addcmul_(key.view(*groups, 1), v[:, :, None, None])
    m.copy_(m_new)
    h = torch.bmm(q.reshape(B * H, 1, Dk), C.reshape(B * H, Dk, Dv)).view(B, H, Dv)
    den = (q * n).sum(dim=-1, keepdim=True)
    h.div_(den.masked_fill_(den == 0, torch.inf))  # 0 where nothing was read
    return h if h.dtype == given else h.to(given)


def window_step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    slots: RingSlots,
    scale: float,
    index: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Store one token in `ring` and attend to what it sees.

    Shapes as in `xlstm_kernels.window_step`, which checks the arguments. `ring.lengths` is not read
    and stays as it is. Returns (B, H, Dv) in v's dtype.
    """
    (B, H, D), (G, Dv) = q.shape, v.shape[1:]
    places = slots.places[:, None, :, None]
    for held, new in ((ring.keys, k), (ring.values, v)):
        new = new if new.dtype == held.dtype else new.to(held.dtype)
        shape = (B, G, 2, new.shape[2])
        new = new.unsqueeze(2).expand(shape)
        if index is not None:
            held[index[:, None], :, slots.places] = new.transpose(1, 2)
        elif B == 1:  # the same in less than half the time
            held.index_copy_(2, slots.places[0], new)
        else:
            held.scatter_(2, places.expand(shape), new)
    keys, values = ring.keys, ring.values
    if index is not None:
        keys, values = keys.index_select(0, index), values.index_select(0, index)
    # The heads of a group are rows of one query: each key is read once for all of them.
    rows, bias = q.reshape(B, G, H // G, D), slots.bias
    if keys.dtype != q.dtype:
        keys, values = keys.to(q.dtype), values.to(q.dtype)
    if bias.dtype != q.dtype:
        bias = bias.to(q.dtype)
    if softcap is None and sink_logits is None:
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    else:
        scores = bound(wide_product(rows, keys.mT).mul_(scale), softcap) + bias
        if sink_logits is not None:
            extra = sink_logits.to(scores.dtype).view(1, G, H // G, 1).expand(B, -1, -1, -1)
            scores = torch.cat([scores, extra], dim=-1)
        # Of the last logit there is no value.
        out = scores.softmax(dim=-1)[..., : keys.shape[2]].to(q.dtype) @ values
    return out.reshape(B, H, Dv).to(v.dtype)


def hybrid_step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    i: Tensor,
    f: Tensor,
    gate: Tensor,
    state: MLSTMState,
    ring: Ring,
    slots: RingSlots,
    *,
    scale: float,
    index: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Update `state` and `ring` by one token and read both.

    Shapes as in `xlstm_kernels.hybrid_step`, which checks the arguments. `ring.lengths` stays as it
    is. Both branches are rounded to v's dtype before they are mixed, as in a sequence.
    """
    attended = window_step_in_place(q, k, v, ring, slots, scale, index, softcap, sink_logits)
    recalled = mlstm_step_in_place(phi_q, phi_k, v, i, f, state, index)
    gate = gate if gate.dtype == v.dtype else gate.to(v.dtype)
    return torch.lerp(attended, recalled, gate.unsqueeze(-1))


def next_slots(ring: Ring, sinks: int) -> RingSlots:
    """Find the slots of a ring's next token, and count it."""
    before = ring.lengths.clone()
    ring.lengths.add_(1)
    return RingSlots.of(before, ring.keys.shape[2] - sinks, sinks, ring.keys.dtype)
