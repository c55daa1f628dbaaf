"""Trains a small distillation in however many processes it was started; the first writes the weights.

Started by test_training.py through torch.distributed.run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_distill import MixerConfig, convert
from xlstm_distill.artifacts import Artifact
from xlstm_distill.console import QuietConsole
from xlstm_distill.data import DomainRows, RowSchedule, _write_rows
from xlstm_distill.packing import Tokens, pack
from xlstm_distill.recipe import Align
from xlstm_distill.targets import OnlineTargets
from xlstm_distill.tasks import DistillTask
from xlstm_distill.trainer import Plan, Stretch, train


def main(out: str) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    teacher = LlamaForCausalLM(config)
    student = convert(teacher, MixerConfig(window=8, sinks=2))
    task = DistillTask(student, OnlineTargets(teacher, 16), 0.9, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        documents = [
            Tokens(rng.integers(3, 97, n).tolist(), [m > n // 2 for m in range(n)]) for n in rng.integers(3, 30, 80)
        ]
        _write_rows(iter(list(pack(documents, 32, 0))), Path(folder) / "rows.arrow", 32, lambda: None)
        domains = {"a": DomainRows("a", Artifact(Path(folder), {}), validation=2)}
        stretch = Stretch(RowSchedule(domains, {"a": 1.0}, 0, 32), 4, 1e-2)
        plan = Plan("test", (stretch,), 8, 2)
        train(task, Align(tokens=4096, batch=8), plan, domains, Path(folder), QuietConsole(), accelerator)
    if accelerator.is_main_process:
        torch.save(student.state_dict(), out)


main(sys.argv[1])
