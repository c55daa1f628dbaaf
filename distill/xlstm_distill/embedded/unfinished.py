"""What an unfinished training of the embedded teacher keeps, to be watched and continued."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xlstm_distill.errors import UserError


@dataclass
class Progress:
    """How far a training is: steps done, seconds taken, losses and held-out scores so far."""

    step: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)


class Checkpoint:
    """An unfinished training beside its output, so that the same command goes on with it.

    Nothing in training draws random numbers but the stream, which is read again up to the step:
    a training that was stopped ends with the same bits as one that was not.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out.parent / f".{out.name}.unfinished.pt"
        self.settings = settings

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Read weights and optimiser, if there is a checkpoint.

        Raises:
            UserError: it is of other settings.
        """
        if not self.path.exists():
            return Progress()
        state = torch.load(self.path, weights_only=True)
        differing = [
            name for name in self.settings if state["settings"][name] != self.settings[name]
        ]
        if differing:
            raise UserError(
                f"train: {self.path} is an unfinished training with other settings "
                f"({', '.join(differing)}); give those, or delete the file"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return Progress(**state["progress"])

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write the state, then rename it: never an incomplete checkpoint."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        state = {
            "settings": self.settings,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": asdict(progress),
        }
        torch.save(state, fresh)
        fresh.replace(self.path)

    def remove(self) -> None:
        """Delete the checkpoint of a finished training."""
        self.path.unlink(missing_ok=True)
