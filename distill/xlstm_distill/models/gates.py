"""How far the output gates are open, measured while a student runs: 0 is all window, 1 is all mLSTM."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from xlstm_distill.models.mixer import OutputGate


class GateMeter:
    """Averages the output gate of every layer and head over the real tokens of the batches that run in its block."""

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
        """Say which tokens (B, T) of the batch that runs next are no padding."""
        self.real = real
        self.tokens += int(real.sum())

    def _record(self, number: int, output: Tensor) -> None:
        """Add a gate's output (B, H, T, 1)."""
        assert self.real is not None
        opened = (output.detach().float() * self.real[:, None, :, None]).sum(dim=(0, 2, 3))
        self.sums[number] = self.sums[number] + opened if number in self.sums else opened

    def means(self) -> list[list[float]]:
        """Mean gates, layers x heads; empty where the mixers have one branch only, and so no gate."""
        return [
            [round(x, 6) for x in (self.sums[n] / self.tokens).tolist()] for n in sorted(self.sums)
        ]

    def total(self) -> Tensor:
        """Sum over tokens of the mean gate over layers and heads; zero where there is none."""
        return (
            torch.stack([s.mean() for s in self.sums.values()]).mean()
            if self.sums
            else torch.zeros(())
        )
