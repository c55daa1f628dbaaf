"""Weights by groups of successive layers: which set of weights a tensor is merged with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from xlstm_distill.errors import UserError
from xlstm_distill.merging.linear import check_weights

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
FIRST_PARTS = ("embed",)
"""Parts of the names of what comes before the layers; all else outside them comes after."""


@dataclass(frozen=True)
class GroupedWeights:
    """A set of experts' weights for each group of layers, the first layers' first.

    What comes before the layers goes with the first group, what comes after them with the last.
    """

    sets: tuple[Mapping[str, float], ...]
    layers: int

    def check(self) -> None:
        """Check every set; raises UserError as `check_weights`."""
        for weights in self.sets:
            check_weights(weights)

    def of(self, tensor: str) -> Mapping[str, float]:
        """The weights of a tensor, by its name."""
        return self.sets[group_of(tensor, len(self.sets), self.layers)]

    def used(self) -> list[str]:
        """Experts that have a weight above 0 in some group."""
        return [name for name in self.sets[0] if any(weights[name] > 0 for weights in self.sets)]

    def only(self, names: Sequence[str]) -> GroupedWeights:
        """The weights of these experts, in this order; the others' must be 0."""
        sets = tuple({name: weights[name] for name in names} for weights in self.sets)
        return GroupedWeights(sets, self.layers)


def group_of(tensor: str, groups: int, layers: int) -> int:
    """The group of a tensor: layer l of L is in group ⌊l · groups / L⌋."""
    if groups == 1:  # the number of layers may be unknown then
        return 0
    found = LAYER.search(tensor)
    if found is not None:
        return int(found[1]) * groups // layers
    before = any(part in tensor for part in FIRST_PARTS)
    return 0 if before else groups - 1


def count_layers(tensors: Iterable[str]) -> int:
    """Count the layers of a model from the names of its tensors."""
    numbers = {int(found[1]) for name in tensors if (found := LAYER.search(name))}
    return max(numbers) + 1 if numbers else 1


def check_groups(groups: int, layers: int, key: str) -> None:
    """Refuse more groups than layers.

    Raises:
        UserError: names the recipe's key.
    """
    if groups > layers:
        raise UserError(f"{key}.layer_groups: {groups}, and the student has {layers} layers.")
