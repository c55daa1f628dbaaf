"""Trains a small distillation in however many processes it was started; the first writes the weights.

Started through torch.distributed.run with: file for the weights, directory for checkpoints, steps.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_distill import MixerConfig, convert, stopping
from xlstm_distill.artifacts import Artifact
from xlstm_distill.data import DomainRows, RowSchedule, _write_rows
from xlstm_distill.packing import Tokens, pack
from xlstm_distill.recipe import Align, Training
from xlstm_distill.targets import OnlineTargets
from xlstm_distill.tasks import DistillTask
from xlstm_distill.trainer import Plan, Stretch, Trainer


def main(out: Path, directory: Path, steps: int) -> None:
    stopping.listen()
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
        stretch = Stretch(RowSchedule(domains, {"a": 1.0}, 0, steps * 8), steps, 1e-2)
        plan = Plan("test", (stretch,), 8, 2)
        training = Training(checkpoint_steps=3)
        Trainer(task, Align(tokens=4096, batch=8), plan, domains, directory, accelerator, training=training).run()
    if accelerator.is_main_process:
        save_file({name: tensor.clone() for name, tensor in student.state_dict().items()}, out)


try:
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
except stopping.Stopped:
    sys.exit(stopping.EXIT_CODE)
