"""Measure how far the output gates are open while a student runs: 0 is window, 1 is mLSTM."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from xlstm_distill.models.mixer import OutputGate


class GateMeter:
    """Average the output gate of each layer and head over real tokens, inside a `with` block.

    Call `expect` before each batch; padding is left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gates = [module for module in model.modules() if isinstance(module, OutputGate)]
        self.sums: dict[int, Tensor] = {}
        self.tokens = 0
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
        self.real = real
        self.tokens += int(real.sum())

    def _record(self, number: int, output: Tensor) -> None:
        """Add the output (B, H, T, 1) of gate `number`."""
        assert self.real is not None
        opened = (output.detach().float() * self.real[:, None, :, None]).sum(dim=(0, 2, 3))
        self.sums[number] = self.sums[number] + opened if number in self.sums else opened

    def means(self) -> list[list[float]]:
        """Return the mean gates, layers x heads; empty where mixers of one branch have no gate."""
        layers = []
        for number in sorted(self.sums):
            means = (self.sums[number] / self.tokens).tolist()
            layers.append([round(mean, 6) for mean in means])
        return layers

    def total(self) -> Tensor:
        """Sum over tokens the mean gate of layers and heads; zero where there are no gates."""
        if not self.sums:
            return torch.zeros(())
        return torch.stack([opened.mean() for opened in self.sums.values()]).mean()
