"""The state of a training at a step: trained weights, optimiser moments, random generators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from xlstm_distill.errors import RunError
from xlstm_distill.runtime.ranks import is_main_process, process_count, process_index
from xlstm_distill.training.checkpoints import Checkpoint

WEIGHT, MOMENT, GENERATOR = "weight", "optimizer", "generator"


class TrainingState:
    """Reads and writes the state of a prepared objective and its optimiser.

    Sharded tensors stay sharded: every rank reads its own shards, and the ranks of the first
    replica write theirs. With HSDP the others hold the same.
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        trained = objective.named_parameters()
        self.parameters = {name: p for name, p in trained if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Return what this rank writes: its shards, and rank 0 also what is not sharded."""
        writes_shards = process_index() < process_count() // self.replicas()
        named: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            held = {f"{WEIGHT}/{name}": parameter.detach()}
            for key, value in self.optimizer.state.get(parameter, {}).items():
                held[f"{MOMENT}/{name}/{key}"] = value
            for key, value in held.items():
                # What is not sharded is the same on all ranks: one copy is enough.
                if writes_shards if _is_sharded(value) else is_main_process():
                    named[key] = _local(value)
        return named | _generators()

    def layout(self) -> dict[str, int]:
        """Return the dimension along which each sharded parameter is cut."""
        sharded = {name: p for name, p in self.parameters.items() if _is_sharded(p)}
        return {name: _shard_dim(p, name) for name, p in sharded.items()}

    def replicas(self) -> int:
        """Return how many groups of ranks hold a replica of the shards each; 1 without HSDP."""
        meshes = [p.device_mesh for p in self.parameters.values() if isinstance(p, DTensor)]
        return meshes[0].size(0) if meshes and meshes[0].ndim == 2 else 1

    def load(self, checkpoint: Checkpoint) -> bool:
        """Put a checkpoint back; returns whether that is exact.

        It is where as many processes wrote it as run now, and cut every parameter the same way.

        Raises:
            RunError: it does not hold what this training needs.
        """
        layout: Mapping[str, int] = checkpoint.facts["layout"]
        replicas = self.replicas()
        exact = checkpoint.processes == process_count() and layout == self.layout()
        exact = exact and checkpoint.facts.get("replicas", 1) == replicas
        pieces = _Pieces(checkpoint, exact, process_index() % (process_count() // replicas))
        numbers = self._numbers()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            dim = layout.get(name)
            weight = pieces.read(f"{WEIGHT}/{name}", parameter, dim)
            with torch.no_grad():
                _local(parameter).copy_(_local(weight))
            prefix = f"{MOMENT}/{name}/"
            found = {key: pieces.read(prefix + key, parameter, dim) for key in pieces.keys(prefix)}
            if found:  # none before the first step
                moments[numbers[id(parameter)]] = found
        whole: dict[str, Any] = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": moments})
        # Other ranks than those that wrote have other rows, and no generators to go on with.
        if exact:
            _set_generators(pieces.files[process_index()])
        return exact

    def _numbers(self) -> dict[int, int]:
        """Return the number by which the optimiser's state dict knows each parameter, by its id."""
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {id(parameter): number for number, parameter in enumerate(ordered)}


@dataclass
class _Pieces:
    """The files of a checkpoint that this rank needs, and the tensors put together from them.

    An exact restart needs this rank's own file, that of the rank which wrote its shards (`writer`),
    and rank 0's, which has all that is not sharded. Any other needs all files, to put the pieces
    together and cut them anew.
    """

    checkpoint: Checkpoint
    exact: bool
    writer: int

    def __post_init__(self) -> None:
        processes = range(self.checkpoint.processes)
        needed = {0, process_index(), self.writer} if self.exact else set(processes)
        self.files = {n: self.checkpoint.tensors(n) for n in sorted(needed)}

    def keys(self, prefix: str) -> list[str]:
        """Return the rest of every name that begins with a prefix."""
        first = self.files[min(self.files)]
        return [key.removeprefix(prefix) for key in first if key.startswith(prefix)]

    def read(self, name: str, like: Tensor, dim: int | None) -> Tensor:
        """Read a tensor in the form that its parameter, `like`, has now.

        `dim` is the dimension along which the writers cut the parameter; None if they did not.

        Raises:
            RunError: the checkpoint has no such tensor.
        """
        try:
            # A sharded parameter's step counter is one number, and not cut.
            was_cut = dim is not None and self.files[0][name].ndim > 0
            if was_cut and self.exact and _is_sharded(like):
                return _as_shard(self.files[self.writer][name], like)
            if was_cut:
                # In the order of ranks; those of other replicas wrote none.
                held = [self.files[n] for n in sorted(self.files)]
                pieces = [tensors[name] for tensors in held if name in tensors]
                whole = torch.cat(pieces, dim=dim or 0)
            else:
                whole = self.files[0][name]
        except KeyError:
            raise RunError(
                f"{self.checkpoint.path}: holds no {name!r}; it is of another training. Delete it "
                "to start over."
            ) from None
        if _is_sharded(like) and whole.ndim:
            return _distribute(whole, like)
        return whole


def _as_shard(local: Tensor, like: Any) -> Tensor:
    """Make a shard part of a sharded tensor again; a number stays as it is."""
    if not local.ndim:
        return local
    return DTensor.from_local(
        local.to(like.device),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )


def _distribute(whole: Tensor, like: Any) -> Tensor:
    """Cut a whole tensor as `like` is cut."""
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_dim(parameter: Any, name: str) -> int:
    """Return the dimension along which FSDP2 cut a parameter.

    Raises:
        RunError: it is placed in another way (tensor parallelism).
    """
    *replicated, cut = parameter.placements
    if len(replicated) > 1 or not all(p.is_replicate() for p in replicated) or not cut.is_shard():
        raise RunError(
            f"{name}: placed as {parameter.placements}; checkpoints support sharding over one mesh "
            "dimension, and replicas over another."
        )
    return cut.dim


def _generators() -> dict[str, Tensor]:
    states = {f"{GENERATOR}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{GENERATOR}/cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(tensors: Mapping[str, Tensor]) -> None:
    setters: dict[str, Callable[[Tensor], None]] = {
        "cpu": torch.set_rng_state,
        "cuda": torch.cuda.set_rng_state,
    }
    for name, put in setters.items():
        # A checkpoint from a machine without a GPU has no state for one.
        state = tensors.get(f"{GENERATOR}/{name}")
        if state is not None:
            put(state)
