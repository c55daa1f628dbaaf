"""Run one step of both stages at the real shapes of a model, without its memory.

    python -m xlstm_distill.benchmarks.shapes --world 8 64

The real training loop, students, FSDP2 and kernels' operators run over fake tensors, as rank 0 of a
fake process group. It counts operators, communication and memory of a rank, and compares the last
two with the planner. docs/reports/ keeps a report.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from xlstm_distill.artifacts import Artifact
from xlstm_distill.benchmarks.counting import Counts, Meter
from xlstm_distill.data.packing import pack
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.data.shards import write_rows
from xlstm_distill.data.tokenization import Tokens
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.families import FAMILIES
from xlstm_distill.models.student import convert
from xlstm_distill.planning.architecture import Architecture, read_architecture
from xlstm_distill.planning.communication import Traffic, align_traffic, distill_traffic
from xlstm_distill.planning.inputs import MemoryInputs
from xlstm_distill.planning.memory import align_memory, distill_memory
from xlstm_distill.recipe import Align, Distill, MixerConfig, Training
from xlstm_distill.runtime import ranks
from xlstm_distill.training import trainer
from xlstm_distill.training.accelerator import make_accelerator
from xlstm_distill.training.objectives import (
    AlignObjective,
    DistillObjective,
    checkpoint_activations,
)
from xlstm_distill.training.plan import Stretch, TrainingPlan
from xlstm_distill.training.trainer import Trainer

Stage = Literal["align", "distill"]
STAGES: tuple[Stage, ...] = ("align", "distill")
FORMATTER = argparse.RawDescriptionHelpFormatter
TOP_K, STEPS = 256, 2


@dataclass(frozen=True)
class Case:
    """One step to run: the stage, its shape, and how many ranks share it."""

    stage: Stage
    config: dict[str, Any]
    """The teacher's config.json."""
    world: int
    replicas: int = 1
    context: int = 4096
    batch: int = 64
    micro_batch: int = 1
    backend: Literal["torch", "triton"] = "triton"
    checkpointing: bool = True
    waits: bool = False

    @property
    def architecture(self) -> Architecture:
        """The teacher's numbers."""
        return read_architecture(self.config, "config")


def count(case: Case) -> Counts:
    """Run `STEPS` steps of a case and count what one rank does in them."""
    with fake_ranks(case), tempfile.TemporaryDirectory() as folder:
        recipe: Any = SimpleNamespace(teacher=SimpleNamespace(dtype="bfloat16"))
        accelerator = make_accelerator(recipe)
        domains = {"text": _rows(case, Path(folder))}
        meter, models = Meter(), _models(case)
        with FakeTensorMode(allow_non_fake_inputs=True), meter.watching():
            objective = _objective(case, *models)
            plan = _plan(case, domains)
            loop = Trainer(objective, plan, domains, Path(folder) / "work", accelerator)
            # Held-out rows are no part of a step.
            loop.validate = lambda: {}  # type: ignore[method-assign]
            meter.restart()
            loop.run()
        return meter.counts


@contextlib.contextmanager
def fake_ranks(case: Case) -> Iterator[None]:
    """Make this process rank 0 of so many under FSDP2, of which the others do not exist."""
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(case.world),
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(case.replicas),
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(case.world // case.replicas),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        # Triton's operators then take tensors that lie on no GPU; their fake versions run.
        "TRITON_INTERPRET": "1",
    }
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    make_mesh = DeviceMesh.__init__

    def make_real_mesh(*args: Any, **kwargs: Any) -> None:
        # A mesh reads its own ranks, so its numbers must not be fake.
        with _disable_current_modes():
            make_mesh(*args, **kwargs)

    exchange = trainer.exchange

    def exchange_as_one(accelerator: Any, tokens: int, *args: Any) -> Any:
        # It runs, and is counted; but its numbers are fake, signals of other ranks too.
        agreed = exchange(accelerator, tokens, *args)
        return replace(agreed, tokens=tokens * case.world, stop=None)

    backend = ("gloo", DistributedType.MULTI_GPU)
    with (
        mock.patch.object(DeviceMesh, "__init__", make_real_mesh),
        # Ranks that do not exist would answer as this one.
        mock.patch.object(trainer, "exchange", exchange_as_one),
        mock.patch.object(trainer, "gathered", lambda mine: [mine] * case.world),
        mock.patch.object(ranks, "waiting_group", return_value=None),
        mock.patch.dict(os.environ, variables),
        # accelerate shards only where it finds an accelerator.
        mock.patch.object(torch.accelerator, "is_available", return_value=True),
        mock.patch.object(PartialState, "_prepare_backend", return_value=backend),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        dist.init_process_group("fake", rank=0, world_size=case.world, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def _models(case: Case) -> tuple[Any, Any]:
    """Make teacher and student on the meta device, as the stage holds them."""
    family = FAMILIES[case.architecture.model_type]
    with torch.device("meta"):
        teacher = family.causal_lm(family.config(**case.config)).eval()
        return teacher, convert(teacher, MixerConfig(), share_weights=case.stage == "align")


def _objective(case: Case, teacher: Any, student: Any) -> Any:
    """Make a stage's objective as the stages do, of models without numbers."""
    align = case.stage == "align"
    # Stage I trains fp32 parameters beside the teacher's own; stage II trains all in fp32.
    new = {_storage(parameter) for _, parameter in student.new_parameters()}
    made: dict[int, nn.Parameter] = {}
    for model in (student, teacher) if align else (student,):
        _give_storage(model, made, torch.bfloat16 if align else torch.float32, fp32=new)
    for mixer in student.mixers():
        mixer.backend = case.backend
    if align:
        aligning = AlignObjective(student, teacher)
        if case.checkpointing:
            aligning.checkpoint_activations()
        return aligning
    student.requires_grad_(True)
    if case.checkpointing:
        checkpoint_activations(student)

    def targets(batch: Any) -> SparseTargets:
        tokens = batch.kept.numel()
        ids = torch.empty(tokens, TOP_K, dtype=torch.int64)
        return SparseTargets(ids, torch.empty(tokens, TOP_K), torch.empty(tokens))

    return DistillObjective(student, targets, LossWeights(0.9, 0.1))


def _give_storage(
    model: nn.Module, made: dict[int, nn.Parameter], dtype: torch.dtype, *, fp32: set[int]
) -> None:
    """Replace a model's meta tensors by fake ones that lie on a device.

    `made` and `fp32` know parameters by their storage, which tied and shared ones have in common.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = _storage(parameter)
            if key not in made:
                kind = torch.float32 if key in fp32 else dtype
                empty = torch.empty(parameter.shape, dtype=kind, device="cpu")
                made[key] = nn.Parameter(empty, parameter.requires_grad)
            module.register_parameter(name, made[key])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)


def _storage(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage()._cdata


def _plan(case: Case, domains: dict[str, DomainRows]) -> TrainingPlan:
    schedule = RowSchedule(domains, {"text": 1.0}, 0, STEPS * case.batch)
    shared: dict[str, Any] = {"batch": case.batch, "micro_batch": case.micro_batch}
    expert: Any = {"phases": [{"domain": "text", "tokens": case.batch * case.context}]}
    if case.stage == "align":
        optim: Any = Align(tokens=case.batch * case.context, **shared)
    else:
        optim = Distill(experts={"text": expert}, lr=1e-5, **shared)
    reduce: Literal["every", "last"] = "last" if case.waits else "every"
    settings = Training(checkpoint_steps=None, validate_steps=None, reduce=reduce)
    # The optimiser makes its moments at the end of the first step: the second has them.
    return TrainingPlan(case.stage, (Stretch(schedule, STEPS, 1e-5),), optim, settings)


def _rows(case: Case, folder: Path) -> DomainRows:
    """Write a step's rows, of one document each."""
    ids = np.random.default_rng(0).integers(3, case.architecture.vocabulary, case.context).tolist()
    document = Tokens.of(ids, [True] * len(ids))
    rows = list(pack([document] * case.batch, case.context, 0))[: case.batch]
    write_rows(folder, rows, context=case.context, vocabulary=case.architecture.vocabulary)
    return DomainRows("text", Artifact(folder, {}), validation=0)


def planned(case: Case) -> tuple[float, Traffic]:
    """Return the planner's bytes of tensors of one rank, and what it sends in a step."""
    share = case.batch // case.world
    inputs = MemoryInputs(
        architecture=case.architecture,
        mixer=MixerConfig(),
        teacher_dtype="bfloat16",
        gpus=case.world,
        sharding="fsdp2" if case.replicas == 1 else "hsdp",
        rows=min(case.micro_batch, share),
        tokens=case.context,
        accumulates=share > case.micro_batch,
        checkpointing=case.checkpointing,
        backend=case.backend,
        top_k=TOP_K,
        node=case.world // case.replicas,
        waits=case.waits,
    )
    passes = math.ceil(share / inputs.rows)
    if case.stage == "align":
        return align_memory(inputs).allocated, align_traffic(inputs, passes)
    return distill_memory(inputs).allocated, distill_traffic(inputs, passes)


def compared(case: Case) -> dict[str, Any]:
    """Run a case and put what was counted in a step beside the plan (bytes)."""
    counts = count(case)
    memory, traffic = planned(case)
    per_step = {name: getattr(counts, name) / STEPS for name in ("gathered", "scattered")}
    return {
        "stage": case.stage,
        "ranks": case.world,
        "replicas": case.replicas,
        "rows": case.batch,
        "waits": case.waits,
        "operators": sum(counts.operators.values()) // STEPS,
        "collectives": {name: n // STEPS for name, n in counts.collectives.items()},
        **per_step,
        "reduced": counts.reduced / STEPS,
        "planned_gathered": traffic.gathered,
        "planned_scattered": traffic.scattered,
        "planned_reduced": traffic.reduced,
        "peak": counts.peak,
        "planned_peak": memory,
    }


def main() -> None:
    """Run the cases that the command line names and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    facts = Path("recipes/architectures/llama-3.1-8b.json")
    parser.add_argument("--architecture", type=Path, default=facts, help="facts of a teacher")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--world", nargs="+", type=int, default=[8, 64], help="ranks")
    parser.add_argument("--replicas", type=int, default=1, help="of HSDP; 1 is FSDP2")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step, over all ranks")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of a pass")
    parser.add_argument("--backend", choices=("torch", "triton"), default="triton")
    parser.add_argument("--waits", action="store_true", help="training.reduce: last")
    asked = parser.parse_args()
    config = json.loads(asked.architecture.read_text())["config"]
    if asked.layers is not None:
        config["num_hidden_layers"] = asked.layers
    for world, stage in itertools.product(asked.world, asked.stages):
        case = Case(
            stage=stage,
            config=config,
            world=world,
            replicas=asked.replicas,
            context=asked.context,
            batch=asked.batch,
            micro_batch=asked.micro_batch,
            backend=asked.backend,
            # As the shipped recipes have it.
            checkpointing=stage == "distill",
            waits=asked.waits,
        )
        print(json.dumps(compared(case)), flush=True)


if __name__ == "__main__":
    main()
