"""Runs small trainings in forked processes, which start at once since all is imported; for test_resume.py.

Reads one JSON object a line: `processes`, `out` (file for the weights), `directory` (checkpoints and log), `steps`,
`settings` (variables of accelerate's launcher, for sharding; or null), and `kill`: null, or `step`, `signal` and
`delay` (send the signal that many seconds after the step is in the log). Answers with the exit codes of the processes,
negative for the signal that ended one, and writes the message of an error to `directory`/error-RANK. `fault` is null,
or has `bad_row` (the n-th row whose loss is not finite) or `stop_at_end` (the process that gets SIGTERM in the last
validation).
"""

from __future__ import annotations

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
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.recipe import Align, Training
from xlstm_distill.runtime import signals as stopping
from xlstm_distill.targets.providers import OnlineTargets
from xlstm_distill.training.accelerator import full_state_dict, make_accelerator
from xlstm_distill.training.objectives import DistillObjective
from xlstm_distill.training.trainer import Plan, Stretch, Trainer

SHIMS = Path(__file__).parents[1] / "shims" / "sitecustomize.py"


class Poisoned:
    """Targets that make the loss of one row's micro-batch not finite."""

    def __init__(self, real: OnlineTargets, row: tuple[str, int]) -> None:
        self.real, self.row = real, row

    def __call__(self, batch: Batch) -> SparseTargets:
        found = self.real(batch)
        return (
            replace(found, log_probs=found.log_probs * float("nan"))
            if self.row in batch.rows
            else found
        )


class StoppedAtTheEnd(Trainer):
    """Gets a signal in the validation after the last step."""

    def validate(self) -> dict[str, float]:
        if (self.directory / f"step-{self.plan.steps:08d}").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().validate()


def train(out: Path, directory: Path, steps: int, fault: dict[str, int]) -> None:
    recipe: Any = SimpleNamespace(teacher=SimpleNamespace(dtype="float32"))
    accelerator = make_accelerator(recipe)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    teacher = LlamaForCausalLM(config)
    student = convert(teacher, MixerConfig(window=8, sinks=2))
    task = DistillObjective(student, OnlineTargets(teacher, 16), 0.9, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        documents = [
            Tokens.of(rng.integers(3, 97, n).tolist(), [m > n // 2 for m in range(n)])
            for n in rng.integers(3, 30, 80)
        ]
        write_rows(Path(folder), pack(documents, 32, 0), context=32, vocabulary=97)
        domains = {"a": DomainRows("a", Artifact(Path(folder), {}), validation=2)}
        stretch = Stretch(RowSchedule(domains, {"a": 1.0}, 0, steps * 8), steps, 1e-2)
        if "bad_row" in fault:
            row = fault["bad_row"]
            task.targets = Poisoned(task.targets, stretch.schedule.rows(row // 8, 8)[row % 8])
        plan = Plan("test", (stretch,), 8, 2)
        training = Training(checkpoint_steps=3)
        kind = StoppedAtTheEnd if fault.get("stop_at_end") == accelerator.process_index else Trainer
        kind(
            task,
            Align(tokens=4096, batch=8),
            plan,
            domains,
            directory,
            accelerator,
            training=training,
        ).run()
    weights = full_state_dict(accelerator, student)
    if accelerator.is_main_process:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, out)


def child(request: dict[str, Any], rank: int, port: int) -> int:
    """Train as one of the processes; returns the exit code."""
    if request["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"]),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    if request["settings"]:
        os.environ |= request["settings"]
        runpy.run_path(str(SHIMS))
    stopping.listen()
    try:
        train(
            Path(request["out"]),
            Path(request["directory"]),
            request["steps"],
            request["fault"] or {},
        )
    except stopping.Stopped:
        return stopping.EXIT_CODE
    except RunError as error:
        (Path(request["directory"]) / f"error-{rank}").write_text(str(error))
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def serve(request: dict[str, Any]) -> list[int]:
    """Fork the processes, send the signal when it is time, and collect exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(request["processes"]):
        if (pid := os.fork()) == 0:
            os._exit(child(request, rank, port))
        children.append(pid)
    if kill := request["kill"]:
        log = Path(request["directory"]) / "log.jsonl"
        while not (log.is_file() and log.read_text().count("\n") > kill["step"]):
            time.sleep(0.002)
        time.sleep(kill["delay"])
        for pid in children:
            os.kill(pid, kill["signal"])
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


for line in sys.stdin:
    print(json.dumps(serve(json.loads(line))), flush=True)
