"""The stage evaluate: the check before any training, and the gates of held-out rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xlstm_distill.artifacts import Run
from xlstm_distill.data.packing import PackedRow
from xlstm_distill.data.rows import load_batch
from xlstm_distill.models.gates import GateMeter
from xlstm_distill.models.student import convert
from xlstm_distill.recipe import MixerConfig, load_recipe
from xlstm_distill.stages import evaluate
from xlstm_distill.stages.lineage import Lineage
from xlstm_eval.records import EvalError


class Rows:
    """Rows of random tokens of a domain; the n-th has n tokens of padding."""

    validation, context = 3, 24

    def __init__(self, seed: int) -> None:
        self.tokens = torch.randint(
            3, 97, (self.validation, self.context), generator=torch.manual_seed(seed)
        ).numpy()

    def row(self, index: int) -> PackedRow:
        ids = self.tokens[index]
        segments = torch.arange(self.context).ge(self.context // 2).long().numpy()
        return PackedRow(ids, ids > 0, segments, self.context - index)


def test_gates_are_measured_row_by_row_and_equal_those_of_all_rows_at_once(tiny_teacher) -> None:
    student = convert(tiny_teacher(), MixerConfig(window=4, sinks=2)).eval()
    for _, parameter in student.new_parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.manual_seed(0))
    domains = {"math": Rows(0), "code": Rows(1)}
    seen: list[int] = []
    with student.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True
    ):
        found = evaluate.mean_gates(student, domains, torch.device("cpu"))
    assert seen == [1] * 6
    batch = load_batch(domains, [(name, row) for name in domains for row in range(3)])
    with torch.no_grad(), GateMeter(student) as meter:
        meter.expect(batch.real)
        student.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segment_ids=batch.segment_ids,
        )
    assert torch.tensor(found).shape == (2, 4)
    assert torch.allclose(torch.tensor(found), torch.tensor(meter.means()), atol=2e-6)


def test_without_held_out_rows_there_are_no_gates(tiny_teacher) -> None:
    assert (
        evaluate.mean_gates(
            convert(tiny_teacher(), MixerConfig(window=4, sinks=2)), {}, torch.device("cpu")
        )
        == []
    )


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (
            "{name: qs_math_ad}",
            "evaluate.tasks: unknown task 'qs_math_ad'. Did you mean 'qs_math_add'?",
        ),
        (
            "{name: qs_math_add, metric: acc}",
            "qs_math_add.metric: the task has no 'acc'. Allowed: exact_match.",
        ),
        (
            "{name: qs_math_add, max_gen_tokens: 256}",
            "qs_math_add.max_gen_tokens: 256 leaves no room for a prompt",
        ),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_anything_is_made(
    root: Path, tmp_path: Path, tasks: str, expected: str
) -> None:
    recipe = load_recipe(root / "recipes" / "quickstart.yaml", [f"evaluate.tasks=[{tasks}]"])
    with pytest.raises(EvalError) as caught:
        evaluate.check(Lineage(recipe), Run.open(tmp_path, recipe))
    assert str(caught.value).startswith(expected)
    assert not list((tmp_path / "artifacts").iterdir())


def test_the_check_passes_the_quickstart_and_is_left_out_once_the_teacher_was_evaluated(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(root / "recipes" / "quickstart.yaml")
    run = Run.open(tmp_path, recipe)
    evaluate.check(Lineage(recipe), run)
    calls: list[object] = []
    monkeypatch.setattr(evaluate, "check_suite", lambda *given: calls.append(given))
    evaluate.check(Lineage(recipe), run)
    assert len(calls) == 1
    run.make(Lineage(recipe).request("evaluate/teacher"), lambda draft: None)
    evaluate.check(Lineage(recipe), run)
    assert len(calls) == 1
    other = load_recipe(root / "recipes" / "quickstart.yaml", ["evaluate.limit=3"])
    evaluate.check(Lineage(other), run)
    assert len(calls) == 2
