"""One token of a mixer, in as few operators as the family allows.

Decoding reads every weight once per token, and waits for every operator to start. So gates that
are linear in the layer's input are one product, which is computed from the weights once per cache.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_distill.models.attention.heads import joined, take
from xlstm_distill.models.cache import MixerCacheLayer
from xlstm_distill.models.decoding.arrival import Arrival
from xlstm_distill.models.families import Rotary
from xlstm_distill.models.gates import ScalarGate
from xlstm_kernels import hybrid_step, mlstm_step, window_step
from xlstm_kernels.state import LOG_ZERO, state_dtype


class FoldedGates(NamedTuple):
    """Gates as one linear layer of the mixer's input, weight (K H, d) and bias (K H).

    Input gate, forget gate, and with `output` the preactivation of the output gate.
    """

    weight: Tensor
    bias: Tensor
    output: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedGates:
        """Share the tensors with a copy of the cache: nobody changes them."""
        return self


@torch.no_grad()
def fold_gates(mixer: Any) -> FoldedGates | None:
    """Fold a mixer's gates into one linear layer; None where a part is no plain linear layer.

    The output gate reads q, k and v before RoPE, W_q x and so on: o = W_h [W_q, W_k, W_v] x. Norms
    between the two (Qwen3, Olmo2, Olmo3, Exaone4) and clipped projections (Olmo) are not linear,
    and there its product stays apart. So it does under adapters, quantisation and sharding, whose
    layers are not plain.
    """
    scalar = (mixer.input_gate, mixer.forget_gate)
    if not all(_is_plain(gate) for gate in scalar):
        return None
    weights, biases = [gate.weight for gate in scalar], [gate.bias for gate in scalar]
    folds = mixer.has_window and mixer.family.norm == "none" and mixer.clip is None
    fused = mixer.family.fused
    sources = [mixer.qkv_proj] if fused else [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    if folds and all(_is_plain(source) for source in sources):
        weight, bias = _folded_output_gate(mixer, sources)
        weights.append(weight.to(weights[0].dtype))
        biases.append(bias.to(weights[0].dtype))
    return FoldedGates(torch.cat(weights), torch.cat(biases), len(weights) == 3)


def _is_plain(layer: Any) -> bool:
    """Tell whether a module is a linear layer that computes as torch does, on weights at hand."""
    return (
        type(layer) in (nn.Linear, ScalarGate)
        and type(layer.weight) in (nn.Parameter, Tensor)
        and layer.weight.shape == (layer.out_features, layer.in_features)
        and layer.weight.is_floating_point()
        and not layer.weight.is_meta
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        # Libraries that offload weights replace a module's forward.
        and "forward" not in vars(layer)
    )


def _folded_output_gate(mixer: Any, sources: list[Any]) -> tuple[Tensor, Tensor]:
    """Return weight (H, d) and bias (H) of the output gate as a function of the mixer's input."""
    gate, exact = mixer.output_gate, state_dtype(mixer.output_gate.weight)
    heads, _, dim = gate.weight.shape
    parts = gate.weight.to(exact).unbind(1)  # of q, k and v, (H, D) each
    widths, read = mixer.widths, (mixer.kept.queries, mixer.kept.keys, mixer.kept.keys)
    weights = torch.cat([source.weight for source in sources]).to(exact).split(widths)
    biases = [
        torch.zeros(len(s.weight), device=gate.weight.device) if s.bias is None else s.bias
        for s in sources
    ]
    bias = gate.bias.to(exact)
    total = weights[0].new_zeros(heads, weights[0].shape[1])
    offsets = torch.cat(biases).to(exact).split(widths)
    for part, weight, offset, runs in zip(parts, weights, offsets, read, strict=True):
        # Of the heads that the mixer reads.
        weight = take(weight.view(1, -1, dim, weight.shape[1]), runs)[0]
        offset = take(offset.view(1, -1, dim), runs)[0]
        groups = len(weight)
        per_group = part.view(groups, heads // groups, dim)
        total += (per_group @ weight).flatten(0, 1)
        bias = bias + (per_group @ offset[..., None]).flatten()
    return total, bias


def decode_token(
    mixer: Any,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    arrival: Arrival,
    layer: MixerCacheLayer,
) -> Tensor:
    """Mix the branches for one token x (B, 1, d), and update the cache in place: (B, 1, H D)."""
    q, k, v = mixer.project(x)
    # Typed loosely: a mixer has a memory, a window or both, and only then what they take.
    i: Any = None
    f: Any = None
    gate: Any = None
    if mixer.has_mlstm:
        # The output gate reads q and k before RoPE.
        i, f, gate = _gates(mixer, layer, x, *mixer.of_mixer(q, k, v))
    # Without the bookkeeping of autograd, which is a part of what each small operator takes.
    given = (mixer, (q, k, v), (i, f, gate), position_embeddings, arrival, layer)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        h = _step(*given)
    else:
        with torch.inference_mode():
            h = _step(*given)
    layer.checked = True
    layer.seen += 1
    h = h.flatten(1).unsqueeze(1)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return h
    # A tensor like any other: hooks on the output projection may change what they get.
    return h.clone() if h.is_inference() else h


def _step(
    mixer: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    gates: tuple[Any, Any, Any],
    position_embeddings: tuple[Tensor, Tensor],
    arrival: Arrival,
    layer: MixerCacheLayer,
) -> Tensor:
    """Mix the branches of one token of these projections and gates, (B, H, D)."""
    (q, k, v), (i, f, gate) = qkv, gates
    memory: Any = None
    if mixer.rotates:
        q, k = _rotate(mixer, q, k, position_embeddings, arrival)
    full = None
    if mixer.kept.kept:
        full = mixer.keep(q, k, v, layer, arrival, None).squeeze(2)
        if not mixer.kept.mixed:
            return full
        q, k, v = mixer.of_mixer(q, k, v)
    settings = {"check": not layer.checked, "backend": mixer.backend}
    if layer.rows is not None:
        settings["index"] = layer.rows
    if mixer.has_mlstm:
        phi_q, phi_k = mixer.feature_map_q(q).squeeze(2), mixer.feature_map_k(k).squeeze(2)
        memory = layer.state_for(phi_k, v, state_dtype(phi_q, v))
        if arrival.begins is not None:
            # A closed forget gate empties the state as `restart_state` does, but saves a pass over
            # its memory.
            f = f.masked_fill(arrival.begins_on(f.device)[:, None], LOG_ZERO)
    q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(2)
    if not mixer.has_window:
        h = mlstm_step(phi_q, phi_k, v, i, f, memory, **settings)
    else:
        ring = layer.ring_for(k, v, arrival.before)
        slots = arrival.slots(ring, mixer.sink_tokens)
        ring = ring._replace(lengths=slots.before)  # on the ring's device
        settings |= {"sinks": mixer.sink_tokens, "scale": mixer.scale, "slots": slots}
        if mixer.family.own_softmax:
            settings["softcap"] = mixer.softcap
            settings["sink_logits"] = mixer.sink_logits(mixer.kept.queries)
        if memory is None:
            h = window_step(q, k, v, ring, **settings)
        else:
            h = hybrid_step(q, k, v, phi_q, phi_k, i, f, gate, memory, ring, **settings)
    return joined(mixer.kept, full, h)


def _rotate(
    mixer: Any,
    q: Tensor,
    k: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    arrival: Arrival,
) -> tuple[Tensor, Tensor]:
    """Apply the family's rotary positions to q (B, H, 1, D) and k (B, G, 1, D), in q's dtype."""
    cos, sin = position_embeddings
    dtype = q.dtype
    if not mixer.turns_halves:
        q, k = mixer.apply_rotary(q, k, cos, sin)
        # Under autocast, projections are bf16 and rotary positions fp32.
        return (q, k) if q.dtype == dtype else (q.to(dtype), k.to(dtype))
    cos, sin = _angles(position_embeddings, arrival)
    heads = q.shape[1]
    turned = _turn_halves(torch.cat([q, k], dim=1), cos, sin)
    turned = turned if turned.dtype == dtype else turned.to(dtype)
    return turned[:, :heads], turned[:, heads:]


def rotate_prompt(
    q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor], arrival: Arrival
) -> tuple[Tensor, Tensor]:
    """Apply rotary positions that turn halves to q (B, H, T, D) and k (B, G, T, D).

    The same numbers as the family's own function, in fewer passes over memory. Not differentiable.
    """
    cos, sin = _angles(position_embeddings, arrival)
    found = []
    for x in (q, k):
        turned = x.roll(x.shape[-1] // 2, -1)
        # In place, unless the angles are in a wider dtype.
        turned = turned.mul_(sin).add_(x * cos) if x.dtype == sin.dtype else turned * sin + x * cos
        found.append(turned)
    return found[0], found[1]


def _angles(position_embeddings: tuple[Tensor, Tensor], arrival: Arrival) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines for `_turn_halves`, (B, 1, T, D); layers share them."""
    cos, sin = position_embeddings
    # Layers may have frequencies of their own, and each kind has its own tensors.
    if arrival.rotation is None or arrival.rotation[0] is not sin:
        arrival.rotation = (sin, cos.unsqueeze(1), _signed(sin).unsqueeze(1))
    return arrival.rotation[1:]


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (x_d, x_{d + D/2}) by their angles; the sines of the first half are negative."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _signed(sin: Tensor) -> Tensor:
    """Negate the sines (..., D) of the first half."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


@functools.lru_cache(maxsize=64)
def turns_halves(apply_rotary: Rotary, dim: int) -> bool:
    """Tell whether a family's rotary function is Llama's, by what it does to random numbers.

    Each family has a function of its own, and most are the same. It makes about 15 operators of
    what takes 5 for one token.
    """
    draw = torch.Generator().manual_seed(0)
    # Of this device and dtype, wherever models are made.
    settings: dict[str, Any] = {"generator": draw, "device": "cpu", "dtype": torch.float32}
    q, k = (torch.randn(1, 2, 1, dim, **settings) for _ in range(2))
    cos, sin = (torch.randn(1, 1, dim, **settings) for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype) for x in (q, k, cos, sin)]
        try:
            found = apply_rotary(*given)
        except RuntimeError:  # gpt-oss gives the angles of half a head
            return False
        signed = _signed(given[3]).unsqueeze(1)
        for x, theirs in zip(given[:2], found, strict=True):
            if not torch.equal(_turn_halves(x, given[2].unsqueeze(1), signed), theirs):
                return False
    return True


def _gates(
    mixer: Any, layer: MixerCacheLayer, x: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return preactivations of input and forget gate, (B, H) in fp32, and the output gate (B, H).

    The output gate is None where the mixer has the mLSTM alone.
    """
    made = _folded_gates(mixer, layer, x)
    if made is None:
        i, f = mixer.input_gate(x).squeeze(1).float(), mixer.forget_gate(x).squeeze(1).float()
    else:
        i, f, *rest = made.view(len(x), -1, len(mixer.kept.mixed)).unbind(1)
        if rest:
            gate = rest[0].sigmoid()
            return i, f, gate if gate.dtype == v.dtype else gate.to(v.dtype)
    return i, f, mixer.output_gate(q, k, v)[:, :, 0, 0] if mixer.has_window else None


def gates_of_prompt(
    mixer: Any, layer: MixerCacheLayer, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the gates of x (B, T, d) as steps make them, from one product; None if they cannot.

    Preactivations of input and forget gate (B, H, T) in fp32, and the output gate (B, H, T, 1);
    None in its place where it is not linear in x. Nothing is folded for a prompt of fewer tokens
    than the width d: that would read more than the prompt itself.
    """
    if layer.folded is None and x.shape[0] * x.shape[1] < x.shape[2]:
        return None
    made = _folded_gates(mixer, layer, x)
    if made is None:
        return None
    i, f, *rest = made.unflatten(-1, (-1, len(mixer.kept.mixed))).permute(2, 0, 3, 1)
    return i, f, rest[0].sigmoid().to(dtype).unsqueeze(-1) if rest else None


def _folded_gates(mixer: Any, layer: MixerCacheLayer, x: Tensor) -> Tensor | None:
    """Return what all gates of x (B, T, d) are made of, (B, T, K H) in fp32.

    None where a mixer's gates are not linear in x; without the output gate where that is not, or
    where somebody listens to it (`GateMeter`).
    """
    if layer.folded is None:
        # A tuple, so that what cannot be folded is not tried again.
        layer.folded = (fold_gates(mixer),)
    (folded,) = layer.folded
    if folded is None:
        return None
    weight, bias, output = folded
    if output and mixer.output_gate._forward_hooks:
        heads = 2 * len(mixer.kept.mixed)
        weight, bias = weight[:heads], bias[:heads]
    made = F.linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, bias)
    return made if made.dtype == torch.float32 else made.float()
