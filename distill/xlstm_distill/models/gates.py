"""The mixer's gates, and a meter of how far the output gates are open."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from xlstm_distill.models.attention.layout import LayerHeads
from xlstm_distill.models.feature_maps import in_dtype_of


class ScalarGate(nn.Linear):
    """Preactivations of a gate per head from the layer's input: (B, T, d) -> (B, T, H).

    A linear layer like any other: adapters (LoRA) and quantisers can wrap or replace it.
    """

    def __init__(self, hidden: int, heads: int, bias: float) -> None:
        # Before super(), which calls reset_parameters.
        self.initial_bias = bias
        super().__init__(hidden, heads)

    def reset_parameters(self) -> None:
        """Start as a constant gate."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(in_dtype_of(x, self.weight))


class OutputGate(nn.Module):
    """Output gate o = sigmoid(W_h [q, k, v] + b_h), one scalar per head (paper, Eq. 11).

    It reads the head's own q, k, v before RoPE. Shapes: q (B, H, T, D); k, v (B, G, T, D); returns
    (B, H, T, 1) in q's dtype.
    """

    def __init__(self, heads: int, dim: int, bias: float) -> None:
        super().__init__()
        self.initial_bias = bias
        self.weight = nn.Parameter(torch.empty(heads, 3, dim))
        self.bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a constant gate, the same for every token."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, _, dim = self.weight.shape
        batch, groups, tokens, _ = k.shape
        dtype = q.dtype
        q, k, v = (in_dtype_of(x, self.weight) for x in (q, k, v))
        per_group = self.weight.view(groups, heads // groups, 3, dim)
        w_q, w_k, w_v = per_group.unbind(2)  # (G, H/G, D) each
        # W_og [q, k, v] (paper, Eq. 11) as the sum of three products: nothing of width 3 D is made.
        logits = (q * w_q.reshape(heads, 1, dim)).sum(-1)  # (B, H, T)
        # k and v are products of a matrix, not repeated for each head of their group.
        shared = k @ w_k.transpose(1, 2) + v @ w_v.transpose(1, 2)  # (B, G, T, H/G)
        logits = logits + shared.transpose(2, 3).reshape(batch, heads, tokens)
        return torch.sigmoid((logits + self.bias[:, None]).float())[..., None].to(dtype)


class GateMeter:
    """Average the output gate of each layer and head over real tokens, inside a `with` block.

    A gate of 0 takes the window alone, one of 1 the mLSTM alone.
    Call `expect` before each batch; padding is left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gates = [module for module in model.modules() if isinstance(module, OutputGate)]
        kept = [getattr(module, "kept", None) for module in model.modules()]
        self.heads = [heads for heads in kept if isinstance(heads, LayerHeads)]
        self.sums: dict[int, Tensor] = {}
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.real: Tensor | None = None

    def __enter__(self) -> Self:
        self.handles = [
            gate.register_forward_hook(lambda _, __, output, n=n: self._record(n, output))
            for n, gate in enumerate(self.gates)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def expect(self, real: Tensor) -> None:
        """Announce the batch that runs next: real (B, T) bool is False at its padding."""
        # The hook sees a gate's output alone, so the mask must be there before.
        self.real = real
        # Left on the device, which need not be waited for.
        self.tokens = self.tokens + real.sum()

    def _record(self, number: int, output: Tensor) -> None:
        """Add the output (B, H, T, 1) of gate `number`."""
        assert self.real is not None
        # In fp32: thousands of bf16 values do not add up.
        opened = (output.detach().float() * self.real[:, None, :, None]).sum(dim=(0, 2, 3))
        self.sums[number] = self.sums[number] + opened if number in self.sums else opened

    def means(self) -> list[list[float | None]]:
        """Return the mean gates, layers x heads: None for heads that keep full attention.

        Empty where mixers of one branch have no gate.
        """
        found = [(self.sums[number] / self.tokens).tolist() for number in sorted(self.sums)]
        if not found:
            return []
        means, layers = iter(found), []
        for heads in self.heads:
            row: list[float | None] = [None] * heads.total
            if heads.mixed:
                for head, mean in zip(heads.mixed, next(means), strict=True):
                    row[head] = round(mean, 6)
            layers.append(row)
        return layers

    def total(self) -> Tensor:
        """Sum over tokens the mean gate of layers and heads; zero where there are no gates."""
        if not self.sums:
            return torch.zeros(())
        return torch.stack([opened.mean() for opened in self.sums.values()]).mean()
