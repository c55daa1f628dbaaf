"""Operators of the hybrid xLSTM student: exact, differentiable, linear in the number of tokens.

Imports torch only. Shapes are batch-first; every operator has a float64 reference in `xlstm_kernels.reference`.
"""

from xlstm_kernels.api import BACKENDS, Backend, mlstm, mlstm_step, sliding_window_attention
from xlstm_kernels.state import MLSTMState

__all__ = ["BACKENDS", "Backend", "MLSTMState", "mlstm", "mlstm_step", "sliding_window_attention"]
