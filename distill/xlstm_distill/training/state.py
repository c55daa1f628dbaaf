"""What a training is at a step, as named tensors: trained weights, the optimiser's moments, random generators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from xlstm_distill.errors import RunError
from xlstm_distill.runtime.ranks import is_main_process, process_count, process_index
from xlstm_distill.training.checkpoints import Checkpoint

WEIGHT, MOMENT, GENERATOR = "weight", "optimizer", "generator"


class TrainingState:
    """Reads and writes the state of a prepared task and optimiser; sharded tensors stay sharded, on every process."""

    def __init__(self, task: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = {name: p for name, p in task.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """This process's share: its shards, and on the main process all that is not sharded."""
        named: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            held = {f"{WEIGHT}/{name}": parameter.detach()}
            for key, value in self.optimizer.state.get(parameter, {}).items():
                held[f"{MOMENT}/{name}/{key}"] = value
            named |= {
                key: _local(value)
                for key, value in held.items()
                if _sharded(value) or is_main_process()
            }
        return named | _generators()

    def layout(self) -> dict[str, int]:
        """Dimension along which each sharded parameter is cut."""
        return {name: _shard_dim(p, name) for name, p in self.parameters.items() if _sharded(p)}

    def load(self, checkpoint: Checkpoint) -> bool:
        """Put a checkpoint back. Returns whether that is exact: as many processes wrote it, and cut it the same way.

        Raises:
            RunError: it does not hold what this training needs.
        """
        layout: Mapping[str, int] = checkpoint.facts["layout"]
        exact = checkpoint.processes == process_count() and layout == self.layout()
        files = {n: checkpoint.tensors(n) for n in _files(checkpoint, exact)}
        state: dict[int, dict[str, Tensor]] = {}
        order = {
            id(p): n
            for n, p in enumerate(p for g in self.optimizer.param_groups for p in g["params"])
        }
        for name, parameter in self.parameters.items():
            read = _Reader(checkpoint, files, layout.get(name), parameter, exact)
            with torch.no_grad():
                _copy(parameter, read(f"{WEIGHT}/{name}"))
            prefix = f"{MOMENT}/{name}/"
            keys = [key.removeprefix(prefix) for key in files[min(files)] if key.startswith(prefix)]
            state[order[id(parameter)]] = {key: read(prefix + key) for key in keys}
        whole: dict[str, Any] = self.optimizer.state_dict()
        self.optimizer.load_state_dict(
            {**whole, "state": {n: moments for n, moments in state.items() if moments}}
        )
        if exact:
            _set_generators(files[process_index()])
        return exact


class _Reader:
    """Reads the tensors of one parameter in the form the parameter has now."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: Mapping[int, Mapping[str, Tensor]],
        cut: int | None,
        like: Tensor,
        exact: bool,
    ) -> None:
        self.checkpoint, self.files, self.cut, self.like, self.exact = (
            checkpoint,
            files,
            cut,
            like,
            exact,
        )

    def __call__(self, name: str) -> Tensor:
        sharded = _sharded(self.like)
        try:
            if self.cut is None or name not in self.files[max(self.files)]:  # not cut when written
                whole = self.files[0][name]
            elif self.exact and sharded:
                return self._as_shard(self.files[process_index()][name])
            else:
                whole = torch.cat([self.files[n][name] for n in sorted(self.files)], dim=self.cut)
        except KeyError:
            raise RunError(
                f"{self.checkpoint.path}: holds no {name!r}; it is of another training. Delete it to start over."
            ) from None
        return self._as_whole(whole) if sharded and whole.ndim else whole

    def _as_shard(self, local: Tensor) -> Tensor:
        if not local.ndim:
            return local
        like: Any = self.like
        return DTensor.from_local(
            local.to(like.device),
            like.device_mesh,
            like.placements,
            shape=like.shape,
            stride=like.stride(),
        )

    def _as_whole(self, whole: Tensor) -> Tensor:
        like: Any = self.like
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _files(checkpoint: Checkpoint, exact: bool) -> list[int]:
    """Whose files to read: the main process's and our own, or everyone's if the pieces have to be cut anew."""
    return sorted({0, process_index()}) if exact else list(range(checkpoint.processes))


def _sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copy(parameter: Tensor, value: Tensor) -> None:
    _local(parameter).copy_(_local(value))


def _shard_dim(parameter: Any, name: str) -> int:
    placements = parameter.placements
    if len(placements) != 1 or not isinstance(placements[0], Shard):
        raise RunError(
            f"{name}: placed as {placements}; checkpoints know full sharding over one mesh dimension only."
        )
    return placements[0].dim


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
        if f"{GENERATOR}/{name}" in tensors:
            put(tensors[f"{GENERATOR}/{name}"])
