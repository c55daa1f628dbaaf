"""Capture: run the teacher once over the rows the experts will read, and store its sparse targets."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from xlstm_distill.accelerator import make_accelerator
from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.console import Console
from xlstm_distill.data import IGNORE_INDEX, DomainRows, load_batch
from xlstm_distill.recipe import Recipe
from xlstm_distill.stages.common import capture_request, expert_domains, open_domains, prepare_domains
from xlstm_distill.targets import OnlineTargets, StoreWriter
from xlstm_distill.teacher import load_teacher

STORE = "store"


def run(recipe: Recipe, run: Run, console: Console) -> list[Artifact]:
    """Store top-k targets of every domain that an expert uses; nothing to do where targets are computed online."""
    if recipe.capture.targets == "online":
        return []
    names = [n for n in recipe.data.domains if any(n in expert_domains(recipe, e) for e in recipe.distill.experts)]
    data = prepare_domains(recipe, run, names, console)
    requests = {name: capture_request(recipe, name, data[name]) for name in names}
    missing = [name for name in names if run.find(requests[name]) is None]
    teacher = None
    if missing:
        device = make_accelerator(recipe).device
        teacher = OnlineTargets(load_teacher(recipe.teacher, device), recipe.capture.top_k)
    rows = open_domains(recipe, {name: data[name] for name in missing})

    def build(name: str, draft: Draft) -> None:
        assert teacher is not None
        writer = StoreWriter(draft.path / STORE, recipe.capture.top_k)
        _capture_domain(teacher, rows, name, recipe.capture.batch, writer, console)
        draft.results |= writer.close()

    return [run.make(requests[name], functools.partial(build, name)) for name in names]


def _capture_domain(
    teacher: OnlineTargets,
    rows: Mapping[str, DomainRows],
    name: str,
    batch_rows: int,
    writer: StoreWriter,
    console: Console,
) -> None:
    device = next(teacher.teacher.parameters()).device
    total = len(rows[name])
    with console.progress(f"capture/{name}", total * rows[name].context) as progress, torch.no_grad():
        for start in range(0, total, batch_rows):
            batch = load_batch(rows, [(name, row) for row in range(start, min(start + batch_rows, total))])
            counts = (batch.labels != IGNORE_INDEX).sum(dim=1).tolist()
            writer.add(counts, teacher(batch.to(device)))
            progress.update(batch.input_ids.numel())
