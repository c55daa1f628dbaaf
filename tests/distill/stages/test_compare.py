"""Students of several runs, read from their directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Recipe, load_recipe
from xlstm_distill.stages.measuring.compare import read_entries, trained_tokens

CONFIG = {
    "model_type": "xlstm_llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture
def recipe(root: Path) -> Recipe:
    return load_recipe(root / "recipes" / "quickstart.yaml")


def finished_run(folder: Path, recipe: Recipe, dtype: str = "float32", right: int = 60) -> Path:
    """Publish what a finished run leaves: its recipe, the merged student, and evaluations."""
    run = Run.open(folder, recipe)
    run.keep_recipe()

    def publish(stage: str, name: str | None, correct: int, **protocol: Any) -> Artifact:
        def build(draft: Draft) -> None:
            if stage == "merge":
                (draft.path / "model").mkdir()
                draft.write_json("model/config.json", CONFIG)
                return
            score = {"task": "add", "metric": "acc,none", "samples": 100, "domain": "math"}
            score |= {"score": correct / 100, "correct": correct}
            draft.write_json("results.json", [score])
            items = {"add": [1] * correct + [0] * (100 - correct)}
            (draft.path / "items.json").write_text(json.dumps(items))
            draft.results |= {"requests_hash": "h", "protocol": {"dtype": "float32", **protocol}}

        return run.make(Request(stage, {"seed": 0}, {}, name), build)

    publish("merge", None, 0)
    publish("evaluate", "teacher", 90)
    publish("evaluate", "merged", right, dtype=dtype)
    return folder


def test_runs_give_their_students_with_costs(tmp_path: Path, recipe: Recipe) -> None:
    runs = [finished_run(tmp_path / name, recipe, right=n) for name, n in (("a", 60), ("b", 90))]
    first, second = read_entries(runs)
    assert (first.name, first.role, first.teacher) == ("a/merged", "merged", "quickstart/teacher")
    assert first.comparison.statistics.pooled.decision == "inferior"
    assert first.comparison.statistics.pooled.margin == recipe.report.margin
    assert second.comparison.lossless
    assert first.asked == second.asked == "h"
    experts = recipe.distill.experts
    assert first.tokens == recipe.align.tokens + sum(own.tokens for own in experts.values())
    assert trained_tokens(recipe, "math") == recipe.align.tokens + experts["math"].tokens
    # A further merge has all experts, as the first one has.
    assert trained_tokens(recipe, "tuned") == first.tokens
    # Per layer: C, n and m of 4 heads in fp32, and keys and values of the window and its sinks.
    assert first.state_bytes is not None
    assert first.state_bytes > 3 * 4 * 4 * 32 * 32
    assert read_entries(runs, 0.5)[0].comparison.statistics.pooled.decision == "non-inferior"


def test_what_is_no_finished_run_is_refused_in_one_line(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no recipe\.yaml there"):
        read_entries([tmp_path / "empty"])
    Run.open(tmp_path / "new", recipe).keep_recipe()
    with pytest.raises(UserError, match="are not there yet; run 'evaluate'"):
        read_entries([tmp_path / "new"])
    run = finished_run(tmp_path / "mixed", recipe, dtype="bfloat16")
    with pytest.raises(UserError, match="merged: dtype is 'bfloat16', the teacher's 'float32'"):
        read_entries([run])
    with pytest.raises(UserError, match="two runs are named mixed"):
        read_entries([run, run])
