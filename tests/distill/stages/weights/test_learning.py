"""Learned weights: gradients of a streamed student, a training that goes on where it stopped."""

from __future__ import annotations

import shutil

import pytest
import torch
from stopping import StoppingConsole
from transformers import AutoModelForCausalLM

from xlstm_distill.data.rows import Batch
from xlstm_distill.models.loading import empty_student
from xlstm_distill.models.student import convert
from xlstm_distill.recipe import MixerConfig
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages.merge import merge
from xlstm_distill.stages.weights.learning import LOG, STATE
from xlstm_distill.stages.weights.streamed import MixedWeights, StreamedStudent

COEFFICIENTS = [[0.7, 0.3], [0.2, 0.8]]


@pytest.fixture
def batch():
    ids = torch.randint(3, 97, (2, 12), generator=torch.manual_seed(0))
    segments = (torch.arange(12) >= 7).long().expand(2, 12).contiguous()
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(7), torch.arange(5)]).expand(2, 12),
        segment_ids=segments,
        labels=ids,
        real=torch.ones(2, 12, dtype=torch.bool),
        rows=(),
    )


def run(student, batch):
    found = student.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
        use_cache=False,
        output_hidden_states=True,
    )
    return found.last_hidden_state, student.lm_head(found.last_hidden_state)


@pytest.mark.parametrize(
    ("family", "tied", "scale"),
    [
        ("llama", True, 0.8),
        ("llama", False, 1.0),
        pytest.param("gemma3_text", True, 1.0, marks=pytest.mark.slow),
        pytest.param("apertus", False, 1.0, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", False, 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_streamed_student_is_the_merged_one_and_so_are_its_gradients(
    make_teacher, tmp_path, batch, family, tied, scale
):
    """Against a student whose weights are sums of whole tensors, in torch's own graph."""
    places, weights = {}, []
    for seed, name in enumerate(("base", "a", "b")):
        teacher = make_teacher(family, seed=seed, tie_word_embeddings=tied)
        student = convert(teacher, MixerConfig(window=4, sinks=2))
        student.save_pretrained(tmp_path / name)
        places[name] = tmp_path / name
        weights.append(dict(student.named_parameters()))
    coefficients = torch.tensor(COEFFICIENTS, requires_grad=True)
    summed = {}
    for name, base in weights[0].items():
        group = coefficients[
            1 if "layers.1" in name or name in ("model.norm.weight", "lm_head.weight") else 0
        ]
        total = sum(c * w[name].detach() for c, w in zip(group, weights[1:], strict=True))
        summed[name] = (1 - scale) * base.detach() + scale * total
    student.eval().requires_grad_(False)
    draws = [torch.randn(2, 12, size, generator=torch.manual_seed(1)) for size in (64, 97)]

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = student

        def forward(self):
            return run(self.student, batch)

    named = {f"student.{name}": value for name, value in summed.items()}
    outputs = torch.func.functional_call(Whole(), named)
    loss = sum((a * b).sum() for a, b in zip(outputs, draws, strict=True))
    (expected,) = torch.autograd.grad(loss, coefficients)

    mixed = MixedWeights(
        {name: places[name] for name in "ab"}, 2, torch.device("cpu"), torch.float32,
        places["base"], scale,
    )  # fmt: skip
    mixed.coefficients = coefficients
    streamed = StreamedStudent(empty_student(places["a"], torch.float32), mixed)
    layers, hidden = streamed.hidden(batch)
    weight, _ = streamed.head_weights()
    mine = (hidden, hidden @ weight.T)
    for ours, theirs in zip(mine, outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(layers) == 2
    loss = sum((a * b).sum() for a, b in zip(mine, draws, strict=True))
    (gradient,) = torch.autograd.grad(loss, coefficients)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    # An expert alone is that expert, and nothing of the others.
    mixed.alone = 1
    with torch.no_grad():
        alone = streamed.hidden(batch)[1]
        own = AutoModelForCausalLM.from_pretrained(places["b"]).eval()
        torch.testing.assert_close(alone, run(own, batch)[0], rtol=1e-4, atol=1e-5)


LEARNED = {"weights": "learned", "layer_groups": 2, "learning": {"steps": 3, "rows": 1}}


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(found_run):
    """Three times the same merge in one run: the second is stopped and started again.

    The third finds the second's state, which is of another merge, and does not use it.
    """
    lineage, run_ = found_run({**LEARNED, "variants": {"again": LEARNED, "third": LEARNED}})
    with pytest.raises(KeyboardInterrupt):
        merge(lineage, run_, StoppingConsole("variant/again (learning)"))
    request = lineage.request("variant/again")
    state = run_.work_directory(request) / STATE
    other = run_.work_directory(lineage.request("variant/third"))
    other.mkdir()
    shutil.copy(state, other)
    console = QuietConsole()
    whole, resumed, anew = merge(lineage, run_, console)
    said = [line for line in console.lines if "begins anew" in line]
    assert [line.split(":")[0] for line in said] == ["variant/third"]
    assert anew.manifest["results"] == whole.manifest["results"]
    assert (whole.reused, resumed.reused) == (True, False)
    weights = whole.manifest["results"]["weights"]
    assert len(weights) == 2
    assert all(sum(group.values()) == pytest.approx(1, abs=1e-9) for group in weights)
    assert weights[0] != weights[1]
    assert resumed.manifest["results"] == whole.manifest["results"]
    assert whole.manifest["results"]["backend"] == "torch"  # without a GPU
    logs = [(made.path / LOG).read_text() for made in (whole, resumed)]
    assert logs[0] == logs[1]
