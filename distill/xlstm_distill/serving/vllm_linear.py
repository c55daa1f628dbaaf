"""Linear layers of a student in vLLM on a CPU: vLLM's own product of matrices.

It packs weights once (oneDNN). On AMD's processors torch's product takes twice its time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm


class PackedLinear(nn.Module):
    """A linear layer whose weights vLLM has packed."""

    cpu_linear: Any

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # Packed weights are a copy, so the others go.
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b of x (..., d)."""
        found: Tensor = self.cpu_linear(x, self.weight, self.bias)
        return found


def pack_linears(model: nn.Module) -> None:
    """Replace all plain linear layers inside a model; nobody may read their weights after it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
