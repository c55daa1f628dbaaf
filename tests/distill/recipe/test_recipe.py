"""Recipes: the shipped ones against the paper, and every kind of bad input against its one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from xlstm_distill.errors import UserError
from xlstm_distill.recipe import MixerConfig, Recipe, load_recipe
from xlstm_distill.recipe.load import recipe_to_yaml
from xlstm_eval.suites import named_suite

SHIPPED = (
    "llama3.1-8b",
    "llama3.1-8b-instruct",
    "llama3.2-1b-instruct",
    "olmo3-7b",
    "own-data",
    "quickstart",
    "quickstart-merges",
    "quickstart-paper",
    "qwen2.5-7b-instruct",
)
DOMAINS = ("math", "code", "stem", "chat")

SMALL = """\
name: small
teacher: {path: teacher, dtype: float32}
student: {mixer: {window: 8, sinks: 2}}
data:
  context: 64
  domains:
    math: {sources: [{generator: math, documents: 100}]}
    code: {sources: [{generator: code, documents: 100}]}
align: {tokens: 4096, batch: 4}
distill:
  batch: 4
  lr: 1.0e-3
  experts:
    math: {phases: [{domain: math, tokens: 2048}]}
    code: {phases: [{domains: {math: 1.0, code: 3.0}, tokens: 2048}]}
evaluate: {tasks: [{name: qs_math_add, domain: math}]}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small valid recipe beside a folder `teacher`."""
    (tmp_path / "teacher").mkdir()
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def problems(path: Path, *overrides: str) -> tuple[str, ...]:
    """The lines that loading a bad recipe gives, one for each problem."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert not [line for line in caught.value.problems if "\n" in line]
    return caught.value.problems


def message(path: Path, *overrides: str) -> str:
    """The line of a recipe that has one problem."""
    (line,) = problems(path, *overrides)
    return line


# --- the shipped recipes


def shipped(root: Path, name: str) -> Recipe:
    return load_recipe(root / "recipes" / f"{name}.yaml")


def test_all_recipes_are_known(root: Path) -> None:
    assert sorted(path.stem for path in (root / "recipes").glob("*.yaml")) == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads(root: Path, name: str) -> None:
    path = root / "recipes" / f"{name}.yaml"
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    recipe = load_recipe(path)
    assert recipe.name == name
    assert Recipe.model_validate(yaml.safe_load(recipe_to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("name", "teacher", "lr", "tokens"),
    [
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B", 1e-5, {"base": 5e9}),
        ("olmo3-7b", "allenai/Olmo-3-1025-7B", 1e-5, {"base": 20e9}),
        (
            "llama3.1-8b-instruct",
            "meta-llama/Llama-3.1-8B-Instruct",
            1e-5,
            dict.fromkeys(DOMAINS, 5e9),
        ),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 7e-7, dict.fromkeys(DOMAINS, 5e9)),
    ],
)
def test_published_recipe_has_the_papers_settings(
    root: Path, name: str, teacher: str, lr: float, tokens: dict[str, float]
) -> None:
    recipe = shipped(root, name)
    assert (recipe.teacher.path, recipe.distill.lr, recipe.distill.schedule) == (
        teacher,
        lr,
        "constant",
    )
    assert {name: expert.tokens for name, expert in recipe.distill.experts.items()} == tokens
    assert (recipe.distill.ce_weight, recipe.distill.kl_weight, recipe.distill.clip) == (
        0.9,
        0.1,
        1.0,
    )
    mixer = recipe.student.mixer
    assert (mixer.window, mixer.sinks, mixer.feature_map, recipe.data.context) == (
        512,
        4,
        "softmax",
        4096,
    )
    align = recipe.align
    assert (align.batch, align.lr, align.final_lr) == (64, 1e-2, 1e-5)
    assert align.tokens == 2500 * align.batch * recipe.data.context  # paper: 655M
    assert (align.schedule, align.weight_decay, recipe.capture.top_k) == ("cosine", 0.1, 256)


def test_the_base_recipe_mixes_as_olmo_2_did(root: Path) -> None:
    """Table 13 of arXiv 2501.00656, the mix of 50B tokens; `default` would be the raw pool."""
    sources = shipped(root, "llama3.1-8b").data.domains["mix"].sources
    assert {source.path for source in sources} == {"allenai/dolmino-mix-1124"}
    assert {source.name: source.weight for source in sources} == {
        "dclm": 47.2, "flan": 16.6, "pes2o": 5.85, "wiki": 7.11, "stackexchange": 2.45,
        "math": 20.8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama3.1-8b-instruct", {"math": 0.35, "code": 0.35, "stem": 0.2, "chat": 0.1}),
        ("qwen2.5-7b-instruct", {"math": 0.2, "code": 0.4, "stem": 0.15, "chat": 0.25}),
    ],
)
def test_published_instruct_recipe_mixes_in_percent(
    root: Path, name: str, weights: dict[str, float]
) -> None:
    recipe = shipped(root, name)
    assert recipe.merge.weights == weights
    for domain in recipe.data.domains.values():
        assert sum(source.weight for source in domain.sources) == pytest.approx(100)


@pytest.mark.parametrize(
    ("name", "suite", "hellaswag"),
    [
        # As the paper's figures of the teachers suggest: 81.9, 56.7, 59.3.
        ("llama3.1-8b", "base", "acc_norm"),
        ("olmo3-7b", "base", "acc"),
        ("llama3.1-8b-instruct", "instruct", "acc"),
        ("qwen2.5-7b-instruct", "instruct", "acc"),
    ],
)
def test_published_recipe_has_the_papers_suite(
    root: Path, name: str, suite: Any, hellaswag: str
) -> None:
    settings, expected = shipped(root, name).evaluate, named_suite(suite)
    tasks = [task.model_dump(exclude={"generation"}) for task in settings.tasks]
    papers = [task.model_dump(exclude={"generation"}) for task in expected.tasks]
    for task in papers:
        if task["name"] == "hellaswag":
            task["metric"] = hellaswag
    assert tasks == papers
    assert settings.apply_chat_template == expected.apply_chat_template


def test_a_suite_becomes_tasks_and_single_ones_may_differ(small: Path) -> None:
    plain = [task.model_dump(exclude={"generation"}) for task in named_suite("base").tasks]
    asked = ["evaluate.tasks=null", "evaluate.suite=base"]
    recipe = load_recipe(small, asked)
    found = [task.model_dump(exclude={"generation"}) for task in recipe.evaluate.tasks]
    assert found == plain
    # What a run saves are the tasks: it stays what it is when the package's suite changes.
    saved = yaml.safe_load(recipe_to_yaml(recipe))
    assert "suite" not in saved["evaluate"]
    assert Recipe.model_validate(saved) == recipe
    own = "evaluate.tasks=[{name: gsm8k, shots: 2}, {name: qs_math_add}]"
    changed = load_recipe(small, [*asked, own, "evaluate.leave_out=[mmlu, piqa]"])
    tasks = {task.name: task for task in changed.evaluate.tasks}
    assert list(tasks)[-1] == "qs_math_add"
    assert not {"mmlu", "piqa"} & set(tasks)
    assert (tasks["gsm8k"].shots, tasks["gsm8k"].max_gen_tokens) == (2, 1024)
    assert len(tasks) == len(plain) - 1
    instruct = load_recipe(small, ["evaluate.suite=instruct"]).evaluate
    assert instruct.apply_chat_template
    assert not load_recipe(
        small, ["evaluate.suite=instruct", "evaluate.apply_chat_template=false"]
    ).evaluate.apply_chat_template


def test_two_suites_and_single_settings_of_them(small: Path) -> None:
    changes = ["evaluate.suite=[instruct, long-context]", "evaluate.leave_out=['longbench_*']"]
    changes += ["evaluate.long_context={items: 7}", "evaluate.tasks=[{name: ifeval, chance: 0.1}]"]
    found = load_recipe(small, changes).evaluate
    names = [task.name for task in found.tasks]
    assert names.index("mmlu") < names.index("xlstm_niah_single_1k")
    assert not any(name.startswith("longbench_") for name in names)
    assert found.tasks[names.index("ifeval")].chance == 0.1
    assert found.long_context is not None
    assert (found.long_context.items, found.long_context.lengths[-1]) == (7, 65536)
    # What a run saves is read again as it is, without the suites.
    again = type(found).model_validate(found.model_dump(mode="json"))
    assert again == found.model_copy(update={"suite": None, "leave_out": ()})
    assert (
        load_recipe(small, [*changes, "evaluate.long_context=null"]).evaluate.long_context is None
    )


def test_the_suite_of_a_folder_is_every_task_in_it(root: Path) -> None:
    path = root / "recipes" / "quickstart.yaml"
    listed = load_recipe(path).evaluate
    named = load_recipe(path, ["evaluate.tasks=null", "evaluate.suite=quickstart"]).evaluate
    assert {task.name: task.domain for task in named.tasks} == {
        task.name: task.domain for task in listed.tasks
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            ["evaluate.suite=quickstart"],
            "evaluate.suite: quickstart is a folder of task files. Name the folder in `include`.",
        ),
        (["evaluate.suite=bse"], "evaluate.suite: 'bse' is unknown. Did you mean 'base'?"),
        (["evaluate.suite=[base, bse]"], "evaluate.suite: 'bse' is unknown. Did you mean 'base'?"),
        (
            ["evaluate.suite=[base, base]"],
            "evaluate.suite: ['base', 'base'] names a suite twice; keep one.",
        ),
        (["evaluate.suite=3"], "evaluate.suite: 3 is a whole number; give a list."),
        (
            ["evaluate.suite=[base, instruct]"],
            "evaluate.suite: base and instruct do not agree about apply_chat_template. Name one of "
            "them.",
        ),
        (
            ["evaluate.suite=base", "evaluate.leave_out=[mmlo]"],
            "evaluate.leave_out[0]: 'mmlo' is not in the suite. Did you mean 'mmlu'?",
        ),
        (
            ["evaluate.judge={endpoint: 'http://me:pw@host/v1', model: j, questions: a/b}"],
            "evaluate.judge.endpoint: has a user, a password or a query; give the address alone, "
            "and the key in the environment variable OPENAI_API_KEY.",
        ),
        (
            ["evaluate.judge={endpoint: host, model: j, questions: a/b}"],
            "evaluate.judge.endpoint: 'host'; give http://HOST:PORT/v1.",
        ),
        (
            [
                "evaluate.judge={endpoint: 'http://h/v1', model: j, questions: a/b, "
                "api_key_env: sk-123}"
            ],
            "evaluate.judge.api_key_env: must be the name of an environment variable, not the key "
            "itself.",
        ),
        (
            ["evaluate.tasks=[{name: a, stop: 'Q:'}]"],
            "evaluate.tasks[0].stop: 'Q:' is text; give a list.",
        ),
        (
            ["evaluate.tasks=[{name: a, generation: {top_p: 1.5}}]"],
            "evaluate.tasks[0].generation.top_p: 1.5 must be at most 1.0.",
        ),
        (
            ["evaluate.tasks=[{name: a, generation: {top_p: 0.9}}]"],
            "evaluate.tasks[0].generation.top_p: has no effect on greedy answers; give a "
            "temperature above 0 beside it, or leave it out.",
        ),
        (
            ["evaluate.tasks=[{name: a, generation: {temperature: 0, min_p: 0.1}}]"],
            "evaluate.tasks[0].generation.min_p: has no effect on greedy answers; give a "
            "temperature above 0 beside it, or leave it out.",
        ),
        (
            ["evaluate.tasks=[{name: mt_bench, generation: {temperature: 1}}]"],
            "evaluate.tasks[0].generation: MT-Bench has settings of its own; leave it out.",
        ),
        (
            ["evaluate.tasks=[{name: a, generation: {max_tokens: 5}}]"],
            "evaluate.tasks[0].generation.max_tokens: unknown key. Allowed: min_p, "
            "repetition_penalty, temperature, top_k, top_p.",
        ),
        (
            ["evaluate.leave_out=[mmlu]"],
            "evaluate.leave_out: leaves tasks out of a suite; name one in `suite`.",
        ),
        (
            ["evaluate.suite=base", "evaluate.tasks=[{name: mmlu}, {name: mmlu, shots: 1}]"],
            "evaluate.tasks[14].name: 'mmlu' is already tasks[13]; keep one.",
        ),
    ],
)
def test_wrong_suites_are_refused(small: Path, changes: list[str], expected: str) -> None:
    assert message(small, *changes) == expected


def test_an_evaluation_without_tasks_is_refused(small: Path) -> None:
    line = message(small, "evaluate.tasks=[]")
    assert line.startswith("evaluate.tasks: missing; name a suite (base, instruct")


def test_the_papers_quickstart_differs_in_the_mixer_alone(root: Path) -> None:
    ours, papers = shipped(root, "quickstart"), shipped(root, "quickstart-paper")
    assert papers.student.mixer == MixerConfig(window=16, sinks=4)  # softmax, as wide as a head
    assert ours.student.mixer != papers.student.mixer
    different = {"name", "student", "report"}
    assert ours.model_dump(exclude=different) == papers.model_dump(exclude=different)


def test_merges_are_compared_on_the_quickstarts_experts(root: Path) -> None:
    ours, merges = shipped(root, "quickstart"), shipped(root, "quickstart-merges")
    for section in ("teacher", "student", "data", "capture", "align", "distill"):
        assert getattr(ours, section) == getattr(merges, section)
    assert merges.merge.model_copy(update={"variants": {}}) == ours.merge
    # The generalist, as the recipe's comment makes it, reads as much as the experts together.
    text = (root / "recipes" / "quickstart-merges.yaml").read_text()
    overrides = re.findall(r"--set '([^']+)'", text)
    path = root / "recipes" / "quickstart-merges.yaml"
    generalist = load_recipe(path, overrides).distill.experts["generalist"]
    assert generalist.tokens == sum(own.tokens for own in ours.distill.experts.values())


def test_the_recipe_for_one_gpu_keeps_the_papers_mixes_and_losses(root: Path) -> None:
    small, large = shipped(root, "llama3.2-1b-instruct"), shipped(root, "llama3.1-8b-instruct")
    assert small.data.domains == large.data.domains
    assert (small.student, small.merge) == (large.student, large.merge)
    for name in ("ce_weight", "kl_weight", "kl_tail", "clip", "weight_decay", "schedule"):
        assert getattr(small.distill, name) == getattr(large.distill, name)


def test_quickstart_tasks_are_shipped(root: Path) -> None:
    text = (root / "recipes" / "quickstart.yaml").read_text()
    named = {task["name"] for task in yaml.safe_load(text)["evaluate"]["tasks"]}
    assert named == {
        path.stem for path in (root / "recipes" / "quickstart" / "tasks").glob("qs_*.yaml")
    }


# --- what loading does


def test_paths_are_relative_to_the_recipe(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert load_recipe(small).teacher.path == str((small.parent / "teacher").resolve())


def test_hub_id_stays(small: Path) -> None:
    assert (
        load_recipe(small, ["teacher.path=meta-llama/Llama-3.1-8B"]).teacher.path
        == "meta-llama/Llama-3.1-8B"
    )


def test_single_domain_is_a_mixture(small: Path) -> None:
    experts = load_recipe(small).distill.experts
    assert experts["math"].phases[0].domains == {"math": 1.0}
    assert experts["code"].phases[0].domains == {"math": 1.0, "code": 3.0}


def test_overrides_apply_in_order(small: Path) -> None:
    recipe = load_recipe(
        small,
        [
            "align.lr=0.003",
            "align.lr=0.004",
            "merge.weights.math=0.25",
            "merge.weights.code=0.75",
            "evaluate.tasks[0].shots=2",
            "data.domains.math.sources.0.weight=2",
            "distill.clip=",
            "report.alphas=[0, 0.5]",
        ],
    )
    assert recipe.align.lr == 0.004
    assert recipe.merge.weights == {"math": 0.25, "code": 0.75}
    assert recipe.evaluate.tasks[0].shots == 2
    assert recipe.data.domains["math"].sources[0].weight == 2.0
    assert recipe.distill.clip is None
    assert recipe.report.alphas == (0.0, 0.5)


def test_a_phase_cannot_start_below_the_final_learning_rate(small: Path) -> None:
    phase = "distill.experts.code.phases=[{domain: math, tokens: 2048, lr: 1.0e-5}]"
    falling = ["distill.schedule=cosine", "distill.final_lr=5.0e-5", phase]
    expected = (
        "distill.experts.code.phases[0].lr: 1e-05 is below distill.final_lr (5e-05); raise it, or "
        "lower"
    )
    assert message(small, *falling).startswith(expected)
    assert load_recipe(small, [phase]).distill.experts["code"].phases[0].lr == 1e-5


def test_recipe_is_immutable(small: Path) -> None:
    recipe = load_recipe(small)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_mixer_round_trips_through_json() -> None:
    kept = {"every": 4, "offset": 1, "heads": {2: [0, 3]}}
    mixer = MixerConfig(window=7, branches=("mlstm",), attention=kept)
    assert MixerConfig(**json.loads(mixer.model_dump_json())) == mixer
    assert mixer.kept(6, 4) == [(), (0, 1, 2, 3), (0, 3), (), (), (0, 1, 2, 3)]
    assert MixerConfig(attention={"every": 3}).kept(6, 1) == [(), (), (0,), (), (), (0,)]


def test_weights_may_be_any_numbers_or_must_sum_to_what_is_said(small: Path) -> None:
    sources = (
        "sources: [{path: a/b, weight: 0.1}, {path: c/d, weight: 0.2}, {path: e/f, weight: 0.7}]"
    )
    load_recipe(small, [f"data.domains.math={{weights_sum: 1, {sources}}}"])
    load_recipe(small, [f"data.domains.math={{{sources.replace('0.7', '3')}}}"])


# --- what loading refuses


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.mixer.windw=3", "student.mixer.windw: unknown key. Did you mean 'window'?"),
        ("evaluate.tasks[0].shts=3", "evaluate.tasks[0].shts: unknown key. Did you mean 'shots'?"),
        ("distill.experts.math.phase=[]",
         "distill.experts.math.phase: unknown key. Did you mean 'phases'?"),
        ("qqq=1", "qqq: unknown key. Allowed: align, capture, data,"),
        ("align.lr=1e-4", "align.lr: '1e-4' is text; YAML needs 1.0e-4"),
        ("align.lr='0.1'", "align.lr: '0.1' is text; YAML needs 0.1 without quotes"),
        ("align.tokens=1e6", "align.tokens: '1e6' is text; YAML needs 1000000"),
        ("align.tokens=1.0e+6", "align.tokens: 1000000.0 is a number; give a whole number."),
        ("seed=true", "seed: True is true/false; give a whole number."),
        ("evaluate.experts=1", "evaluate.experts: 1 is a whole number; give true or false."),
        ("name=5", "name: 5 is a whole number; give text."),
        ("name=a/b", "name: 'a/b' cannot name a folder; use letters, digits, '.', '_' and '-'."),
        ("name=a.kept-01",
         "name: 'a.kept-01' holds '.kept-', as names of replaced artifacts do."),
        ("align.lr=.nan", "align.lr: nan is not a finite number. Give one."),
        ("align.lr=-1", "align.lr: -1 must be greater than 0.0."),
        ("capture.top_k=257", "capture.top_k: 257 must be at most 256."),
        ("capture.mass=0", "capture.mass: 0 must be greater than 0"),
        ("capture.mass=1.01", "capture.mass: 1.01 must be at most 1"),
        ("capture={mass: null, min_k: 4}",
         "capture.min_k: 4 has no effect with mass null, which keeps all top_k;"),
        ("capture.shard_teacher=true",
         "capture.shard_teacher: true has no effect with targets 'stored'; set targets"),
        ("distill.lora_rank=8",
         "distill.lora_rank: 8 has no effect with trainable 'all'; set trainable to 'lora'."),
        ("capture={top_k: 8, min_k: 9}",
         "capture.min_k: 9 is above top_k (8); give at most top_k."),
        ("teacher.dtype=fp32",
         "teacher.dtype: 'fp32' is not allowed. Allowed: 'float32', 'bfloat16' or 'float16'."),
        ("student.mixer.branches=[swa]",
         "student.mixer.branches[0]: 'swa' is not allowed. Allowed: 'mlstm' or"),
        ("student.mixer.branches=[]", "student.mixer.branches: empty. Give at least one."),
        ("student.mixer.branches=[mlstm, mlstm]",
         "student.mixer.branches: ['mlstm', 'mlstm'] names a branch twice;"),
        ("student=5", "student: 5 is a whole number; give a mapping."),
        ("align.betas=0.9", "align.betas: 0.9 is a number; give a list."),
        ("align.betas=[0.9, 0.9, 0.9]", "align.betas: has 3 items. Give 2."),
        ("evaluate.tasks=[{name: a}, {name: a}]",
         "evaluate.tasks[1].name: 'a' is already tasks[0]; keep one."),
        ("report.alphas=[0.1, 0]", "report.alphas: [0.1, 0.0] is not strictly ascending;"),
    ],
)  # fmt: skip
def test_bad_value_gives_one_line(small: Path, override: str, expected: str) -> None:
    assert message(small, override).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.mixer.window=64", "student.mixer.window: 64 must be below data.context (64)."),
        ("student.mixer.attention={layers: [3], every: 4}",
         "student.mixer.attention.every: 4 stands beside `layers`; give one of the two."),
        ("student.mixer.attention={offset: 1}", "student.mixer.attention.offset: 1 needs `every`;"),
        ("student.mixer.attention={every: 4, offset: 4}",
         "student.mixer.attention.offset: 4 must be below `every` (4)."),
        ("student.mixer.attention={every: 1}", "student.mixer.attention.every: 1 keeps all layers"),
        ("student.mixer.attention={}", "student.mixer.attention: keeps nothing; name layers or"),
        ("student.mixer.attention={layers: [3, 1]}",
         "student.mixer.attention.layers: [3, 1] must rise, each layer once."),
        ("student.mixer.attention={heads: {5: []}}",
         "student.mixer.attention.heads.5: [] must name heads in rising order, each once."),
        ("student.mixer.attention={every: 4, heads: {3: [1]}}",
         "student.mixer.attention.heads.3: the layer keeps all its heads already; leave it out"),
        ("align.domains={mth: 1.0}", "align.domains.mth: no such domain. Domains: math, code."),
        ("distill.experts.code.phases=[{domain: mth, tokens: 2048}]",
         "distill.experts.code.phases[0].domains.mth: no such domain. Domains: math, code."),
        ("distill.experts.code.phases=[{domain: math, domains: {math: 1.0}, tokens: 2048}]",
         "distill.experts.code.phases[0].domain: given beside 'domains'; keep one of the two."),
        ("distill.experts.code.phases=[{domain: math, tokens: 100}]",
         "distill.experts.code.phases[0].tokens: 100 is less than one optimiser step"),
        ("align.tokens=100",
         "align.tokens: 100 is less than one optimiser step (batch x data.context = 256 tokens)."),
        ("align.warmup_steps=16", "align.warmup_steps: 16 must be below the number of steps (16)."),
        ("distill.experts.merged={phases: [{domain: math, tokens: 2048}]}",
         "distill.experts.merged: the report uses this name itself; choose another."),
        ("align.micro_batch=3", "align.micro_batch: 3 does not divide batch (4); give a divisor."),
        ("align.schedule=constant",
         "align.final_lr: 1e-05 has no effect with schedule 'constant'; set it to null."),
        ("align.lr=1.0e-6", "align.final_lr: 1e-05 is above lr (1e-06); give at most lr."),
        ("distill.kl_weight=0", "distill.ce_weight: 0.0 beside kl_weight 0.0 leaves no loss;"),
        ("distill.kl_tail=false",
         "distill.kl_tail: false renormalises over targets that capture.mass (0.98) cuts"),
        ("merge.weights=unifrm",
         "merge.weights: 'unifrm' is not allowed. Allowed: 'uniform', 'tuned' or"),
        ("merge.weights={math: 0.5}",
         "merge.weights: no weight for expert 'code'; give one (0 leaves it out)."),
        ("merge.weights={math: 0.5, code: 0.7}",
         "merge.weights: they sum to 1.2; they must sum to 1."),
        ("merge.weights={math: -0.5, code: 1.5}", "merge.weights.math: -0.5 must be at least 0.0."),
        ("merge.density=0.5",
         "merge.density: 0.5 has no effect with method 'linear'; leave it out."),
        ("merge.scale=0.5", "merge.scale: 0.5 has no effect with method 'linear'; leave it out."),
        ("merge.method=ties",
         "merge.density: missing; method 'ties' needs one, for example 0.2."),
        ("merge.variants={x: {method: task_arithmetic, density: 0.5}}",
         "merge.variants.x.density: 0.5 has no effect with method 'task_arithmetic'; leave it"),
        ("merge.variants={x: {weights: {math: 0.5}}}",
         "merge.variants.x.weights: no weight for expert 'code'; give one (0 leaves it out)."),
        ("merge.variants={x: {method: slerp, weights: {math: 1.0, code: 0}}}",
         "merge.variants.x.method: 'slerp' merges two experts, and 1 have a weight above 0;"),
        ("merge.variants={code: {scale: 1.0, method: dare, density: 0.5}}",
         "merge.variants.code: an expert or the report uses this name; choose another."),
        ("merge.layer_groups=2",
         "merge.layer_groups: 2 has no effect with uniform weights; leave it out."),
        ("merge={weights: learned, tuning: {trials: 5}}",
         "merge.tuning: has no effect with learned weights; leave it out."),
        ("merge.learning.steps=5",
         "merge.learning: has no effect with uniform weights; leave it out."),
        ("merge={weights: learned, method: ties, density: 0.5}",
         "merge.weights: 'learned' needs a method that is linear in the weights (linear or"),
        ("merge={weights: tuned, tuning: {tasks: [{name: qs_math_add}]}}",
         "merge.tuning.tasks[0].name: 'qs_math_add' is a task of evaluate.tasks, which must stay"),
        ("merge={weights: tuned, tuning: {tasks: [{name: v}, {name: v}]}}",
         "merge.tuning.tasks[1].name: 'v' is already tasks[0]; keep one."),
        ("merge.variants={x: {variants: {}}}", "merge.variants.x.variants: unknown"),
        ("data.domains.math.sources=[]", "data.domains.math.sources: empty. Give at least one."),
        ("data.domains.math.sources=[{generator: math}]",
         "data.domains.math.sources[0].documents: missing; a generator needs the "
         "number of documents to make."),
        ("data.domains.math.sources=[{generator: math, documents: 9, text: x}]",
         "data.domains.math.sources[0].text: does not apply to a generator; leave it out."),
        ("data.domains.math.sources=[{split: train}]",
         "data.domains.math.sources[0]: has neither of 'path' and 'generator'; give exactly one."),
        ("data.domains.math.sources=[{path: a/b, generator: math, documents: 9}]",
         "data.domains.math.sources[0]: has both of 'path' and 'generator'; give exactly one."),
        ("data.domains.math.sources=[{path: a/b, prompt: x}]",
         "data.domains.math.sources[0].response: missing; 'prompt' and 'response' go together."),
        ("data.domains.math.sources=[{path: a/b, text: x, messages: y}]",
         "data.domains.math.sources[0].messages: given beside 'text'; name the "
         "columns of one style only."),
        ("data.domains.math.sources=[{path: a/b, weight: 0}]",
         "data.domains.math.sources[0].weight: 0 must be greater than 0.0."),
        ("data.domains.math.sources=[{path: a/b, weight: -2}]",
         "data.domains.math.sources[0].weight: -2 must be greater than 0.0."),
        ("data.domains.math={weights_sum: 100, sources: [{path: a/b, weight: "
         "70}, {path: c/d, weight: 25.5}]}",
         "data.domains.math.weights_sum: the sources' weights sum to 95.5, not 100; "
         "correct them, or leave"),
        ("data.domains.math.sources=[{path: teacher, revision: main}]",
         "data.domains.math.sources[0].revision: does not apply to the local path "),
        ("data.domains.math.sources=[{path: teacher, streaming: false}]",
         "data.domains.math.sources[0].streaming: does not apply to the local path "),
        ("data.domains.math.sources=[{path: a/b, system: x}]",
         "data.domains.math.sources[0].system: given without 'prompt' and "
         "'response'; it comes before a prompt."),
        ("data.domains.math.sources=[{path: a/b, sample_by: document}]",
         "data.domains.math.sources[0].sample_by: does not apply to 'a/b' on the "
         "hub, only to local files; leave"),
        ("data.domains.math.sources=[{generator: math, documents: 9, split: test}]",
         "data.domains.math.sources[0].split: does not apply to a generator; leave it out."),
        ("data.long_documents=cut",
         "data.long_documents: 'cut' is not allowed. Allowed: 'split', 'truncate', "
         "'drop' or 'error'."),
        ("data.workers=-1", "data.workers: -1 must be at least 0."),
        ("data.domains={a/b: {sources: [{path: x/y}]}}",
         "data.domains.a/b: 'a/b' cannot name a folder;"),
        ("refine={tokens: 9000, lr: 1.0e-5, batch: 4, prompt_tokens: 8, new_tokens: 8, "
         "experts: [none]}",
         "refine.experts: no expert 'none'. Experts: "),
        ("refine={tokens: 90000, lr: 1.0e-5, batch: 4}",
         "refine.new_tokens: 512 and prompt_tokens (512) are more than data.context"),
        ("refine={tokens: 60, lr: 1.0e-5, batch: 4, prompt_tokens: 8, new_tokens: 8}",
         "refine.tokens: 60 is less than one optimiser step"),
        ("refine={tokens: 64, lr: 1.0e-5, batch: 4, prompt_tokens: 8, new_tokens: 8, "
         "warmup_steps: 1}",
         "refine.warmup_steps: 1 must be below the number of steps (1)."),
    ],
)  # fmt: skip
def test_rules_across_fields_give_one_line(small: Path, override: str, expected: str) -> None:
    beside = ["distill.ce_weight=0"] if "kl_weight" in override else []
    assert message(small, *beside, override).startswith(expected)


# --- several problems at once


def test_every_problem_of_a_recipe_is_listed(small: Path) -> None:
    """Of the overrides, the fields, the rules of a section, and the rules between sections."""
    found = problems(
        small,
        "evaluate.include=tasks",
        "align",
        "evaluate.tasks[7].shots=1",
        "evaluate.tasks[0].shts=3",
        "teacher.path=gone",
        "distill.micro_batch=3",
        "distill.kl_weight=0",
        "distill.ce_weight=0",
        "student.mixer.window=64",
        "align.domains={mth: 1.0}",
        "align.warmup_steps=16",
    )
    starts = (
        "--set align: not of the form",
        "--set evaluate.tasks[7].shots: '7' is not an index",
        "evaluate.tasks[0].shts: unknown key. Did you mean 'shots'?",
        "teacher.path: 'gone' does not exist",
        "distill.micro_batch: 3 does not divide batch (4)",
        "distill.ce_weight: 0.0 beside kl_weight 0.0",
        "evaluate.include: 'tasks' is not a folder",
        # The sections student, align and data are valid, so the rules between them are checked.
        "student.mixer.window: 64 must be below data.context (64).",
        "align.domains.mth: no such domain.",
        "align.warmup_steps: 16 must be below the number of steps (16).",
    )
    assert [
        line for line, start in zip(found, starts, strict=True) if not line.startswith(start)
    ] == []


def test_weights_of_other_experts_name_every_expert(small: Path) -> None:
    assert problems(small, "merge.weights={math: 0.5, cod: 0.5}") == (
        "merge.weights.cod: no such expert. Experts: math, code.",
        "merge.weights: no weight for expert 'code'; give one (0 leaves it out).",
    )


def test_rules_of_one_section_are_all_checked(small: Path) -> None:
    source = "{path: teacher, name: x, revision: main, streaming: false, text: a, messages: b}"
    fields = ("name", "revision", "streaming", "messages")
    found = problems(small, f"data.domains.math.sources=[{source}]")
    assert [line.split(":")[0] for line in found] == [
        f"data.domains.math.sources[0].{field}" for field in fields
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "align.lr",
            "--set align.lr: not of the form dotted.path=value; write it like align.lr=0.003.",
        ),
        ("=3", "--set =3: not of the form dotted.path=value"),
        ("align..lr=3", "--set align..lr=3: not of the form dotted.path=value"),
        (
            "align.tokens.x=3",
            "--set align.tokens.x: align.tokens is 4096, which has nothing below it.",
        ),
        (
            "evaluate.tasks[5].shots=1",
            "--set evaluate.tasks[5].shots: '5' is not an index of this list (0 to 0).",
        ),
        ("align.lr=[1", "--set align.lr, line 1, column 3: not valid YAML"),
    ],
)
def test_bad_override_gives_one_line(small: Path, override: str, expected: str) -> None:
    assert message(small, override).startswith(expected)


# Ten lines of ten aliases each: ten thousand million values.
LAUGHS = "l0: &l0 [1]\n" + "".join(
    f"l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 10)}]\n" for n in range(10)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a: 1\na: 2\n",
            ", line 2, column 1: not valid YAML: the key 'a' is already on line 1; keep one.",
        ),
        (
            "a: {b: 1, b: 2}\n",
            ", line 1, column 11: not valid YAML: the key 'b' is already on line 1; keep one.",
        ),
        (
            "a: 1\nname: {{x}}\n",
            ", line 2, column 8: not valid YAML: a mapping (or a template's {{ }} that is not "
            "filled in) cannot be a key; give a word.",
        ),
        (
            "? [a, b]\n: 3\n",
            ", line 1, column 3: not valid YAML: a list cannot be a key; give a word.",
        ),
        ("a: [1\n", ", line 2, column 1: not valid YAML"),
        ("- 1\n", ": contains a list; a recipe is a mapping of sections"),
        ("", ": contains nothing; a recipe is a mapping of sections"),
        ("a: \x00\n", ": not valid YAML"),
        (LAUGHS, ", line 1, column 1: not valid YAML: its aliases (*name) make more than 100000 "),
        ("a: &a [*a]\n", ", line 1, column 1: not valid YAML: its aliases (*name) make more than"),
    ],
)
def test_bad_file_gives_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert message(path).startswith(f"{path}{expected}")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    missing = tmp_path / "nope.yaml"
    expected = f"{missing}: no such file; give the path of a recipe (YAML). 'xlstm-distill recipes'"
    assert message(missing).startswith(expected)
    assert (
        message(tmp_path)
        == f"{tmp_path}: cannot be read (Is a directory); give the path of a recipe (YAML)."
    )
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert (
        message(binary)
        == f"{binary}: cannot be read (not UTF-8 text); give the path of a recipe (YAML)."
    )


def test_all_missing_sections_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("name: bare\n")
    sections = ("teacher", "data", "align", "distill", "evaluate")
    assert problems(path) == tuple(f"{name}: missing. Add it." for name in sections)


@pytest.mark.parametrize("teacher", ["gone", "./gone", "sub/gone", "/nowhere/at/all"])
def test_missing_local_teacher_is_no_hub_id(small: Path, teacher: str) -> None:
    (small.parent / "sub").mkdir()
    assert message(small, f"teacher.path={teacher}").startswith(
        f"teacher.path: {teacher!r} does not exist (looked for "
    )


def test_missing_task_folder(small: Path) -> None:
    assert message(small, "evaluate.include=tasks").startswith(
        "evaluate.include: 'tasks' is not a folder (looked for "
    )


def test_weights_are_tuned_on_tasks_that_the_recipe_names_or_that_a_generator_has(
    small: Path,
) -> None:
    sources = "[{path: a/b}]"
    hub = f"data.domains={{math: {{sources: {sources}}}, code: {{sources: {sources}}}}}"
    variant = "merge.variants={x: {weights: tuned}}"
    assert load_recipe(small, [variant]).merge.variants["x"].found == "tuned"
    assert message(small, hub, variant).startswith(
        "merge.variants.x.tuning.tasks: missing; no domain is made by an embedded generator,"
    )
