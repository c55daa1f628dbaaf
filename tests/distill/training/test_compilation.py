"""Compiled decoder layers and mixers: one graph for all, and the gradients of plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from xlstm_distill import MixerConfig, convert
from xlstm_distill.data.rows import load_batch
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.models.gates import GateMeter
from xlstm_distill.recipe import Training
from xlstm_distill.targets.providers import OnlineTargets
from xlstm_distill.training.compilation import compile_parts, eagerly
from xlstm_distill.training.objectives import DistillObjective
from xlstm_kernels.testing import error_ratio


class Graphs:
    """A backend that runs graphs as they are and keeps what they hold: no compiler is needed."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []
        self.backend: Any = aot_autograd(fw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, _: object) -> Any:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.found.append([str(node.target) for node in calls])
        return make_boxed_func(graph.forward)


def gradients(objective: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss and gradients of one pass, and the bytes that it saved."""
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        # Parameters are inputs of a compiled graph, and no memory of the pass.
        saved += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = objective(batch).loss
    loss.backward()
    named = objective.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}, saved


@pytest.mark.parametrize(
    "stage",
    [
        "align",
        pytest.param("align-checkpointed", marks=pytest.mark.slow),
        pytest.param("distill", marks=pytest.mark.slow),
        "distill-checkpointed",
    ],
)
def test_compiled_parts_have_one_graph_and_plain_gradients(
    stage: str,
    align_objective: Callable[[], Any],
    distill_objective: Callable[[], Any],
    domains: Any,
) -> None:
    objective = align_objective() if stage.startswith("align") else distill_objective()
    if stage.endswith("checkpointed"):
        objective.checkpoint_activations()
    batch = load_batch(domains, [("a", 5), ("b", 6)])
    assert batch.segment_ids.unique().numel() > 1  # packed documents
    objective.train()
    loss, expected, plain_bytes = gradients(objective, batch)
    objective.zero_grad()
    graphs = Graphs()
    compile_parts(objective, graphs.backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_loss, found, saved = gradients(objective, batch)
    # One graph forward and one backward, shared by all layers; `fullgraph` refuses any break.
    assert len(graphs.found) == 2
    # Each operator is one node, whatever the length of the rows.
    for operator in ("mlstm_torch", "window_torch"):
        nodes = [name for name in graphs.found[0] if name.startswith(f"xlstm_kernels.{operator}.")]
        assert len(nodes) == 1, operator
    assert compiled_loss == loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    # Recomputation is still on: a compiled layer may not keep what a plain one drops.
    # Under checkpointing stage I saves nothing that counts here.
    assert saved <= 1.5 * plain_bytes
    # Hooks inside of compiled parts act, and no other graph is made.
    with torch.no_grad(), eagerly(), GateMeter(objective) as meter:
        meter.expect(batch.real)
        objective(batch)
    assert len(meter.means()) == 2
    assert len(graphs.found) == 2


@pytest.mark.slow
def test_layers_that_keep_attention_compile_to_a_graph_of_their_own(
    make_teacher: Callable[..., Any], domains: Any
) -> None:
    """Each kind of layer has one, in which full attention is one node, whatever T is."""
    teacher = make_teacher(num_hidden_layers=3)
    mixer = MixerConfig(window=8, sinks=2, attention={"layers": [1], "heads": {2: [1]}})
    targets, weights = OnlineTargets(teacher, 16), LossWeights(0.9, 0.1)
    objective = DistillObjective(convert(teacher, mixer), targets, weights).train()
    batch = load_batch(domains, [("a", 5), ("b", 6)])
    loss, expected, _ = gradients(objective, batch)
    objective.zero_grad()
    graphs = Graphs()
    # As with more kinds of layers than dynamo allows of one code.
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_parts(objective, graphs.backend)
        compiled_loss, found, _ = gradients(objective, batch)
    assert len(graphs.found) == 2 * 3
    # The mixer's window, and what is kept: alone in layer 1, beside it in layer 2.
    nodes = [sum("window_torch.default" in name for name in graph) for graph in graphs.found]
    assert sorted(nodes) == [0, 0, 0, 1, 1, 2]
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        if not name.endswith("input_gate.bias"):
            assert error_ratio(found[name], gradient.double()) < 1e-5, name


@pytest.mark.parametrize(("written", "meant"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_yaml_reads_on_and_off_as_truth_values(written: object, meant: str) -> None:
    assert Training(compile=written).compile == meant


def test_the_trainer_compiles_what_it_trains(
    trainer: Callable[..., Any], distill_objective: Callable[[], Any], tmp_path: Path
) -> None:
    objective = distill_objective()
    plain = objective.student.model.layers[0].forward
    made = trainer(objective, tmp_path, settings=Training(compile="on"))
    assert made.compiled
    assert objective.student.model.layers[0].forward != plain
    assert not trainer(distill_objective(), tmp_path / "off").compiled
