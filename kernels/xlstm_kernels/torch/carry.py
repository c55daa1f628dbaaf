"""Carry states from chunk to chunk, x_c += decay_(c-1) x_(c-1), in a few large steps.

One step for each chunk would be many small operators, each of which a CPU runs in a single thread.
So chunks are taken in groups: first each group alone, all groups at once; then the groups' ends,
one after the other; then all other chunks take over what came before their group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

FEWEST = 32  # chunks that are taken in groups; measured: with fewer, it does not pay


def carry(x: Tensor, decay: Tensor) -> None:
    """Carry x (N, C, ...) forward in place; decay (N, C, ...) broadcasts over what follows C."""
    C = x.shape[1]
    S = group_size(C)
    G = C // S
    groups, decays = _in_groups(x[:, : G * S], S), _in_groups(decay[:, : G * S], S)
    _step(groups.unbind(2), decays.unbind(2))
    if G > 1:
        # What reaches each chunk from the end of the group before its own.
        reaching = _in_groups(decay[:, S - 1 : G * S - 1], S).cumprod(dim=2)
        _step(groups[:, :, -1].unbind(1), reaching[:, :, -1].unbind(1))
        groups[:, 1:, :-1].addcmul_(groups[:, :-1, -1:], reaching[:, :, :-1])
    if C % S:
        rest = slice(G * S - 1, C)
        _step(x[:, rest].unbind(1), decay[:, rest].unbind(1))


def carry_back(x: Tensor, decay: Tensor) -> None:
    """Carry x (N, C, ...) back in place, x_c += decay_(c+1) x_(c+1)."""
    C = x.shape[1]
    S = group_size(C)
    G, rest = divmod(C, S)
    groups, decays = _in_groups(x[:, rest:], S), _in_groups(decay[:, rest:], S)
    _step(groups.unbind(2)[::-1], decays.unbind(2)[::-1])
    if G > 1:
        reaching = _in_groups(decay[:, rest + 1 : C - S + 1], S)
        reaching = reaching.flip(2).cumprod(dim=2).flip(2)
        _step(groups[:, :, 0].unbind(1)[::-1], reaching[:, :, 0].unbind(1)[::-1])
        groups[:, :-1, 1:].addcmul_(groups[:, 1:, :1], reaching[:, :, 1:])
    if rest:
        _step(x[:, : rest + 1].unbind(1)[::-1], decay[:, : rest + 1].unbind(1)[::-1])


@functools.cache
def group_size(C: int) -> int:
    """Return how many chunks a group has, so that there are fewest steps."""
    if C < FEWEST:
        return C
    return min(range(2, C + 1), key=lambda S: S + C // S + C % S)


def _in_groups(x: Tensor, size: int) -> Tensor:
    """View x (N, G size, ...) as (N, G, size, ...)."""
    return x.unflatten(1, (-1, size))


def _step(x: Sequence[Tensor], decay: Sequence[Tensor]) -> None:
    """Add to each of x the one before it, times the decay beside that one."""
    for n, factor in zip(range(1, len(x)), decay, strict=False):
        x[n].addcmul_(x[n - 1], factor)
