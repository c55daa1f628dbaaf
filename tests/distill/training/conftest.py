"""What the tests of a training share: two domains of random rows, and tiny objectives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from xlstm_distill import MixerConfig, convert
from xlstm_distill.artifacts import Artifact
from xlstm_distill.data.packing import pack
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.data.shards import write_rows
from xlstm_distill.data.tokenization import Tokens
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.recipe import Align, Distill, Optimization, Training
from xlstm_distill.targets.providers import OnlineTargets
from xlstm_distill.training.objectives import AlignObjective, DistillObjective
from xlstm_distill.training.plan import Stretch, TrainingPlan
from xlstm_distill.training.trainer import Trainer

MIXER = MixerConfig(window=8, sinks=2)
EXPERTS = {"a": {"phases": [{"domain": "a", "tokens": 100}]}}
Domains = dict[str, DomainRows]


@pytest.fixture
def domains(tmp_path: Path) -> Domains:
    """Two domains of 24 packed rows of 32 tokens, 4 of them for validation."""
    made = {}
    for seed, name in enumerate(("a", "b")):
        rng = np.random.default_rng(seed)
        documents = []
        for _ in range(120):
            ids = rng.integers(3, 97, rng.integers(3, 20)).tolist()
            documents.append(Tokens.of(ids, [n > 1 for n in range(len(ids))]))
        folder = tmp_path / name
        folder.mkdir()
        write_rows(folder, list(pack(documents, 32, 0))[:24], context=32, vocabulary=97)
        made[name] = DomainRows(name, Artifact(folder, {}), validation=4)
    return made


@pytest.fixture
def align_objective(tiny_teacher: Callable[..., torch.nn.Module]) -> Callable[[], AlignObjective]:
    def make() -> AlignObjective:
        teacher = tiny_teacher()
        torch.manual_seed(0)
        return AlignObjective(convert(teacher, MIXER, share_weights=True), teacher)

    return make


@pytest.fixture
def distill_objective(
    tiny_teacher: Callable[..., torch.nn.Module],
) -> Callable[[], DistillObjective]:
    def make() -> DistillObjective:
        teacher = tiny_teacher()
        torch.manual_seed(0)
        return DistillObjective(
            convert(teacher, MIXER), OnlineTargets(teacher, 16), LossWeights(0.9, 0.1)
        )

    return make


@pytest.fixture
def stretch(domains: Domains) -> Callable[..., Stretch]:
    """Make a stretch of so many steps over both domains."""

    def make(steps: int, batch: int = 4) -> Stretch:
        return Stretch(RowSchedule(domains, {"a": 1.0, "b": 1.0}, 0, steps * batch), steps, 1e-2)

    return make


@pytest.fixture
def align_settings() -> Callable[..., Align]:
    def make(**changes: object) -> Align:
        return Align(**{"tokens": 4096, "batch": 4, "warmup_steps": 1, **changes})

    return make


@pytest.fixture
def distill_settings() -> Callable[..., Distill]:
    def make(**changes: object) -> Distill:
        return Distill(**{"experts": EXPERTS, "batch": 4, "lr": 1e-3, **changes})

    return make


@pytest.fixture
def trainer(
    domains: Domains, stretch: Callable[..., Stretch], align_settings: Callable[..., Align]
) -> Callable[..., Trainer]:
    """Make the Trainer of an objective, in one process."""

    def make(
        objective: torch.nn.Module,
        directory: Path,
        *,
        steps: int = 4,
        optim: Optimization | None = None,
        settings: Training | None = None,
        label: str = "test",
        **more: object,
    ) -> Trainer:
        optim = optim or align_settings()
        part = stretch(steps, optim.batch)
        plan = TrainingPlan(label, (part,), optim, settings or Training())
        return Trainer(objective, plan, domains, directory, Accelerator(cpu=True), **more)

    return make
