"""Check what is timed against its float64 reference, at few heads and tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xlstm_kernels.benchmarks.entries import Entry, Inputs, Shape, draw
from xlstm_kernels.testing import error_ratio, outputs_and_grads

# RMS ratio of outputs and gradients to the float64 reference. In low dtypes it is the rounding of
# outputs and gradients, and that of the operands of products.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
CHECKED_TOKENS, CHECKED_DOCUMENT = 300, 100  # tokens of the check; mean length of its documents
CHECKED_GROUPS = 2


def checked_shapes(entry: Entry, shape: Shape) -> list[Shape]:
    """Return the shapes at which an entry is checked.

    One row with tokens beyond window and sinks, and two value heads with the query heads that share
    them: as one document and, if the entry takes them, as packed documents.
    """
    reach = 0 if entry.operator == "mlstm" else 2 * (shape.window + shape.sinks)
    # Heads do the same: 128 of them would need 147 GiB for the gradients of the reference.
    groups = min(shape.groups, CHECKED_GROUPS)
    small = shape._replace(
        batch=1,
        tokens=min(shape.tokens, max(CHECKED_TOKENS, reach + 65)),
        heads=groups * (shape.heads // shape.groups),
        groups=groups,
    )
    if entry.operator.endswith("step"):
        return [small]
    return [small._replace(document=n) for n in (0, CHECKED_DOCUMENT)[: 1 + entry.packs]]


class Checker:
    """Compares entries with their references; each reference runs once per shape."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.inputs: dict[Shape, Inputs] = {}
        self.truths: dict[tuple[object, Shape, tuple[str, ...]], dict[str, Tensor]] = {}
        self.ratios: dict[tuple[object, Shape, bool], float] = {}

    def worst_ratio(self, entry: Entry, shape: Shape, backward: bool = True) -> float:
        """Return the largest RMS ratio of an entry to its reference over all checked shapes.

        backward: of h and the gradients; else of h as it is without gradients.
        """
        return max(self._ratio(entry, small, backward) for small in checked_shapes(entry, shape))

    def _ratio(self, entry: Entry, small: Shape, backward: bool) -> float:
        key = (entry, small, backward)
        if key not in self.ratios:
            truth = self._truth(entry, small)
            assert entry.run is not None
            inputs = self._inputs(small).copied()
            if backward:
                found = results_of(entry, entry.run, inputs, small)
            else:
                with torch.no_grad():
                    found = {"h": entry.run(inputs, small)}
            ratios = [error_ratio(found[name], truth[name]) for name in found]
            # max() would pass over a NaN that is not the first.
            self.ratios[key] = max(ratios) if all(r == r for r in ratios) else float("nan")
        return self.ratios[key]

    def _inputs(self, small: Shape) -> Inputs:
        if small not in self.inputs:
            self.inputs[small] = draw(small, self.device, self.dtype)
        return self.inputs[small]

    def _truth(self, entry: Entry, small: Shape) -> dict[str, Tensor]:
        key = (entry.reference, small, entry.reads)
        if key not in self.truths:
            assert entry.reference is not None
            exact = self._inputs(small).copied(torch.float64)
            self.truths[key] = results_of(entry, entry.reference, exact, small)
        return self.truths[key]


def results_of(
    entry: Entry, operator: Callable[[Inputs, Shape], Tensor], inputs: Inputs, shape: Shape
) -> dict[str, Tensor]:
    """Return h and the gradients of the inputs that the entry reads; of decoding only h."""
    if not entry.reads:
        return {"h": operator(inputs, shape)}
    leaves = {name: inputs.x[name] for name in entry.reads}
    return outputs_and_grads(lambda **x: operator(inputs._replace(x=inputs.x | x), shape), leaves)
