"""Plans of recipes: every stage's cost, what does not fit, and what would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xlstm_distill.artifacts.manifest import MANIFEST, REQUIRED
from xlstm_distill.data.budget import captured_rows
from xlstm_distill.planning.flops import recomputed_flops
from xlstm_distill.planning.machine import make_machine
from xlstm_distill.planning.plan import CostPlan, plan_recipe
from xlstm_distill.recipe import MixerConfig, load_recipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def planned(
    path: Path, gpus: int = 8, gpu: str = "h100-80gb", sharding: str | None = None, **options: Any
) -> CostPlan:
    settings = list(options.pop("settings", ()))
    if "checkpointing" in options:
        settings.append(
            f"distill.activation_checkpointing={json.dumps(options.pop('checkpointing'))}"
        )
    machine = make_machine(gpu, gpus, sharding, options.pop("backend", "triton"), **options)
    return plan_recipe(load_recipe(path, settings), path.parent, machine)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_is_planned_offline(path: Path) -> None:
    recipe, plan = load_recipe(path), planned(path, price=2.0)
    labels = [stage.label for stage in plan.stages]
    assert {"data", "align", "merge", "evaluate/teacher", "evaluate/student"} <= set(labels)
    assert {f"distill/{name}" for name in recipe.distill.experts} <= set(labels)
    assert ("capture" in labels) == (recipe.capture.targets == "stored")
    for stage in plan.stages:
        if stage.stage in ("capture", "align", "distill"):
            assert stage.hours > 0
            assert stage.gpu_hours == pytest.approx(8 * stage.hours)
            assert stage.cost == pytest.approx(2 * stage.gpu_hours)
    for name, expert in recipe.distill.experts.items():
        stage = plan.stages[labels.index(f"distill/{name}")]
        step = recipe.distill.batch * recipe.data.context
        assert stage.tokens == stage.steps * step
        assert expert.tokens <= stage.tokens < expert.tokens + len(expert.phases) * step


REFINE = (
    "refine={tokens: 100_000_000, batch: 512, micro_batch: 8, lr: 1.0e-6, new_tokens: 512,"
    " experts: [math], activation_checkpointing: true}"
)
LONG = ("data.context=131072", "align.warmup_steps=1", "distill.warmup_steps=1")


def test_a_refinement_is_planned_with_its_teacher_its_copy_and_the_time_of_decoding() -> None:
    path = ROOT / "recipes" / "llama3.1-8b-instruct.yaml"
    plan = planned(path, settings=[REFINE])
    (stage,) = (stage for stage in plan.stages if stage.stage == "refine")
    assert (stage.label, stage.steps) == ("refine/math", 191)
    memory = stage.memory
    assert memory.teacher == pytest.approx(2 * plan.parameters.teacher)
    assert memory.working_copies >= 2 * plan.parameters.student
    # 64 rows and 32 layers: states of 32 heads x 128 x 129 numbers in fp32, and 516 keys.
    assert memory.cache == pytest.approx(64 * 32 * (32 * 128 * 129 * 4 + 2 * 1024 * 516 * 2), 0.01)
    # Each of 512 tokens reads the weights, and reads and writes the states, at 1.675 TB/s.
    seconds = 512 * (2 * plan.parameters.student + 2 * memory.cache) / 1.675e12
    trained = (stage.flops + stage.recomputed) / (8 * 989.5e12 * 0.33)
    assert 3600 * stage.hours == pytest.approx(trained + 191 * seconds, rel=0.01)
    # Prompts, half of the text, go through the student once, besides the recomputed layers.
    own = planned(path, settings=[REFINE.replace("new_tokens: 512", "new_tokens: 3584")])
    (longer,) = (other for other in own.stages if other.stage == "refine")
    read = 2 * 7.5e9 * (1 / 2 - 1 / 8)
    fewer = stage.recomputed / stage.tokens - longer.recomputed / longer.tokens
    assert fewer == pytest.approx(read, rel=0.1)
    # Validation reads a whole row of the data: 131,072 tokens, and not 64 prompts of 512.
    wide = planned(path, settings=[REFINE, *LONG])
    (whole,) = (other for other in wide.stages if other.stage == "refine")
    assert whole.memory.activations == pytest.approx(4 * memory.activations)
    assert whole.memory.cache == 0 < memory.cache
    unknown = planned(path, settings=[REFINE], gpu=None, gpu_memory=80)
    assert all(s.hours is None for s in unknown.stages if s.stage == "refine")
    refused = planned(path, settings=[REFINE], sharding="zero3")
    assert any("impossible under DeepSpeed" in problem for problem in refused.problems)


def test_samples_that_do_not_fit_are_decoded_in_smaller_batches() -> None:
    path = ROOT / "recipes" / "llama3.1-8b-instruct.yaml"

    def of_refine(*more: str) -> tuple[list[str], CostPlan]:
        plan = planned(path, settings=[REFINE, "refine.batch=2048", *more])
        return [p for p in plan.problems if p.startswith("refine:")], plan

    (problem,), crowded = of_refine("refine.sample_batch=256")
    # 256 states of 0.14 GB, and the prompts that lead to them, beside 50 GB of weights.
    assert "it fits with --set refine.sample_batch=128 (75.4 GB)." in problem
    none, smaller = of_refine("refine.sample_batch=128")
    assert none == []
    slow, fast = (
        next(stage.hours for stage in plan.stages if stage.stage == "refine")
        for plan in (smaller, crowded)
    )
    assert slow > fast  # two passes, each of which reads the weights
    # No GPU decodes more than its share of a step.
    assert of_refine("refine.sample_batch=512")[0] == [problem]


def test_hours_follow_from_operations_rate_and_utilisation() -> None:
    path = ROOT / "recipes" / "llama3.1-8b.yaml"
    plan = planned(path, mfu=0.5, checkpointing=False)
    expert = next(stage for stage in plan.stages if stage.stage == "distill")
    assert expert.hours == pytest.approx(expert.flops / (8 * 989.5e12 * 0.5) / 3600)
    again = next(
        s for s in planned(path, mfu=0.5, checkpointing=True).stages if s.stage == "distill"
    )
    recomputed = recomputed_flops(plan.architecture, MixerConfig(), 4096) * expert.tokens
    assert again.hours == pytest.approx(expert.hours * (1 + recomputed / expert.flops))


def test_the_papers_run_fits_on_eight_h100_with_advice_that_holds() -> None:
    """The paper trained Llama-3.1-8B with FSDP on 8 H100 at context 4096."""
    path = ROOT / "recipes" / "llama3.1-8b-instruct.yaml"
    assert planned(path).problems == []  # the recipe recomputes activations
    (problem,) = [
        p for p in planned(path, checkpointing=False).problems if p.startswith("distill:")
    ]
    assert "h100-80gb has 80" in problem
    assert "it fits with --set distill.activation_checkpointing=true (" in problem
    assert "--gpus" not in problem  # settings suffice


def test_more_gpus_are_named_where_no_setting_is_enough() -> None:
    plan = planned(ROOT / "recipes" / "llama3.1-8b.yaml", gpu="a100-80gb", gpus=1)
    (problem,) = [p for p in plan.problems if p.startswith("distill:")]
    assert "--gpus 2 --sharding fsdp2" in problem


def test_advice_names_a_smaller_pass_that_fits() -> None:
    path = ROOT / "recipes" / "llama3.1-8b.yaml"
    options: dict[str, Any] = {"gpu": "h200-141gb", "sharding": "zero3", "checkpointing": True}
    settings = ["distill.micro_batch=8", "capture.targets=stored", "distill.trainable=all"]
    crowded = planned(path, gpus=8, settings=["align.micro_batch=8", *settings], **options)
    (problem,) = [p for p in crowded.problems if p.startswith("align:")]
    assert "align.micro_batch=4" in problem or "align.micro_batch=2" in problem
    smaller = planned(path, gpus=8, settings=["align.micro_batch=2", *settings], **options)
    assert not [p for p in smaller.problems if p.startswith("align:")]


@pytest.mark.parametrize(
    ("gpus", "settings", "words"),
    [
        (6, [], "align.batch: 64 rows cannot be shared by 6 GPUs; take 60 or 66"),
        (128, [], "distill.batch: 64 rows cannot be shared by 128 GPUs; take 128"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_a_problem(
    gpus: int, settings: list[str], words: str
) -> None:
    plan = planned(ROOT / "recipes" / "llama3.1-8b.yaml", gpus=gpus, settings=settings)
    assert any(words in problem for problem in plan.problems)


def test_the_last_micro_batch_of_a_share_may_be_smaller() -> None:
    """As in the training loop: memory is that of the largest."""

    def memory(*settings: str) -> float:
        plan = planned(
            ROOT / "recipes" / "llama3.1-8b.yaml",
            gpus=16,
            settings=[*settings, "distill.micro_batch=8"],
        )
        assert not [problem for problem in plan.problems if "micro_batch: 8" in problem]
        (stage,) = (stage for stage in plan.stages if stage.stage == "distill")
        assert stage.memory is not None
        return stage.memory.total

    # 12 rows a GPU are passes of 8 and 4; 16 rows are two of 8.
    assert memory("distill.batch=192") == memory("distill.batch=256")


def test_an_evaluation_is_sized_by_its_tasks_not_by_the_rows_of_the_training() -> None:
    def evaluations(*settings: str) -> list[Any]:
        plan = planned(ROOT / "recipes" / "llama3.1-8b.yaml", gpus=64, settings=settings)
        return [stage for stage in plan.stages if stage.stage == "evaluate"]

    longer = evaluations("data.context=16384")
    assert longer == evaluations()
    assert not [stage.problems for stage in longer if stage.problems]
    teacher, student = longer
    assert teacher.memory.cache > student.memory.cache
    task = "evaluate.tasks=[{name: gsm8k, max_gen_tokens: 16384}]"
    (generous, _) = evaluations(task)
    assert generous.memory.cache > 2 * teacher.memory.cache


def test_weights_that_are_found_are_counted_in_items_and_passes() -> None:
    path = ROOT / "recipes" / "llama3.1-8b-instruct.yaml"
    tasks = "{trials: 20, items: 40, tasks: [{name: x}, {name: y}]}"
    variants = f"merge.variants={{tuned: {{weights: tuned, tuning: {tasks}}}, "
    variants += "learned: {weights: learned, learning: {steps: 10, rows: 3}}}"
    plan = planned(path, settings=[variants], price=2.0)
    found = {stage.label: stage for stage in plan.stages}
    tuned, learned = found["variant/tuned"], found["variant/learned"]
    # 20 merges and the teacher, 2 tasks of 40 items; hours are unknown, as those of an evaluation.
    assert (tuned.steps, tuned.hours) == (20, None)
    assert "1,680 items" in tuned.note
    assert tuned.memory == found["evaluate/student"].memory
    # 4 experts x 3 rows of 4096 tokens, 10 times: the expert's pass, and three of the merged one.
    assert (learned.steps, learned.tokens) == (10, 10 * 4 * 3 * 4096)
    assert learned.flops / learned.tokens == pytest.approx(4 * 2 * 8.03e9, rel=0.1)
    # One GPU computes and eight are held.
    assert learned.gpu_hours == pytest.approx(8 * learned.hours)
    assert learned.cost == pytest.approx(2 * learned.gpu_hours)
    assert learned.memory.weights == learned.memory.optimizer == 0
    assert "4 x 129 GB" in learned.note
    quickstart = ROOT / "recipes" / "quickstart.yaml"
    own = planned(quickstart, settings=["merge.weights=tuned"])
    assert any(stage.note and "items" in stage.note for stage in own.stages)


def test_a_merge_holds_blocks_however_large_the_student_is() -> None:
    recipe = ROOT / "recipes" / "llama3.1-8b-instruct.yaml"
    variant = "merge.variants={half: {method: ties, density: 0.5}}"
    plan = planned(recipe, gpus=64, settings=[variant])
    merge, again = (stage for stage in plan.stages if stage.stage in ("merge", "variant"))
    assert merge.host_memory < 2e9 < merge.disk
    assert (again.label, again.disk) == ("variant/half", merge.disk)


CROWDED = {
    "one-24gb": ("llama3.2-1b-instruct", 1, "rtx4090-24gb", ["distill.trainable=all"]),
    "evaluation": ("llama3.2-1b-instruct", 1, "l4-24gb", ["evaluate.batch=128"]),
    "checkpointing": ("llama3.1-8b", 8, "h100-80gb", ["distill.activation_checkpointing=false"]),
    "capture": (
        "llama3.2-1b-instruct",
        1,
        "rtx4090-24gb",
        ["capture.targets=stored", "capture.batch=512", "align.micro_batch=null"],
    ),
    "shorter-rows": (
        "llama3.2-1b-instruct",
        1,
        "rtx4090-24gb",
        ["teacher.path=Qwen/Qwen2.5-3B", "distill.micro_batch=2"],
    ),
    "online-teacher": ("llama3.1-8b", 8, "a100-40gb", ["align.activation_checkpointing=true"]),
    "more-gpus": ("llama3.1-8b", 1, "a100-80gb", []),
    "batch": ("llama3.1-8b", 6, "h100-80gb", []),
}


@pytest.mark.parametrize("case", CROWDED)
def test_the_changes_that_a_plan_names_make_it_fit(case: str) -> None:
    name, gpus, gpu, settings = CROWDED[case]
    path = ROOT / "recipes" / f"{name}.yaml"
    crowded = planned(path, gpus=gpus, gpu=gpu, settings=settings)
    assert crowded.problems
    assert crowded.changes
    options: dict[str, Any] = {"gpus": gpus, "gpu": gpu}
    changed = list(settings)
    for key, value in crowded.changes.items():
        if key.startswith("--"):
            options[key.removeprefix("--")] = value
        else:
            changed.append(f"{key}={json.dumps(value)}")
    assert planned(path, settings=changed, **options).problems == []


def test_a_plan_without_a_way_says_so() -> None:
    path = ROOT / "recipes" / "llama3.1-8b.yaml"
    plan = planned(path, gpus=1, gpu_memory=8)  # the teacher's weights alone take 16
    assert plan.problems
    assert plan.changes is None


@pytest.mark.parametrize("gpu", ["rtx4090-24gb", "rtx5090-32gb", "l4-24gb", "a10g-24gb"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_recipe_for_one_gpu_fits_on_one(gpu: str, backend: str) -> None:
    path = ROOT / "recipes" / "llama3.2-1b-instruct.yaml"
    plan = planned(path, gpus=1, gpu=gpu, backend=backend)
    assert plan.problems == []
    assert plan.changes == {}


def test_hours_are_unknown_where_the_gpus_rate_is() -> None:
    path = ROOT / "recipes" / "llama3.2-1b-instruct.yaml"
    machine = make_machine(None, 1, gpu_memory=24, price=1.0)
    plan = plan_recipe(load_recipe(path), path.parent, machine)
    assert plan.problems == []
    assert {(stage.hours, stage.gpu_hours, stage.cost) for stage in plan.stages} == {(None,) * 3}


def test_without_new_parameters_there_is_nothing_to_align() -> None:
    settings = ["student.mixer.branches=[window]"]
    plan = planned(ROOT / "recipes" / "llama3.1-8b.yaml", gpus=8, settings=settings)
    (align,) = (stage for stage in plan.stages if stage.stage == "align")
    assert (align.flops, align.memory, align.problems) == (None, None, ())
    assert align.disk > 0


@pytest.mark.parametrize(
    ("top_k", "mass", "size"),
    [(256, 0.98, 160.0), (256, None, 512.0), (64, 0.98, 128.0), (64, None, 128.0)],
)
def test_size_of_targets_depends_on_adaptive_k(top_k: int, mass: float | None, size: float) -> None:
    settings = [f"capture.top_k={top_k}", f"capture.mass={'null' if mass is None else mass}"]
    plan = planned(ROOT / "recipes" / "quickstart.yaml", settings=settings)
    assert set(plan.target_bytes.values()) == {size}


def test_measured_size_of_targets_replaces_the_goal(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    folder = tmp_path / "artifacts" / "capture" / "math"
    folder.mkdir(parents=True)
    objects = {key: {} for key in ("recipe", "inputs", "notes", "versions")}
    manifest: dict[str, object] = {key: objects.get(key, "x") for key in REQUIRED}
    manifest |= {"format": 2, "wall_seconds": 1.0, "results": {"bytes_per_token": 72.5}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    machine = make_machine("l40s-48gb", 1, None, "torch")
    plans = [plan_recipe(recipe, ROOT / "recipes", machine, run=run) for run in (None, tmp_path)]
    assert [plan.measured for plan in plans] == [False, True]
    assert plans[1].target_bytes == {"math": 72.5, "code": 128.0, "stem": 128.0, "chat": 128.0}
    goal, measured = (next(s for s in plan.stages if s.stage == "capture") for plan in plans)
    tokens = captured_rows(recipe)["math"] * recipe.data.context
    assert goal.disk - measured.disk == pytest.approx(tokens * (128 - 72.5))
