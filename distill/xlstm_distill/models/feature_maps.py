"""Feature maps of queries and keys: a linear map per head, then a softmax over the features."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FeatureMapName = Literal["softmax", "hedgehog"]


def in_dtype_of(x: Tensor, weight: Tensor) -> Tensor:
    """Convert x to the dtype of a weight that it is multiplied with.

    Stage I trains fp32 parameters in a bf16 model. Autocast converts by itself.
    """
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


class FeatureMap(nn.Module):
    """Map each head's vectors to non-negative features that sum to one.

    `softmax` is the paper's φ(x) = softmax(A_h x). `hedgehog` is
    [softmax(A_h x), softmax(-A_h x)] / 2, which keeps the directions that a single softmax
    squashes and doubles the state.

    Shapes: in (B, G, T, D) with H a multiple of G, out (B, H, T, F). Each query head has its own
    map, also for the key that it shares with its group.
    """

    def __init__(
        self, heads: int, dim: int, features: int, name: FeatureMapName = "softmax"
    ) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(heads, features, dim))
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        """Features per head, F."""
        return self.weight.shape[1] * (2 if self.name == "hedgehog" else 1)

    def reset_parameters(self) -> None:
        """Start from the identity, so that features follow the teacher's query-key space.

        Rows beyond the head dim are noise.
        """
        _, features, dim = self.weight.shape
        with torch.no_grad():
            nn.init.normal_(self.weight, std=dim**-0.5)
            shared = min(features, dim)
            identity = torch.eye(dim, device=self.weight.device, dtype=self.weight.dtype)
            self.weight[:, :shared] = identity[:shared]

    def forward(self, x: Tensor) -> Tensor:
        """Return φ(x), (B, H, T, F), in x's dtype; the softmax runs in fp32."""
        heads, features, dim = self.weight.shape
        batch, groups, tokens, _ = x.shape
        if self.name == "hedgehog" and tokens > 1 and _in_few_passes(x.device):
            return self._both_signs(x)
        # One product for the heads of a group: they read the same x.
        weight = self.weight.view(groups, heads // groups * features, dim).mT
        given = x if x.dtype == weight.dtype else in_dtype_of(x, weight)
        if tokens == 1:
            # The rows of a batch share the product too: no weight is copied for each of them.
            mapped = torch.bmm(given.view(batch, groups, dim).transpose(0, 1), weight)
            mapped = mapped.transpose(0, 1).reshape(batch, heads, 1, features)
        else:
            mapped = torch.matmul(given, weight)  # (B, G, T, H/G * F)
            mapped = mapped.view(batch, groups, tokens, heads // groups, features).transpose(2, 3)
            mapped = mapped.reshape(batch, heads, tokens, features)
        mapped = mapped if mapped.dtype == torch.float32 else mapped.float()
        if self.name == "softmax":
            found = mapped.softmax(dim=-1)
        else:
            both = [mapped.softmax(dim=-1), (-mapped).softmax(dim=-1)]
            found = torch.cat(both, dim=-1).mul(0.5)
        return found if found.dtype == x.dtype else found.to(x.dtype)

    def _both_signs(self, x: Tensor) -> Tensor:
        """Return the features of `hedgehog` as `forward` does, in half of its passes over memory.

        Halving writes the order of the heads.
        """
        heads, features, dim = self.weight.shape
        batch, groups, tokens, _ = x.shape
        weight = self.weight.view(groups, -1, dim).mT
        given = x if x.dtype == weight.dtype else in_dtype_of(x, weight)
        mapped = torch.matmul(given, weight)
        mapped = mapped.view(batch, groups, tokens, heads // groups, features).float()
        found: Tensor = _BothSigns.apply(mapped)
        return found.view(batch, heads, tokens, 2 * features).to(x.dtype)


class _BothSigns(torch.autograd.Function):
    """[softmax(x), softmax(-x)] / 2 of x (B, G, T, H/G, F), as (B, G, H/G, T, 2, F)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        batch, groups, tokens, heads, features = x.shape
        out = x.new_empty(batch, groups, heads, tokens, 2, features)
        plus, minus = out.transpose(2, 3).unbind(-2)
        torch.mul(x.softmax(dim=-1), 0.5, out=plus)
        torch.mul(x.neg().softmax(dim=-1), 0.5, out=minus)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient of x: of y = softmax(x) / 2, that is y (g - 2 sum(g y))."""
        (out,) = ctx.saved_tensors
        found = grad * out
        found.addcmul_(out, found.sum(dim=-1, keepdim=True), value=-2.0)
        plus, minus = found.transpose(2, 3).unbind(-2)
        return torch.sub(plus, minus, out=plus.new_empty(plus.shape))


def _in_few_passes(device: torch.device) -> bool:
    """Tell whether passes over memory are spared by writing in place.

    Not in a graph to be made. On a GPU gradients are still autograd's own, as they were measured.
    """
    recorded = torch.is_grad_enabled()
    return not torch.compiler.is_compiling() and (device.type == "cpu" or not recorded)
