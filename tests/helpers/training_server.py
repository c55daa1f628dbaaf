"""Runs small trainings for test_resume.py, in forked processes: these need no time to import.

It reads one JSON object a line:

- `kind`: `distill` or `refine`; `processes`: how many; `steps`: optimiser steps;
- `settings`: null, or an accelerate launcher's variables, for sharding;
- `directory`: folder for checkpoints and log; `out`: file for the weights;
- `signals`: what to send to all processes, in turn: `signal`, `step` (once it is in the log; null:
  once `directory`/sleeping-RANK exists for all ranks) and `delay` (seconds after that);
- `fault`: `bad_row` (the number of the row whose loss is not finite), `stop_at_end` (the rank that
  gets SIGTERM in the last validation), `sleep_at` (the step in which all ranks sleep).

It answers with the processes' exit codes, negative for a signal that ended one. What a process
would tell the user goes to `directory`/message-RANK.
"""

from __future__ import annotations

import copy
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_distill import MixerConfig, convert
from xlstm_distill.artifacts import Artifact
from xlstm_distill.data.packing import pack
from xlstm_distill.data.rows import Batch, DomainRows
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.data.shards import write_rows
from xlstm_distill.data.tokenization import Tokens
from xlstm_distill.errors import RunError
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.recipe import Align, Training
from xlstm_distill.runtime import signals
from xlstm_distill.targets.providers import OnlineTargets, TargetSource
from xlstm_distill.training.accelerator import full_state_dict, make_accelerator
from xlstm_distill.training.objectives import DistillObjective
from xlstm_distill.training.on_policy.objective import RefineObjective
from xlstm_distill.training.on_policy.prompts import Cutter
from xlstm_distill.training.on_policy.sampler import Sampler, SampleSettings
from xlstm_distill.training.plan import Stretch, TrainingPlan
from xlstm_distill.training.trainer import Trainer

SHIMS = Path(__file__).parents[1] / "shims" / "sitecustomize.py"
BATCH, CONTEXT = 8, 32


class Poisoned:
    """Targets that make the loss of one row's micro-batch not finite."""

    def __init__(self, real: TargetSource, row: tuple[str, int]) -> None:
        self.real, self.row = real, row

    def __call__(self, batch: Batch) -> SparseTargets:
        found = self.real(batch)
        if self.row not in batch.rows:
            return found
        return replace(found, log_probs=found.log_probs * float("nan"))


class Sleeping:
    """Targets that take a minute for one row, and say so by a file."""

    def __init__(self, real: TargetSource, row: tuple[str, int], sign: Path) -> None:
        self.real, self.row, self.sign = real, row, sign

    def __call__(self, batch: Batch) -> SparseTargets:
        if self.row in batch.rows:
            self.sign.touch()
            time.sleep(60)
        return self.real(batch)


class StoppedAtTheEnd(Trainer):
    """Gets a signal in the validation after the last step."""

    def validate(self) -> dict[str, float]:
        if (self.directory / f"step-{self.plan.steps:08d}").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().validate()


def make_domains(folder: Path) -> dict[str, DomainRows]:
    """Write packed rows of random documents."""
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(3, 30, 80):
        ids = rng.integers(3, 97, length).tolist()
        documents.append(Tokens.of(ids, [n > length // 2 for n in range(length)]))
    write_rows(folder, pack(documents, CONTEXT, 0), context=CONTEXT, vocabulary=97)
    return {"a": DomainRows("a", Artifact(folder, {}), validation=2)}


def make_objective() -> DistillObjective:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config)
    student = convert(teacher, MixerConfig(window=8, sinks=2))
    return DistillObjective(student, OnlineTargets(teacher, 16), LossWeights(0.9, 0.1))


def make_refinement(cut: bool) -> RefineObjective:
    """Make the objective of on-policy refinement; `cut`: whether FSDP2 will cut its weights."""
    made = make_objective()
    settings = SampleSettings(
        new_tokens=10, temperature=1.0, top_p=1.0, rows=3, seed=0, ends=(5, 6, 7)
    )
    whole = copy.deepcopy(made.student) if cut else None
    sampler = Sampler(made.student, settings, whole)
    cutter = Cutter(prompt_tokens=12, new_tokens=10, off_policy=0.3, seed=0)
    return RefineObjective(made.student, made.targets, sampler, cutter, kl_tail=True)


def train(out: Path, directory: Path, steps: int, fault: dict[str, int], kind: str) -> None:
    recipe: Any = SimpleNamespace(teacher=SimpleNamespace(dtype="float32"))
    accelerator = make_accelerator(recipe)
    cut = accelerator.distributed_type == DistributedType.FSDP
    objective = make_refinement(cut) if kind == "refine" else make_objective()
    rank = accelerator.process_index
    with tempfile.TemporaryDirectory() as folder:
        domains = make_domains(Path(folder))
        stretch = Stretch(RowSchedule(domains, {"a": 1.0}, 0, steps * BATCH), steps, 1e-2)
        if "bad_row" in fault:
            step, number = divmod(fault["bad_row"], BATCH)
            row = stretch.schedule.rows(step, BATCH)[number]
            objective.targets = Poisoned(objective.targets, row)
        if "sleep_at" in fault:
            row = stretch.schedule.rows(fault["sleep_at"], BATCH)[rank]
            sign = directory / f"sleeping-{rank}"
            objective.targets = Sleeping(objective.targets, row, sign)
        optim = Align(tokens=4096, batch=BATCH, micro_batch=2)
        length = 22 if kind == "refine" else None
        plan = TrainingPlan(
            "test", (stretch,), optim, Training(checkpoint_steps=3), row_tokens=length
        )
        loop = StoppedAtTheEnd if fault.get("stop_at_end") == rank else Trainer
        loop(objective, plan, domains, directory, accelerator).run()
    weights = full_state_dict(accelerator, objective.student)
    if accelerator.is_main_process:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, out)


def child(request: dict[str, Any], rank: int, port: int) -> int:
    """Train as one of the processes; returns the exit code, as the command line would."""
    if request["processes"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    if request["settings"]:
        os.environ |= request["settings"]
        runpy.run_path(str(SHIMS))
    # A shell may have started the tests in the background, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.listen()
    directory = Path(request["directory"])
    message = directory / f"message-{rank}"
    try:
        fault, kind = request["fault"] or {}, request["kind"]
        train(Path(request["out"]), directory, request["steps"], fault, kind)
    except signals.Stopped as stopped:
        message.write_text(str(stopped))
        return stopped.exit_code
    except KeyboardInterrupt as interrupt:
        message.write_text(str(interrupt))
        return signals.INTERRUPTED
    except RunError as error:
        message.write_text(str(error))
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def is_time(directory: Path, step: int | None, processes: int) -> bool:
    """Whether a step is in the log, or all processes sleep."""
    if step is None:
        return len(list(directory.glob("sleeping-*"))) == processes
    log = directory / "log.jsonl"
    return log.is_file() and log.read_text().count("\n") > step


def serve(request: dict[str, Any]) -> list[int]:
    """Fork the processes, send the signals when it is time, and collect exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(request["processes"]):
        pid = os.fork()
        if pid == 0:
            os._exit(child(request, rank, port))
        children.append(pid)
    for sent in request["signals"]:
        while not is_time(Path(request["directory"]), sent["step"], request["processes"]):
            time.sleep(0.002)
        time.sleep(sent["delay"])
        for pid in children:
            os.kill(pid, sent["signal"])
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


# The threads of a process that trains must be as many in every run that is compared with another.
torch.set_num_threads(1)
for line in sys.stdin:
    print(json.dumps(serve(json.loads(line))), flush=True)
