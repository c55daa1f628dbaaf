"""A forward pass whose activations are counted. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "autocast"]
"""How a model computes.

- `fp32`: everything in fp32.
- `bf16`: weights are bf16 when they are used (FSDP2, DeepSpeed, teachers).
- `autocast`: autocast casts fp32 weights to bf16 for the products; the residual stream stays fp32
  (one process, DDP).
"""
Backend = Literal["torch", "triton"]
FP32, BF16, INT64 = 4, 2, 8
"""Bytes of a number."""
CHUNK: Mapping[str, int] = {"cpu": 32, "cuda": 64}
"""Chunk lengths of the mLSTM (`CHUNK_CPU` and `CHUNK_GPU` of `xlstm_kernels.torch.chunkwise`)."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of a process: `rows` of `tokens` tokens, its precision and its kernels."""

    rows: int
    tokens: int
    precision: Precision
    backend: Backend
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def compute(self) -> int:
        """Bytes of a number that comes out of a matrix product."""
        return FP32 if self.precision == "fp32" else BF16

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream."""
        return BF16 if self.precision == "bf16" else FP32

    @property
    def chunk(self) -> int:
        """Chunk length L of the mLSTM (the defaults of `xlstm_kernels.torch.chunkwise`)."""
        return min(CHUNK[self.device], self.tokens)


@dataclass(frozen=True)
class Saved:
    """Saved bytes: `per_token` for each token, `constant` once per layer and pass."""

    per_token: float = 0.0
    constant: float = 0.0

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.per_token + other.per_token, self.constant + other.constant)

    def bytes(self, forward: Pass) -> float:
        """Return the bytes for all rows and tokens of a pass."""
        return self.per_token * forward.rows * forward.tokens + self.constant
