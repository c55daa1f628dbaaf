"""What decoding carries from token to token: the mLSTM state, and the ring of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Log-weight of nothing. It is finite, so that the difference of two of them is a number and not
# nan, and so low that its exponential is 0.
LOG_ZERO = -1e30


class MLSTMState(NamedTuple):
    """State of the mLSTM recurrence, stored divided by exp(m).

    C (B, H, Dk, Dv): matrix memory. n (B, H, Dk): normaliser. m (B, H): stabiliser in log space,
    always detached. The memory of the recurrence is exp(m) * C and its normaliser exp(m) * n; see
    docs/math.md, "Stabilised recurrence".
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
        """Make the state before the first token: C = n = 0, and m = LOG_ZERO."""
        return cls(
            C=torch.zeros(batch, heads, key_dim, value_dim, dtype=dtype, device=device),
            n=torch.zeros(batch, heads, key_dim, dtype=dtype, device=device),
            m=torch.full((batch, heads), LOG_ZERO, dtype=dtype, device=device),
        )


class Ring(NamedTuple):
    """Keys and values that decoding still needs: N slots of sinks, then a ring of W slots.

    keys (B, G, N + W, D), values (B, G, N + W, Dv). positions (B, N + W), int64: the position, in
    its document, of the token that a slot holds; -1 if the slot is empty. lengths (B,), int64:
    tokens of the document so far.

    The token at position p is in slot N + p mod W until a later one overwrites it. The first N
    tokens are also in slots 0 to N - 1, for good.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        groups: int,
        key_dim: int,
        value_dim: int,
        *,
        window: int,
        sinks: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Ring:
        """Make a ring that holds nothing."""
        slots = sinks + window
        return cls(
            keys=torch.zeros(batch, groups, slots, key_dim, dtype=dtype, device=device),
            values=torch.zeros(batch, groups, slots, value_dim, dtype=dtype, device=device),
            positions=torch.full((batch, slots), -1, dtype=torch.int64, device=device),
            lengths=torch.zeros(batch, dtype=torch.int64, device=device),
        )


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that the operators compute in: float64 if any input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
