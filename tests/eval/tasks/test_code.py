"""pass@k, and lm-eval's own code tasks in the sandbox, without a network."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from xlstm_eval.loading import load_suite
from xlstm_eval.records import EvalError
from xlstm_eval.suites import Suite, SuiteTask
from xlstm_eval.tasks.code import (
    SANDBOXED,
    code_of,
    estimated_pass_at_k,
    pass_at_k,
    sandboxed_metrics,
)

HUMANEVAL = {
    "task_id": "t/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}
MBPP = {
    "task_id": 1,
    "text": "Add two numbers.",
    "code": "def add(a, b): return a + b",
    "test_list": [f"assert add({n}, 1) == {n + 1}" for n in range(3)],
}
CRUXEVAL = {"code": "def f(n):\n    return n * 2", "input": "4", "output": "8", "id": "s"}
RIGHT, WRONG = "    return a + b\n", "    return a - b\n"


@pytest.mark.parametrize("answers", [1, 2, 5, 7])
def test_the_estimate_is_the_mean_over_all_choices(answers: int) -> None:
    for right in range(answers + 1):
        outcomes = [True] * right + [False] * (answers - right)
        for k in range(1, answers + 1):
            choices = list(itertools.combinations(outcomes, k))
            share = sum(map(any, choices)) / len(choices)
            assert estimated_pass_at_k(answers, right, k) == pytest.approx(share, abs=1e-12)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(EvalError, match=r"pass@3: there are 2 answers\. Take k from 1 to 2\."):
        estimated_pass_at_k(2, 1, 3)


def test_pass_at_k_runs_every_answer_against_its_tests() -> None:
    right, wrong = (f"def add(a, b):\n{body}" for body in (RIGHT, WRONG))
    scores = pass_at_k(["assert add(1, 2) == 3"], [[right, wrong, wrong, right]], [1, 2])
    assert scores == {"pass@1": 0.5, "pass@2": pytest.approx(5 / 6)}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f(): pass\n```", "def f(): pass\n"),
        ("def f(): pass", "def f(): pass"),
        ("def f(): pass\n```\nLike this:\n```python\nf()\n```", "def f(): pass\n"),
        ("```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("```\ndef f(): pass\n```", "def f(): pass\n"),
        ("Here it is:\n```python\ndef f(): pass\n```\nDone.", "def f(): pass\n"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(answer: str, code: str) -> None:
    assert code_of(answer) == code


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """lm-eval's code tasks, with its own files and one item of ours in place of their data sets."""
    import lm_eval.tasks

    root = tmp_path_factory.mktemp("code")
    theirs = Path(lm_eval.tasks.__file__).parent
    items = {"humaneval": HUMANEVAL, "mbpp": MBPP, "cruxeval": CRUXEVAL}
    names = {
        "humaneval": "humaneval",
        "humaneval_64_instruct": "humaneval",
        "mbpp": "mbpp",
        "mbpp_instruct": "mbpp",
        "cruxeval_output": "cruxeval",
    }
    for name, folder in names.items():
        data = root / f"{folder}.jsonl"
        data.write_text(json.dumps(items[folder]) + "\n")
        (root / f"{name}.yaml").write_text(
            f"include: {theirs / folder / name}.yaml\ntask: {name}\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        )
    wanted = [name for name in names if "instruct" not in name]
    wanted += ["xlstm_humaneval_64_instruct", "xlstm_mbpp_instruct"]
    suite = Suite(include=root, tasks=tuple(SuiteTask(name=name) for name in wanted))
    loaded = load_suite(suite)
    assert loaded.runs_code()
    assert loaded.unconfined == frozenset()
    return {leaf.task_name: leaf for _, leaf in loaded.leaves()}


@pytest.mark.parametrize(
    ("name", "answers", "metric", "score"),
    [
        ("humaneval", [RIGHT], "pass@1", 1.0),
        ("humaneval", [WRONG], "pass@1", 0.0),
        # What the model adds behind the code block is cut off.
        ("xlstm_humaneval_64_instruct", [RIGHT + "```\nsure"] * 16 + [WRONG] * 48, "pass@1", 0.25),
        ("mbpp", ["def add(a, b): return a + b"], "pass_at_1", 1.0),
        # lm-eval's own would run " add(a, b): ...".
        ("xlstm_mbpp_instruct", ["def add(a, b): return a + b\n```"], "pass@1", 1.0),
        ("xlstm_mbpp_instruct", ["def add(a, b): return 0\n```"], "pass@1", 0.0),
        ("cruxeval_output", ["assert f(4) == 8"], "pass@1", 1.0),
        ("cruxeval_output", ["assert f(4) == 7"], "pass@1", 0.0),
        # Their own runner would have run this in this process's folder.
        ("humaneval", ["    open('/tmp/xlstm-escaped', 'w')\n" + RIGHT], "pass@1", 0.0),
    ],
)
def test_lm_evals_code_tasks_run_in_the_sandbox(
    tasks: dict[str, Any], name: str, answers: list[str], metric: str, score: float
) -> None:
    task = tasks[name]
    doc = next(iter(task.test_docs()))
    answered = task._filters[0].filters[0]().apply([answers], [doc])
    programs = next(iter(answered))
    assert task.process_results(doc, [programs])[metric] == score
    assert not Path("/tmp/xlstm-escaped").exists()


def test_the_prompt_of_our_task_is_lm_evals(tasks: dict[str, Any]) -> None:
    ours = tasks["xlstm_humaneval_64_instruct"]
    assert ours.get_config("repeats") == 64
    settings = ours.get_config("generation_kwargs")
    assert (settings["do_sample"], settings["temperature"]) == (True, 0.2)
    assert HUMANEVAL["prompt"] in ours.doc_to_text(HUMANEVAL)


def test_code_that_runs_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "a", "a": "b"}) + "\n")
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
        "unsafe_code: true\nmetric_list:\n  - {metric: exact_match, aggregation: mean}\n"
    )
    loaded = load_suite(Suite(include=tmp_path, tasks=(SuiteTask(name="own"),)))
    assert loaded.unconfined == {"own"}
    # With our metric, where the file does not say that it runs code: consent is asked all the same.
    text = (tmp_path / "own.yaml").read_text().replace("unsafe_code: true", "")
    ours = "!function xlstm_eval.tasks.code.pass_at_k"
    (tmp_path / "own.yaml").write_text(text.replace("exact_match", ours))
    loaded = load_suite(Suite(include=tmp_path, tasks=(SuiteTask(name="own"),)))
    assert loaded.runs_code()
    assert loaded.unconfined == frozenset()


def test_other_metrics_come_from_the_package_itself() -> None:
    with sandboxed_metrics():
        import evaluate

        assert evaluate.load("code_eval") is SANDBOXED
        stand_in = evaluate
    assert sys.modules.get("evaluate") is not stand_in
