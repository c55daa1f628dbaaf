"""Find the largest magnitudes of a tensor that is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HIGH_BITS, LOW_BITS = 16, 15
"""Of a float32 without its sign: two passes over the tensor, one for each part."""


@dataclass(frozen=True)
class Cut:
    """The smallest magnitude that is kept, and how many are equal to it and still kept."""

    magnitude: float
    equal: int


def largest(parts: Callable[[], Iterable[Tensor]], count: int) -> Cut:
    """Find the `count`-th largest of magnitudes (float32, not negative), exactly.

    `parts` gives the tensor's blocks and is called twice. Bits of non-negative floats are ordered
    as the floats are: the first pass finds the upper bits of the number sought, the second the
    lower ones.

    Raises:
        ValueError: there are fewer numbers than `count`, or `count` is not positive.
    """
    seen = torch.zeros(2**HIGH_BITS, dtype=torch.int64)
    for part in parts():
        seen += torch.bincount(_upper(part), minlength=2**HIGH_BITS)
    high, above = _place(seen, count)
    seen = torch.zeros(2**LOW_BITS, dtype=torch.int64)
    for part in parts():
        # numpy's, as in `_upper`: a selection takes a third of torch's time.
        inside = part.numpy().view(np.int32)[_upper(part).numpy() == high] & (2**LOW_BITS - 1)
        seen += torch.bincount(torch.from_numpy(inside), minlength=2**LOW_BITS)
    low, also_above = _place(seen, count - above)
    bits = torch.tensor([high << LOW_BITS | low], dtype=torch.int32)
    return Cut(float(bits.view(torch.float32)), count - above - also_above)


def _upper(part: Tensor) -> Tensor:
    """The upper bits of each number."""
    # numpy's shift: torch's takes ten times as long on a CPU.
    return torch.from_numpy(part.numpy().view(np.int32) >> LOW_BITS)


def _place(seen: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th largest, and how many are in the bins above it."""
    at_least = seen.flip(0).cumsum(0)
    if not 0 < count <= int(at_least[-1]):
        raise ValueError(f"{count} of {int(at_least[-1])} numbers")
    place = int(torch.searchsorted(at_least, count))
    return len(seen) - 1 - place, int(at_least[place] - seen.flip(0)[place])


def kept_of(count: int, density: float) -> int:
    """How many of `count` numbers a density keeps: at least one."""
    return max(1, round(density * count))


def differences(tensor: Tensor, base: Tensor) -> Tensor:
    """Magnitudes of the differences from the seed student, in float32."""
    return (tensor.float() - base.float()).abs_()
