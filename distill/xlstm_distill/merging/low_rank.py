"""Low-rank differences: two factors for each matrix, and their product block by block.

A tensor of more than one dimension counts as a matrix (M, N): its last dimension is N. Factors are
stored in bf16. Their products are exact in float64 and are added in the order of the ranks, element
by element: so a block has the same bits on every machine, whatever its library of matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xlstm_distill.merging.streaming import Block

FACTORS = torch.bfloat16
EXACT = 512
"""Smaller side up to which the decomposition is exact; beyond, it is a randomised one."""
MORE, PASSES = 8, 4
"""Of the randomised one: ranks beyond those that are kept, and passes over the matrix."""


def matrix_of(shape: Sequence[int]) -> tuple[int, int] | None:
    """The matrix (M, N) that a tensor counts as; None for vectors and numbers."""
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    return math.prod(shape[:-1]), shape[-1]


def saves(shape: Sequence[int], rank: int) -> bool:
    """Whether factors of this rank take fewer numbers than the tensor."""
    matrix = matrix_of(shape)
    return matrix is not None and rank * sum(matrix) < math.prod(matrix)


def decompose(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the factors (M, R) and (R, N) whose product is nearest to a matrix (M, N).

    The randomised decomposition is that of Halko et al. (arXiv 0909.4061), with fixed draws.
    """
    matrix = difference.float()
    if min(matrix.shape) <= max(EXACT, rank + MORE):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(matrix.shape[1], rank + MORE, generator=generator)
        basis, _ = torch.linalg.qr(matrix @ drawn)
        for _ in range(PASSES):
            other, _ = torch.linalg.qr(matrix.T @ basis)
            basis, _ = torch.linalg.qr(matrix @ other)
        small, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ small
    # Half of each singular value to either side, so that both are of the same size in bf16.
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(FACTORS), (root[:, None] * right[:rank]).to(FACTORS)


def rows_of(block: Block, columns: int) -> tuple[int, int]:
    """The rows of a matrix with so many columns in which a block lies: first, and one past it."""
    return block.start // columns, -(-block.stop // columns)


def product(left: Tensor, right: Tensor, block: Block) -> Tensor:
    """Multiply out a block of a matrix, in float32: (block.stop - block.start,).

    left (rows, R) are the rows of `rows_of`, right is (R, N).
    """
    columns = right.shape[1]
    total = torch.zeros(len(left), columns, dtype=torch.float64)
    a, b = left.double(), right.double()
    for rank in range(len(right)):
        # Not a matrix product, whose order of summation differs from machine to machine.
        total.addcmul_(a[:, rank, None], b[rank])
    offset = block.start - block.start // columns * columns
    return total.flatten()[offset : offset + block.stop - block.start].float()
