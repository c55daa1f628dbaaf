"""How often an optimiser step waits for the device: once, and in no micro-batch."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_distill import MixerConfig, convert
from xlstm_distill.data.rows import load_batch
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.models import packed
from xlstm_distill.models.lora import add_lora
from xlstm_distill.recipe import Training
from xlstm_distill.targets.providers import OnlineTargets, StoredTargets, text_checksums
from xlstm_distill.targets.shard import Identity
from xlstm_distill.targets.store import Store, write_index
from xlstm_distill.targets.writer import write_shard
from xlstm_distill.training.objectives import DistillObjective, checkpoint_activations
from xlstm_distill.training.plan import TrainingPlan
from xlstm_distill.training.trainer import Trainer
from xlstm_kernels.torch import window

MIXER = MixerConfig(window=8, sinks=2)
WAITING = {
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "bincount", "histc", "allclose", "argwhere",
}  # fmt: skip
"""Operators of ATen whose result, or its shape, the host needs."""
METHODS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.__bool__,
    torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__,
}  # fmt: skip
"""Methods that read a tensor. On a CPU they need no operator, on a GPU they wait."""


class Waits:
    """Collects where the host reads values of tensors, while it is entered and not paused."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.paused = False
        self.modes = [_Operators(self), _Methods(self)]

    def __enter__(self) -> Waits:
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def note(self, name: str) -> None:
        if self.paused:
            return
        frames = traceback.extract_stack()
        ours = [f for f in frames if "xlstm_" in f.filename] or frames[:-3]
        self.places.append(f"{name} in {ours[-1].name}")


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index_put")) and len(args) > 1 else ()
        by_mask = isinstance(indices, list | tuple) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices
        )
        sized_by_tensor = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or sized_by_tensor:
            self.waits.note(name)
        if (operator := OPDEFS.get(f"{func.namespace}::{name}")) is not None:
            # Modes are off inside of a registered operator: its body runs under new ones.
            with _Operators(self.waits), _Methods(self.waits):
                return operator._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # The operator behind it is counted already.
        if func in METHODS - {torch.Tensor.item}:
            self.waits.note(func.__name__)
            paused, self.waits.paused = self.waits.paused, True
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.waits.paused = paused
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_each_way_to_wait():
    x = torch.arange(4.0)
    ways: list[Callable[[], object]] = [
        lambda: x.sum().item(), lambda: float(x.sum()), lambda: bool(x.any()), lambda: int(x[0]),
        x.tolist, x.cpu, x.nonzero, lambda: x[x > 1], lambda: torch.equal(x, x),
        lambda: torch.where(x > 1), lambda: x.masked_select(x > 1), x.unique,
        lambda: x.repeat_interleave(x.long()), lambda: range(x.long()[1]),
        lambda: x.clone().index_put_((x > 1,), torch.ones(2)), lambda: x.isfinite().all() and 1,
    ]  # fmt: skip
    for number, way in enumerate(ways):
        with Waits() as waits:
            way()
        assert len(waits.places) == 1, (number, waits.places)
    with Waits() as waits:
        torch.where(x > 1, x, 0).index_select(0, torch.tensor([1])).cumsum(0).new_zeros(3)
    assert not waits.places


def test_the_counter_sees_into_registered_operators():
    @torch.library.custom_op("xlstm_tests::waits", mutates_args=())
    def waits(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())

    @torch.library.custom_op("xlstm_tests::waits_backward", mutates_args=())
    def waits_backward(x: torch.Tensor) -> torch.Tensor:
        return x[x > 1].sum() * x

    waits.register_autograd(lambda ctx, grad: waits_backward(grad))
    x = torch.ones(4, requires_grad=True)
    with Waits() as seen:
        waits(x).sum().backward()
    assert len(seen.places) == 2, seen.places


class Counted(Trainer):
    """Counts the waits of each optimiser step; rows are read in another thread."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.waits = Waits()
        self.by_step: list[Counter] = []

    def _step(self, *args):
        # As on CUDA, where the optimiser's step counters stay on the device.
        for group in self.optimizer.param_groups:
            group["fused"] = True
        self.waits.places.clear()
        with self.waits:
            found = super()._step(*args)
        self.by_step.append(Counter(self.waits.places))
        return found


def stored_targets(teacher, domains, folder: Path) -> StoredTargets:
    """Capture all rows of all domains."""
    online, stores = OnlineTargets(teacher, 16), {}
    for name, rows in domains.items():
        identity = Identity(name, "rows", "words", "teacher", None, "float32", 16, None, 1)
        (folder / name).mkdir(parents=True)
        with write_shard(folder / name, identity, 97, 0, 0) as writer:
            for row in range(len(rows)):
                batch = load_batch(domains, [(name, row)])
                writer.add([len(batch.kept)], text_checksums(batch), online(batch))
        write_index(folder / name, identity)
        stores[name] = Store(folder / name, identity)
    return StoredTargets(stores)


@pytest.mark.parametrize("variant", ["align", "online", "mass", "stored", "lora", "checkpointing"])
def test_a_step_waits_for_the_device_once(
    variant, tiny_teacher, align_objective, align_settings, distill_settings, domains, stretch,
    tmp_path, monkeypatch,
):  # fmt: skip
    # On a CPU the teacher looks where documents begin, and the window what its blocks read.
    monkeypatch.setattr(packed, "reads_documents", lambda device: False)
    monkeypatch.setattr(window, "looks_at_plans", lambda device: False)
    optim = distill_settings(micro_batch=1)
    if variant == "align":
        objective, optim = align_objective(), align_settings(micro_batch=1)
    else:
        teacher = tiny_teacher()
        student = convert(teacher, MIXER)
        if variant == "lora":
            add_lora(student, 4, 8)
        if variant == "checkpointing":
            checkpoint_activations(student)
        targets = OnlineTargets(teacher, 16, mass=0.9 if variant == "mass" else None)
        source = (
            stored_targets(teacher, domains, tmp_path / "store") if variant == "stored" else targets
        )
        objective = DistillObjective(student, source, LossWeights(0.9, 0.1))
    plan = TrainingPlan("test", (stretch(3),), optim, Training())
    trainer = Counted(objective, plan, domains, tmp_path / "work", Accelerator(cpu=True))
    trainer.run()
    assert [dict(step) for step in trainer.by_step] == [{"tolist in exchange": 1}] * 3
