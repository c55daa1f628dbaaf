"""Operators of the hybrid xLSTM student: exact, differentiable, linear in the number of tokens.

Every operator has a float64 reference in `xlstm_kernels.reference`; docs/math.md has the formulas.
The package imports torch, and Triton only where a call asks for backend="triton".

Letters of all tensor shapes: B batch, T tokens, H query heads, G key/value heads (H a multiple of
G), D head dim (Dk of keys after the feature map, Dv of values), W window, N sinks.
"""

from xlstm_kernels.api import (
    hybrid_step,
    mlstm,
    mlstm_state,
    mlstm_step,
    sliding_window_attention,
    window_step,
)
from xlstm_kernels.dispatch import BACKENDS, Backend
from xlstm_kernels.state import MLSTMState, Ring, RingSlots

__all__ = [
    "BACKENDS",
    "Backend",
    "MLSTMState",
    "Ring",
    "RingSlots",
    "hybrid_step",
    "mlstm",
    "mlstm_state",
    "mlstm_step",
    "sliding_window_attention",
    "window_step",
]
