"""Count what a pass over fake tensors would do: operators, communication, bytes alive.

Fake tensors have shapes and no numbers. So a model of any size runs in little memory, with the real
code of model, loop and FSDP2; only numbers that the host reads must be invented.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
GATHER = ("_allgather_base_", "allgather_into_tensor_coalesced_")
SCATTER = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_")
REDUCE = ("allreduce_",)


@dataclass
class Counts:
    """What was counted: operators and collectives by name, bytes sent, the most bytes alive."""

    operators: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    gathered: float = 0.0
    scattered: float = 0.0
    reduced: float = 0.0
    peak: int = 0


class Meter(TorchDispatchMode):
    """Counts the operators that run under it, on fake tensors; enter it after the fake mode.

    Bytes sent are those of a ring, by one rank. Bytes alive are those of storages that were made
    under the meter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.alive = 0
        self.sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the counts so far; what is alive stays."""
        self.counts = Counts(peak=self.alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.counts.operators[func.overloadpacket._qualified_op_name] += 1
        if func is aten._local_scalar_dense.default:
            return _number(args[0])
        if func is aten.nonzero.default:
            return _every_index(args[0])
        if func is aten.index.Tensor:
            args = (args[0], _without_masks(args[1]))
        if func.namespace == "c10d":
            self._count_collective(func, args)
            with _known_numbers(args):
                made = func(*args, **kwargs)
        else:
            made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            self._see(tensor)
        return made

    def _count_collective(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__
        groups = [group for group in args if isinstance(group, torch.ScriptObject)]
        ranks = dist.ProcessGroup.unbox(groups[0]).size()
        share = (ranks - 1) / ranks
        sizes = [t.nbytes for t in tree_leaves(args[0]) if isinstance(t, Tensor)]
        self.counts.collectives[name] += 1
        if name in GATHER:
            self.counts.gathered += share * sum(sizes)
        elif name in SCATTER:
            # The first argument is the output, one rank's share.
            self.counts.scattered += share * ranks * sum(sizes)
        elif name in REDUCE:
            self.counts.reduced += 2 * share * sum(sizes)

    def _see(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            return
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not isinstance(local, FakeTensor) or local.fake_device.type == "meta":
            return
        storage = local.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = 0
        weakref.finalize(storage, self._resize, key, 0, gone=True)
        self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int, *, gone: bool = False) -> None:
        if key not in self.sizes:
            return
        self.alive += size - self.sizes[key]
        self.sizes[key] = size
        if gone:
            del self.sizes[key]
        self.counts.peak = max(self.counts.peak, self.alive)

    @contextmanager
    def watching(self) -> Iterator[Meter]:
        """Count, and follow storages that FSDP2 frees and fills again without an operator."""
        resize = torch.UntypedStorage.resize_

        def followed(storage: Any, size: int) -> Any:
            made = resize(storage, size)
            self._resize(storage._cdata, size)
            return made

        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


@contextmanager
def _known_numbers(args: Any) -> Iterator[None]:
    """Keep what is known of small tensors: ranks that do not exist add nothing to them."""
    tensors = [t for t in tree_leaves(args) if isinstance(t, FakeTensor) and t.constant is not None]
    known = [cast("Tensor", tensor.constant).clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, known, strict=True):
        tensor.constant = value


def _number(tensor: Tensor) -> bool | int | float:
    """Return the number that a fake tensor holds where it is known, else one that goes on."""
    known = getattr(tensor, "constant", None)
    if known is not None:
        return known.item()
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 0


def _every_index(mask: Tensor) -> Tensor:
    """Take every element of a mask as true: all tokens are supervised, the most that can be."""
    return mask.new_empty((mask.numel(), mask.ndim), dtype=torch.int64)


def _without_masks(indices: Any) -> list[Tensor | None]:
    """Replace masks among the indices of a tensor by the indices of all their elements."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            found.append(index)
        else:
            found += _every_index(index).unbind(1)
    return found
