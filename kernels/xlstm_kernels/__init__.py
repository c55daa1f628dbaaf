"""Operators of the hybrid xLSTM student: exact, differentiable, linear in the number of tokens.

Imports torch, and Triton only where backend="triton" is asked for. Shapes are batch-first; every operator has a float64
reference in `xlstm_kernels.reference`.
"""

from xlstm_kernels.api import hybrid_step, mlstm, mlstm_step, sliding_window_attention
from xlstm_kernels.dispatch import BACKENDS, Backend
from xlstm_kernels.state import MLSTMState, Ring

__all__ = [
    "BACKENDS",
    "Backend",
    "MLSTMState",
    "Ring",
    "hybrid_step",
    "mlstm",
    "mlstm_step",
    "sliding_window_attention",
]
