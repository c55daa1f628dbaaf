"""Bounded scores in the attention kernels: c tanh(x / c), and its derivative.

CAP is c, or 0 where scores are as they are; then nothing of this is in a kernel.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Compute tanh(x) to a few units of the last place.

    Triton's own is a library's, which the interpreter has not. Source of the polynomial: Cephes,
    tanhf.
    """
    size = tl.abs(x)
    y = tl.exp(-2.0 * size)
    far = (1.0 - y) / (1.0 + y)
    # Near 0 the difference above would lose the small digits.
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    near = x + x * z * series
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def bound(scores, CAP: tl.constexpr):
    """Bound scores, if there is a bound."""
    if CAP > 0:
        scores = CAP * tanh(scores / CAP)
    return scores


@triton.jit
def through_bound(grad, bounded, CAP: tl.constexpr):
    """Bring the gradient of bounded scores back to the scores: 1 - tanh^2."""
    if CAP > 0:
        share = bounded / CAP
        grad = grad * (1.0 - share * share)
    return grad
