"""One lineage knows what every artifact is made from; what depends on what needs no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_distill.artifacts import hashing
from xlstm_distill.artifacts.manifest import FORMAT
from xlstm_distill.models import teacher as teachers
from xlstm_distill.recipe import Recipe, load_recipe
from xlstm_distill.stages import lineage as lineages
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.outline import stage_of

ONLINE = ["capture.targets=online", "capture.shard_teacher=false"]


@pytest.fixture
def recipe(root: Path) -> Recipe:
    return load_recipe(root / "recipes" / "quickstart.yaml")


def test_every_artifact_comes_after_what_it_needs(root):
    for path in sorted((root / "recipes").glob("*.yaml")):
        lineage = Lineage(load_recipe(path))
        labels = lineage.labels()
        assert len(labels) == len(set(labels))
        for place, label in enumerate(labels):
            assert set(lineage.needs(label)) <= set(labels[:place]), (path.name, label)
            json.dumps(lineage.settings(label))


def test_labels_follow_the_recipe(root, recipe):
    names = ["math", "code", "stem", "chat"]
    assert Lineage(recipe).labels() == [
        *(f"data/{name}" for name in names),
        *(f"capture/{name}" for name in names),
        "align",
        *(f"distill/{name}" for name in names),
        "merge",
        *(f"evaluate/{name}" for name in ("teacher", "merged", *names)),
        "report",
    ]
    online = load_recipe(root / "recipes" / "quickstart.yaml", ONLINE)
    assert not [label for label in Lineage(online).labels() if stage_of(label) == "capture"]


def test_inputs_are_what_an_artifact_needs(root):
    """A request names an identity for all that `needs` lists, and nothing else of the run."""
    lineage = Lineage(load_recipe(root / "recipes" / "quickstart.yaml", [*MERGES, REFINED]))
    for label in lineage.labels():
        if stage_of(label) == "data":
            continue
        inputs = set(lineage.request(label).inputs) - {"teacher", "tasks"}
        renamed = {"merge" if name == "merge/merged" else name for name in inputs}
        assert renamed == set(lineage.needs(label)), label


MERGES = [
    "merge.variants={added: {method: task_arithmetic, scale: 1.5},"
    " drawn: {method: dare, density: 0.5}, half: {weights: {math: 1, code: 0, stem: 0, chat: 0}},"
    " searched: {weights: tuned, layer_groups: 2}, matched: {weights: learned}}"
]


REFINED = (
    "refine={tokens: 40000, lr: 1.0e-5, batch: 8, prompt_tokens: 64, new_tokens: 64,"
    " experts: [math, chat]}"
)


def test_refined_experts_are_merged_and_evaluated_and_change_nothing_else(root, recipe):
    plain = Lineage(recipe)
    refined = Lineage(load_recipe(root / "recipes" / "quickstart.yaml", [REFINED]))
    merged = ["refine/math", "distill/code", "distill/stem", "refine/chat"]
    assert refined.needs("merge") == merged
    assert refined.model_label("math") == "refine/math"
    assert refined.needs("evaluate/math")[0] == "refine/math"
    for label in ("align", "distill/math", "evaluate/teacher", "evaluate/code"):
        assert plain.request(label).fingerprint == refined.request(label).fingerprint
    assert plain.request("merge").fingerprint != refined.request("merge").fingerprint
    # Memory of a step is no part of what is trained.
    other = REFINED.replace("tokens: 40000", "tokens: 40000, sample_batch: 2, micro_batch: 4")
    again = Lineage(load_recipe(root / "recipes" / "quickstart.yaml", [other]))
    assert again.request("refine/math").fingerprint == refined.request("refine/math").fingerprint
    made = {"recipe": refined.settings("refine/math")}
    hotter = REFINED.replace("lr: 1.0e-5", "lr: 1.0e-5, temperature: 0.7")
    changed = Lineage(load_recipe(root / "recipes" / "quickstart.yaml", [hotter]))
    assert changed.changes("refine/math", made) == ["refine.temperature 1.0 -> 0.7"]
    # A recipe without the section is the recipe of before there was one.
    assert "refine" not in plain.settings("report")["recipe"]


def test_a_merge_depends_on_what_its_method_takes(root):
    recipe = load_recipe(root / "recipes" / "quickstart.yaml", MERGES)
    lineage = Lineage(recipe)
    weights = dict.fromkeys(recipe.distill.experts, 0.25)
    assert lineage.settings("merge") == {"method": "linear", "weights": weights}
    added = {"method": "task_arithmetic", "weights": weights, "scale": 1.5}
    assert lineage.settings("variant/added") == added
    drawn = {"method": "dare", "weights": weights, "scale": 1.0, "density": 0.5, "seed": 0}
    assert lineage.settings("variant/drawn") == drawn
    # Differences are taken from the aligned student; a weighted sum does not need it.
    assert "align" in lineage.needs("variant/added")
    assert "align" not in lineage.needs("variant/half")
    # Weights that are found depend on what they are found with, and on what they are measured by.
    searched = lineage.settings("variant/searched")
    assert (searched["weights"], searched["layer_groups"]) == ("tuned", 2)
    assert searched["tuning"]["trials"] == 32
    assert "learning" not in searched
    assert "teacher" in lineage.request("variant/searched").inputs
    assert lineage.settings("variant/matched")["learning"]["steps"] == 50
    assert "data/math" in lineage.needs("variant/matched")
    assert "data/math" not in lineage.needs("variant/searched")
    assert lineage.evaluated_models()[-5:-2] == ["added", "drawn", "half"]
    assert lineage.needs("evaluate/half")[0] == "variant/half"


@pytest.mark.parametrize("sets", [[], [*MERGES, REFINED]])
def test_settings_are_the_parts_of_the_request(root, sets):
    lineage = Lineage(load_recipe(root / "recipes" / "quickstart.yaml", sets))
    for label in lineage.labels():
        parts, settings = lineage.request(label).parts, lineage.settings(label)
        if stage_of(label) in ("data", "capture"):  # these add formats, and hashes of files
            parts = {key: parts[key] for key in settings if key != "sources"}
            settings.pop("sources", None)
        assert parts == settings, label


def test_teacher_and_tokenizer_are_read_once(recipe, monkeypatch):
    loads = []
    load, whole = teachers.load_tokenizer, teachers.teacher_hash
    monkeypatch.setattr(teachers, "load_tokenizer", lambda t: loads.append("tokenizer") or load(t))
    monkeypatch.setattr(teachers, "teacher_hash", lambda t: loads.append("teacher") or whole(t))
    lineage = Lineage(recipe)
    for label in lineage.labels():
        lineage.request(label)
        lineage.request(label)
    assert sorted(loads) == ["teacher", "tokenizer"]


def test_the_light_part_loads_no_torch(root):
    code = (
        "import sys\n"
        "from xlstm_distill.recipe import load_recipe\n"
        "from xlstm_distill.stages.lineage import Lineage\n"
        f"lineage = Lineage(load_recipe({str(root / 'recipes' / 'quickstart.yaml')!r}))\n"
        "for label in lineage.labels():\n"
        "    lineage.needs(label), lineage.settings(label), lineage.recipe_keys(label)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_changed_is_named_by_its_recipe_key(root, recipe):
    """Each changed key makes again what depends on it, and says so."""

    def changes(*overrides: str) -> dict[str, list[str]]:
        old = Lineage(recipe)
        new = Lineage(load_recipe(root / "recipes" / "quickstart.yaml", overrides))
        found = {}
        for label in old.labels():
            before, after = old.request(label), new.request(label)
            manifest = {
                "fingerprint": before.fingerprint,
                "format": FORMAT,
                "recipe": json.loads(json.dumps(before.parts)),
                "inputs": before.inputs,
            }
            artifact = type("Made", (), {"manifest": manifest, "fingerprint": before.fingerprint})
            if said := after.changes_since(artifact):
                found[label] = said
        return found

    found = changes("align.lr=0.01")
    assert found["align"] == ["align.lr 0.02 -> 0.01"]
    assert found["distill/math"] == ["align changed"]
    assert found["merge"] == [
        f"distill/{name} changed" for name in ("math", "code", "stem", "chat")
    ]
    assert not {"data/math", "capture/math", "evaluate/teacher"} & set(found)
    assert changes("student.mixer.window=8")["align"] == ["student.mixer.window 16 -> 8"]
    weights = changes("merge.weights={math: 0.4, code: 0.2, stem: 0.2, chat: 0.2}")
    assert weights["merge"][0] == "merge.weights.math 0.25 -> 0.4"
    assert set(weights) == {"merge", "evaluate/merged", "report"}
    variant = changes("merge.variants={ties: {method: ties, density: 0.2}}")
    assert set(variant) == {"report"}
    longer = changes("distill.experts.math.phases[0].tokens=400_000")
    assert longer["distill/math"] == [
        "distill.experts.math.phases[0].tokens 200000 -> 400000",
    ]
    assert "distill/code" not in longer
    assert changes("evaluate.limit=5")["evaluate/teacher"] == ["evaluate.limit 50 -> 5"]
    # Consent is none of an evaluation's settings: `report` finds what `evaluate --run-code` made.
    assert set(changes("evaluate.confirm_run_unsafe_code=true")) == {"report"}


def test_of_a_judge_counts_who_it_is_and_what_it_asks(root, tmp_path):
    def fingerprint(**changes: str) -> str:
        judge = {"endpoint": "http://h/v1", "model": "j", "questions": str(questions)} | changes
        sets = [f"evaluate.judge={json.dumps(judge)}"]
        lineage = Lineage(load_recipe(root / "recipes" / "quickstart.yaml", sets))
        return lineage.request("evaluate/teacher").fingerprint

    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"turns": ["a", "b"]}')
    first = fingerprint()
    assert fingerprint(endpoint="http://elsewhere/v1", api_key_env="OTHER") == first
    assert fingerprint(model="k") != first
    (tmp_path / "moved").mkdir()
    moved = questions.rename(tmp_path / "moved" / "questions.jsonl")
    assert fingerprint(questions=str(moved)) == first
    moved.write_text('{"turns": ["a", "c"]}')
    assert fingerprint(questions=str(moved)) != first


def test_skipping_bad_steps_keeps_the_checkpoints_of_a_training(root):
    """The error's advice, `non_finite: skip`, must not start the training over."""
    fingerprints = {}
    for value in ("stop", "skip"):
        sets = [f"align.non_finite={value}", f"distill.non_finite={value}"]
        lineage = Lineage(load_recipe(root / "recipes" / "quickstart.yaml", sets))
        requests = lineage.request("align"), lineage.request("distill/math")
        fingerprints[value] = [request.fingerprint for request in requests]
    assert fingerprints["stop"] == fingerprints["skip"]


def test_a_moved_repository_makes_nothing_anew(root, tmp_path):
    """No path of the machine is in any fingerprint: neither the teacher's nor that of tasks."""
    recipes = {}
    for place in ("one", "other"):
        shutil.copytree(root / "recipes" / "quickstart", tmp_path / place / "recipes/quickstart")
        for name in ("quickstart.yaml", "recipe.schema.json"):
            shutil.copy(root / "recipes" / name, tmp_path / place / "recipes")
        path = tmp_path / place / "recipes" / "quickstart.yaml"
        lineage = Lineage(load_recipe(path))
        recipes[place] = {label: lineage.request(label).fingerprint for label in lineage.labels()}
    assert recipes["one"] == recipes["other"]


def test_ranks_take_rank_zero_s_hashes(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(lineages, "process_count", lambda: 2)
    include = str(recipe.evaluate.include)
    told = {"teacher": "t", "tokenizer": "w", "paths": {include: "tasks"}}
    monkeypatch.setattr(lineages, "from_rank_zero", lambda compute: told)
    monkeypatch.setattr(hashing, "_TAKEN", {})
    lineage = Lineage(recipe)
    lineage.share_hashes()
    inputs = lineage.request("evaluate/teacher").inputs
    assert inputs == {"teacher": "t", "tasks": "tasks"}
    assert lineage.request("data/math").inputs == {"tokenizer": "w"}
