"""Learn merge weights without labels: the merged student is to answer as each expert does.

On rows of an expert's own domains its hidden states after every layer and its logits are the
target. Trained are a few numbers: one for each expert and group of layers, on the simplex by a
softmax. The idea is that of Expert Merging (arXiv 2509.25712).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xlstm_distill.artifacts import Artifact, Draft
from xlstm_distill.artifacts.files import write_text
from xlstm_distill.data.budget import expert_rows
from xlstm_distill.data.rows import Batch, DomainRows, load_batch
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.losses.fused import linear_distill_loss, targets_from_hidden
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.merging.groups import GroupedWeights, check_groups
from xlstm_distill.merging.search import Weights
from xlstm_distill.models.loading import empty_student
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import from_rank_zero
from xlstm_distill.stages.kernels import choose_kernels
from xlstm_distill.stages.weights.material import Material
from xlstm_distill.stages.weights.streamed import MixedWeights, StreamedStudent
from xlstm_distill.stages.workbench import open_domains
from xlstm_distill.training.accelerator import make_accelerator

STATE, LOG = "learning.json", "learning.jsonl"
KL_ALONE = LossWeights(0.0, 1.0, kl_tail=True)


@dataclass(frozen=True)
class Losses:
    """A step's loss and its parts, means over the experts."""

    loss: float
    kl: float
    hidden: float


def learn(
    material: Material,
    fixed: Mapping[str, Any],
    base: Artifact | None,
    data: Mapping[str, Artifact],
    draft: Draft,
    console: Console,
) -> GroupedWeights:
    """Find weights on rank 0; the other ranks wait for them.

    The state is kept after every step: a training that was cut short goes on bit by bit.
    """
    check_groups(material.merge.layer_groups, material.layers, material.key)
    learner = _Learner(material, fixed, base, console)
    draft.results["backend"] = learner.backend

    def on_rank_zero() -> Weights:
        return learner.run(data, draft)

    return material.grouped(from_rank_zero(on_rank_zero))


class _Learner:
    """Adam on the logits of the weights."""

    def __init__(
        self,
        material: Material,
        fixed: Mapping[str, Any],
        base: Artifact | None,
        console: Console,
    ) -> None:
        recipe = material.lineage.recipe
        self.material, self.console = material, console
        self.settings = material.merge.learning
        self.device = make_accelerator(recipe).device
        places = {name: artifact.model_path for name, artifact in material.experts.items()}
        dtype = getattr(torch, recipe.teacher.dtype)
        student = empty_student(next(iter(places.values())), dtype)
        # All ranks ask for kernels together, before rank 0 goes on alone.
        self.backend = choose_kernels(student, recipe, self.device, material.work, console)
        self.mixed = MixedWeights(
            places,
            material.layers,
            self.device,
            dtype,
            base.model_path if base else None,
            fixed.get("scale", 1.0),
        )
        self.student = StreamedStudent(student.requires_grad_(False), self.mixed)
        shape = (material.merge.layer_groups, len(places))
        self.logits = torch.zeros(shape, device=self.device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=self.settings.lr)
        self.log: list[Losses] = []

    def run(self, data: Mapping[str, Artifact], draft: Draft) -> Weights:
        """Train; the draft gets the log."""
        for artifact in self.material.experts.values():
            artifact.check_content("model")
        self._resume()
        rows = _Rows(self.material, data)
        label, steps = f"{self.material.label} (learning)", self.settings.steps
        with self.console.progress(label, steps, unit="steps") as progress:
            progress.skip(len(self.log))
            while len(self.log) < steps:
                self.log.append(self._step(rows.of_step(len(self.log))))
                self._keep()
                progress.update(1, **asdict(self.log[-1]))
        lines = [json.dumps({"step": n, **asdict(losses)}) for n, losses in enumerate(self.log)]
        (draft.path / LOG).write_text("\n".join(lines) + "\n")
        draft.results["learning"] = {
            "steps": steps,
            "seed": self.material.lineage.recipe.seed,
            # Batches differ from step to step; the first is that of uniform weights.
            "first": asdict(self.log[0]),
            "last": asdict(self.log[-1]),
        }
        # In float64, so that the weights sum to 1.
        found = self.logits.detach().double().softmax(dim=1)
        return tuple(tuple(group) for group in found.tolist())

    def _step(self, batches: list[Batch]) -> Losses:
        """Take one optimiser step on a batch for each expert."""
        batches = [batch.to(self.device) for batch in batches]
        targets = [self._targets(number, batch) for number, batch in enumerate(batches)]
        self.mixed.alone = None
        self.mixed.coefficients = self.logits.softmax(dim=1)
        # One pass for all experts' rows, so that their files are read once for all.
        outputs, hidden = self.student.hidden(_joined(batches))
        weight, bias = self.student.head_weights()
        losses, kls, errors = [], [], []
        start = 0
        for batch, target in zip(batches, targets, strict=True):
            rows = slice(start, start + len(batch.input_ids))
            start = rows.stop
            kept, labels = _kept(batch, hidden[rows])
            total, _ = linear_distill_loss(
                kept, weight, bias, labels, target.logits, KL_ALONE, cap=self.student.head.cap
            )
            kl = total / max(1, len(kept))
            pairs = zip(outputs, target.outputs, strict=True)
            error = torch.stack([_relative(a[rows], b, batch.real) for a, b in pairs]).mean()
            losses.append(kl + self.settings.hidden_weight * error)
            kls.append(kl.detach())
            errors.append(error.detach())
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        means = [float(torch.stack(found).mean()) for found in (kls, errors)]
        return Losses(float(loss.detach()), *means)

    @torch.no_grad()
    def _targets(self, expert: int, batch: Batch) -> _Targets:
        """What an expert gives on its own rows."""
        self.mixed.alone = expert
        outputs, hidden = self.student.hidden(batch)
        weight, bias = self.student.head_weights()
        kept, _ = _kept(batch, hidden)
        top_k = min(self.material.lineage.recipe.capture.top_k, len(weight))
        cap = self.student.head.cap
        return _Targets(outputs, targets_from_hidden(kept, weight, bias, top_k, cap=cap))

    def _keep(self) -> None:
        state = self.optimizer.state[self.logits]
        content = {
            "made_from": self.material.made_from,
            "logits": self.logits.tolist(),
            "exp_avg": state["exp_avg"].tolist(),
            "exp_avg_sq": state["exp_avg_sq"].tolist(),
            "log": [asdict(losses) for losses in self.log],
        }
        # A float32 is the same number after a round trip through JSON.
        write_text(self.material.work / STATE, json.dumps(content) + "\n")
        self.material.keep_progress(len(self.log), self.settings.steps)

    def _resume(self) -> None:
        path = self.material.work / STATE
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        try:
            content = json.loads(path.read_text())
            if content["made_from"] != self.material.made_from:
                raise ValueError("of other settings")
            self._take(content)
        except (ValueError, KeyError, TypeError):
            aside = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}.old")
            path.rename(aside)
            self.console.line(
                f"{self.material.label}: {path} is damaged, or was made from other settings; the "
                f"training begins anew, and the file is laid aside as {aside.name}"
            )

    def _take(self, content: Mapping[str, Any]) -> None:
        """Take a state over; all of it is read before anything changes."""
        log = [Losses(**losses) for losses in content["log"]]
        found = {
            name: torch.tensor(content[name], device=self.device)
            for name in ("logits", "exp_avg", "exp_avg_sq")
        }
        if any(tensor.shape != self.logits.shape for tensor in found.values()):
            raise ValueError("of another shape")
        with torch.no_grad():
            self.logits.copy_(found.pop("logits"))
        self.optimizer.state[self.logits] = {"step": torch.tensor(float(len(log))), **found}
        self.log = log


@dataclass(frozen=True)
class _Targets:
    """An expert's hidden states by layer (B, T, d), and its logits at the kept tokens."""

    outputs: list[Tensor]
    logits: SparseTargets


class _Rows:
    """Which rows of its domains each expert is compared on: a pure function of seed and step."""

    def __init__(self, material: Material, data: Mapping[str, Artifact]) -> None:
        recipe, settings = material.lineage.recipe, material.merge.learning
        self.count = settings.rows
        self.schedules: list[tuple[dict[str, DomainRows], RowSchedule]] = []
        for name in material.experts:
            limits = expert_rows(recipe, name)
            domains = open_domains(recipe, {key: data[key] for key in limits}, limits)
            # Its last phase is what it was made for.
            weights = recipe.distill.experts[name].phases[-1].domains
            total = settings.steps * settings.rows
            schedule = RowSchedule(domains, weights, recipe.seed, total)
            self.schedules.append((domains, schedule))

    def of_step(self, step: int) -> list[Batch]:
        """A batch for each expert."""
        return [
            load_batch(domains, schedule.rows(step, self.count))
            for domains, schedule in self.schedules
        ]


def _joined(batches: list[Batch]) -> Batch:
    """All rows in one batch."""

    def together(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    return Batch(
        input_ids=together("input_ids"),
        position_ids=together("position_ids"),
        segment_ids=together("segment_ids"),
        labels=together("labels"),
        real=together("real"),
        rows=sum((batch.rows for batch in batches), ()),
    )


def _kept(batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (N, d) and labels (N,) of a batch's supervised tokens."""
    kept = hidden.flatten(0, 1).index_select(0, batch.kept)
    return kept, batch.labels.flatten().index_select(0, batch.kept)


def _relative(output: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Squared error over the target's power, on tokens that are no padding, in float32."""
    mask = real.unsqueeze(-1)
    wanted = target.float() * mask
    error = (output.float() * mask - wanted).square().sum()
    return error / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
