"""Spherical interpolation between two experts, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from xlstm_distill.merging.linear import wide

PARALLEL = 1e-6
"""Angle (radians) below which the coefficients are the straight line's, up to 1e-12."""


def angle(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Angle between two tensors, given as pairs of blocks; 0 where one is all zeros (radians).

    Experts of one seed are almost parallel, where the cosine says nothing in float64. The
    difference does: |a - b|² = (|a| - |b|)² + 4 |a| |b| sin²(Ω/2).
    """
    squares: tuple[list[float], list[float], list[float]] = ([], [], [])
    for first, second in parts:
        a, b = first.double(), second.double()
        for found, tensor in zip(squares, (a, b, a - b), strict=True):
            found.append(float(tensor.dot(tensor)))
    a_square, b_square, apart = (math.fsum(found) for found in squares)
    length_a, length_b = math.sqrt(a_square), math.sqrt(b_square)
    if length_a == 0 or length_b == 0:
        return 0.0
    sine_square = (apart - (length_a - length_b) ** 2) / (4 * length_a * length_b)
    return 2 * math.asin(math.sqrt(min(1.0, max(0.0, sine_square))))


def coefficients(omega: float, share: float) -> tuple[float, float]:
    """Factors of two tensors at an angle `omega`, of which the second has the weight `share`."""
    # Of opposite tensors no arc is the shortest: the straight line is as good as any.
    if omega < PARALLEL or math.pi - omega < PARALLEL:
        return 1 - share, share
    sine = math.sin(omega)
    return math.sin((1 - share) * omega) / sine, math.sin(share * omega) / sine


def slerp(first: Tensor, second: Tensor, factors: tuple[float, float]) -> Tensor:
    """Merge a block of two experts with the tensor's `coefficients`."""
    total = first.to(wide(first.dtype)) * factors[0]
    return total.add_(second, alpha=factors[1]).to(first.dtype)
