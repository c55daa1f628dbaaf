"""Memory and tokens a second of decoding over the context, measured with the evaluation."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from xlstm_distill.models.cache import StudentCache
from xlstm_distill.models.families import CausalLM
from xlstm_distill.recipe import SpeedSettings
from xlstm_distill.runtime.arithmetic import arithmetic
from xlstm_distill.runtime.device import peak_bytes
from xlstm_eval.report.speed import Speed, SpeedPoint

FIRST = 128
"""Tokens of the first context; each further one has twice as many."""
CHUNK = 1024
"""Tokens that are read at a time, so that activations of a long prompt need no more memory."""
STEPS, LEAST_STEPS, WARM_UP = 16, 3, 2
"""Decoded tokens that are timed after each context: at most, and where the budget is over. Those
before them are not timed."""
READ_GROWTH = 4
"""What reading to the next context takes at most, in times of the last."""


@torch.no_grad()
def measure_speed(model: CausalLM, settings: SpeedSettings, device: torch.device) -> Speed | None:
    """Decode after contexts of 128, 256, ... tokens; None where the budget allows none.

    One sequence of seeded random tokens is read once, to the longest context: after each doubling a
    few tokens are decoded and timed. What they are does not matter to the time. Contexts may exceed
    those that the model was trained on. It ends at `settings.longest`, before `settings.seconds`
    are over, or where memory ends.
    """
    if not settings.seconds:
        return None
    ends = _clock(device) + settings.seconds
    cache = empty_cache(model)
    points: list[SpeedPoint] = []
    tokens = _random_tokens(model, settings.longest + STEPS + WARM_UP, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    held, context, expected, stopped = 0, FIRST, 0.0, "the limit on contexts"
    while context <= settings.longest:
        began = _clock(device)
        if points and began + expected > ends:
            stopped = "the budget of seconds"
            break
        try:
            held = _read(model, tokens, cache, held, context)
            expected = READ_GROWTH * (_clock(device) - began)
            point, held = _point(model, tokens, cache, context, ends)
            points.append(point)
        except torch.OutOfMemoryError:
            stopped = "memory"
            break
        context *= 2
    if not points:
        return None
    facts = arithmetic(device)
    return Speed(
        device=str(facts.get("gpu") or facts.get("processor") or device.type),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        steps=STEPS,
        stopped=stopped,
        points=tuple(points),
    )


def empty_cache(model: CausalLM) -> Cache:
    """Return the cache that decoding begins with: a student's own, or the teacher's."""
    if hasattr(model, "new_cache"):
        own: Cache = model.new_cache()
        return own
    # With its configuration it drops keys beyond the windows of layers that have one.
    return DynamicCache(config=model.config)


def held_bytes(cache: Cache) -> int:
    """Count the bytes of all tensors of a cache."""
    if isinstance(cache, StudentCache):
        return cache.nbytes()
    layers: list[Any] = list(cache.layers)
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _random_tokens(model: CausalLM, count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, count), generator=generator).to(device)


def _read(model: CausalLM, tokens: torch.Tensor, cache: Cache, held: int, context: int) -> int:
    """Read tokens in chunks until the cache has taken in `context` of them; return their number."""
    while held < context:
        chunk = tokens[:, held : min(context, held + CHUNK)]
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        held += chunk.shape[1]
    return held


def _point(
    model: CausalLM, tokens: torch.Tensor, cache: Cache, context: int, ends: float
) -> tuple[SpeedPoint, int]:
    """Count what is held after a context, then decode and take the median time of a token.

    Returns also how many tokens the cache has then taken in.
    """
    state, device = held_bytes(cache), tokens.device
    seconds = []
    for step in range(WARM_UP + STEPS):
        token = tokens[:, context + step : context + step + 1]
        began = _clock(device)
        model(token, past_key_values=cache, use_cache=True)
        seconds.append(_clock(device) - began)
        if len(seconds) >= WARM_UP + LEAST_STEPS and _clock(device) > ends:
            break
    point = SpeedPoint(
        context=context,
        state_bytes=state,
        tokens_per_second=1 / statistics.median(seconds[WARM_UP:]),
        peak_bytes=peak_bytes(device) if device.type == "cuda" else None,
    )
    return point, context + len(seconds)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
