"""The mLSTM state and its dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Log-weight of nothing. Finite, so that a difference of two of them is a number; so low that its exponential is 0.
LOG_ZERO = -1e30


class MLSTMState(NamedTuple):
    """Carry of the mLSTM recurrence, stored divided by exp(m).

    C (B, H, Dk, Dv): matrix memory. n (B, H, Dk): normaliser. m (B, H): log-space stabiliser, always detached.
    The memory of the recurrence is exp(m) * C, its normaliser exp(m) * n (docs/math.md, "Stabilised recurrence").
    """

    C: Tensor
    n: Tensor
    m: Tensor

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MLSTMState:
        """Make the state that has seen nothing: C = n = 0, and m a large negative finite number."""
        return cls(
            C=torch.zeros(batch, heads, key_dim, value_dim, dtype=dtype, device=device),
            n=torch.zeros(batch, heads, key_dim, dtype=dtype, device=device),
            m=torch.full((batch, heads), LOG_ZERO, dtype=dtype, device=device),
        )


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype the operators compute in: float64 if any input is, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
