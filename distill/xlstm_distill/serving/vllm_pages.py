"""How a student's state lies in vLLM's memory, which is cut into pages of one size.

A layer with a mixer has one page for each request. Kept heads have pages for their keys and values,
of as many tokens as a page takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from xlstm_distill.models.mixer import HybridMixer
from xlstm_kernels.state import state_dtype

ALIGNMENT = 64
"""Bytes that tensors and pages begin at multiples of."""
TOKENS = 32
"""vLLM's attention takes blocks of a multiple of so many tokens (on CPUs; 16 on GPUs)."""


@dataclass(frozen=True)
class Part:
    """A tensor of a mixer's state: its shape for one request, and where it begins in a page."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def end(self) -> int:
        """Bytes of the page up to its end."""
        return self.offset + prod(self.shape) * self.dtype.itemsize

    def of(self, pages: Tensor) -> Tensor:
        """View it in pages (P, bytes), of one byte each: (P, ...)."""
        return pages[:, self.offset : self.end].view(self.dtype).unflatten(1, self.shape)


def parts_of(mixer: HybridMixer) -> list[Part]:
    """Return the tensors of a mixer's state: C, n, m of the mLSTM, keys and values of the ring."""
    tensors: list[tuple[tuple[int, ...], torch.dtype]] = []
    weight = mixer.value_weight
    if mixer.has_mlstm:
        dtype, features = state_dtype(weight), mixer.feature_map_k.out_features
        memory = (len(mixer.kept.mixed), features, mixer.head_dim)
        tensors += [(memory, dtype), (memory[:2], dtype), (memory[:1], dtype)]
    if mixer.has_window:
        ring = (mixer.kept.mixed_keys, mixer.sink_tokens + mixer.window, mixer.head_dim)
        tensors += [(ring, weight.dtype)] * 2
    parts: list[Part] = []
    for shape, dtype in tensors:
        offset = aligned(parts[-1].end, ALIGNMENT) if parts else 0
        parts.append(Part(shape, dtype, offset))
    return parts


def bytes_per_token(mixer: HybridMixer) -> int:
    """Return the bytes of a token's keys and values in the heads that are kept."""
    return 2 * mixer.kept.kept_keys * mixer.head_dim * mixer.value_weight.dtype.itemsize


def page_size(mixers: Iterable[HybridMixer]) -> int:
    """Return the bytes of a page: it takes a state, or some tokens' keys and values."""
    mixers = list(mixers)
    states = [part.end for mixer in mixers for part in parts_of(mixer)]
    # What has most kept heads fills its pages without a rest.
    unit = max(ALIGNMENT, *(TOKENS * bytes_per_token(mixer) for mixer in mixers))
    return aligned(max(states, default=1), unit)


def page_tokens(mixer: HybridMixer, page: int) -> int:
    """Return how many tokens' keys and values of a layer's kept heads a page takes."""
    return page // (TOKENS * bytes_per_token(mixer)) * TOKENS


def aligned(size: int, unit: int) -> int:
    """Round a size up to a multiple of a unit."""
    return -(-size // unit) * unit
