"""Long context in a recipe, and of a model without a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import call_cli

from xlstm_distill.artifacts import Run
from xlstm_distill.models.student import convert
from xlstm_distill.recipe import MixerConfig, load_recipe
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages import evaluate
from xlstm_distill.stages.lineage import Lineage
from xlstm_eval.long_context.positions import token_losses
from xlstm_eval.records import EvalError
from xlstm_eval.results import read_long_context

LONG = "evaluate.long_context={lengths: [256, 1_000_000], kinds: [single], items: 2, documents: 1}"
SHORT = ["evaluate.tasks=[{name: qs_math_add}]", "evaluate.limit=2"]


def test_a_recipe_measures_its_teacher_and_keeps_the_results_beside_the_scores(
    root: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(root / "recipes" / "quickstart.yaml", [*SHORT, LONG])
    lineage, run = Lineage(recipe), Run.open(tmp_path, recipe)
    evaluate.check_tasks(lineage)
    (artifact,) = evaluate.evaluate(lineage, run, QuietConsole(), model="teacher")
    found = read_long_context(artifact.path)
    assert found is not None
    assert found.skipped_lengths == (1_000_000,)
    (row,) = found.recall_by_length
    assert (row.kind, row.length_tokens, row.n) == ("single", 256, 2)
    assert sum(loss.tokens for loss in found.loss_by_position) == 255
    protocol = artifact.manifest["results"]["protocol"]
    assert protocol["long_context"]["items"] == found.items
    answers = (artifact.path / "long_context_answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in answers] == ["single-256-0", "single-256-1"]
    # The tasks of the suite are still there, and nothing of the needles is among them.
    assert [task["task"] for task in artifact.read_json("results.json")] == ["qs_math_add"]
    assert len(list((tmp_path / "evaluation" / "long-context").iterdir())) == 2


def test_the_section_is_a_part_of_the_fingerprint_only_where_it_is_given(
    root: Path, tmp_path: Path
) -> None:
    def lineage(*changes: str) -> Lineage:
        return Lineage(load_recipe(root / "recipes" / "quickstart.yaml", changes))

    label = "evaluate/teacher"
    assert "long_context" not in lineage().settings(label)["evaluate"]
    fingerprints = {lineage().request(label).fingerprint, lineage(LONG).request(label).fingerprint}
    file = tmp_path / "text.txt"
    with_text = LONG.replace("items: 2", f"items: 2, haystack: {file}")
    for text in ("One sentence.", "Another."):
        file.write_text(text)
        request = lineage(with_text).request(label)
        assert str(file) not in json.dumps(request.parts)
        fingerprints.add(request.fingerprint)
    assert len(fingerprints) == 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{lengths: [1024]}", "evaluate.long_context.lengths: 1024 is more than the model's"),
        ("{lengths: [64]}", "evaluate.long_context.lengths: 64 has no room for single items"),
    ],
)
def test_needles_that_cannot_be_made_are_refused_before_any_training(
    root: Path, settings: str, expected: str
) -> None:
    changes = [*SHORT, f"evaluate.long_context={settings}"]
    with pytest.raises(EvalError) as caught:
        evaluate.check_tasks(Lineage(load_recipe(root / "recipes" / "quickstart.yaml", changes)))
    assert str(caught.value).startswith(expected)


def test_the_command_measures_a_student_and_refuses_what_is_none(
    saved_student: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    words = ("--out", out, "--lengths", "256", "--kinds", "single", "--items", "2")
    done = call_cli("long-context", saved_student, *words, "--documents", "1", "--chat")
    assert done.returncode == 0, done.stderr
    values = json.loads(out.read_text())
    assert values["long_context"]["recall_by_length"][0]["n"] == 2
    assert len(values["answers"]) == 2
    assert "loss at position" in done.stdout
    # What a call needs to go on is removed, and the items stay for the next model.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "long-context-items"]
    for place, expected in ((tmp_path / "none", "MODEL: "), (tmp_path, "MODEL: ")):
        refused = call_cli("long-context", place, *words)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].removeprefix("error: ").startswith(expected)
    for option, place, expected in (("--out", tmp_path, "directory"), ("--items-dir", out, "file")):
        refused = call_cli("long-context", saved_student, *words, option, place)
        assert refused.returncode == 2
        assert f"{option}: {place} is a {expected}" in refused.stderr
    refused = call_cli("long-context", saved_student, *words, "--lengths", "9..a")
    assert refused.returncode == 2
    assert "lengths: '9..a' is not A..B" in refused.stderr


def test_a_student_reads_a_long_prompt_in_chunks_as_at_once(tiny_teacher) -> None:
    student = convert(tiny_teacher(), MixerConfig(window=4, sinks=2)).eval()
    for _, parameter in student.new_parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.manual_seed(0))
    ids = torch.randint(3, 97, (2, 41), generator=torch.manual_seed(1))
    mask = torch.ones_like(ids)
    # The second row is shorter by more than a chunk.
    mask[1, :19] = 0
    ids[1, :19] = 0
    for model in (student, tiny_teacher()):
        answers = []
        for chunk in (None, 8, 16):
            answers.append(
                model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=12,
                    do_sample=False,
                    prefill_chunk_size=chunk,
                    eos_token_id=[],
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            )
        for other in answers[1:]:
            assert torch.equal(other.sequences, answers[0].sequences)
            for found, expected in zip(other.logits, answers[0].logits, strict=True):
                assert torch.allclose(found, expected, atol=2e-5)
        with torch.no_grad():
            logits = model(input_ids=ids[:1], use_cache=False).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        assert torch.allclose(token_losses(model, ids[0], 8), expected, atol=2e-5)
