"""Suites as data: validation, the paper's settings, and lm-eval's own files of every task."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from xlstm_eval.loading import check_sentences
from xlstm_eval.long_context.settings import LongContextSettings
from xlstm_eval.problems import FieldError
from xlstm_eval.records import EvalError
from xlstm_eval.suites import (
    Suite,
    SuiteTask,
    joined_settings,
    named_suite,
    suite_names,
    suite_settings,
)
from xlstm_eval.tasks import ruler
from xlstm_eval.tasks.local import local_tasks
from xlstm_eval.tasks.mt_bench import MT_BENCH

ROOT = Path(__file__).parents[3]
PAPERS = ("base", "instruct")
OF_LM_EVAL = (*PAPERS, "long-context")


def test_a_task_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"tasks\[1\]\.name: 'a' is already tasks\[0\]"):
        Suite(tasks=(SuiteTask(name="a"), SuiteTask(name="a")))


@pytest.mark.parametrize("change", [{"tasks": ()}, {"limit": 0}, {"limt": 3}])
def test_bad_suites_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Suite.model_validate({"tasks": ({"name": "a"},)} | change)


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(EvalError, match=r"'bse' is unknown\. Did you mean 'base'\?"):
        named_suite("bse")


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_is_valid_and_nobody_changes_it(name: str) -> None:
    folder = ROOT / "recipes" / "quickstart" / "tasks"
    before = named_suite(name, folder)
    suite_settings(name, folder)["tasks"].clear()
    assert named_suite(name, folder) == before


def test_the_quickstarts_suite_is_every_task_of_its_folder(tmp_path: Path) -> None:
    folder = ROOT / "recipes" / "quickstart" / "tasks"
    suite = named_suite("quickstart", folder)
    listed = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())["evaluate"]
    assert suite.apply_chat_template == listed["apply_chat_template"]
    assert suite.domains() == {task["name"]: task["domain"] for task in listed["tasks"]}
    for name, kind in (("z", "generate_until"), ("a", "multiple_choice"), ("m", "generate_until")):
        text = f"task: {name}\noutput_type: {kind}\nprocess_results: !function utils.do\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    assert list(named_suite("quickstart", tmp_path).domains()) == ["m", "z", "a"]
    with pytest.raises(EvalError, match=r"quickstart is a folder of task files\. Name the folder"):
        named_suite("quickstart")


def test_the_papers_base_suite() -> None:
    suite = named_suite("base")
    shots = {task.name: (task.shots, task.max_gen_tokens) for task in suite.tasks}
    assert shots["arc_challenge"] == (25, 100)
    assert shots["mmlu"] == (5, 10)
    assert shots["gsm8k"] == (8, 1024)
    assert shots["mbpp"] == (3, 256)
    assert shots["mbpp_plus"] == (3, 1024)
    assert shots["gpqa_main_cot_zeroshot"] == (0, 2048)
    assert not suite.apply_chat_template
    assert not any(task.multiturn for task in suite.tasks)


def test_the_papers_instruct_suite() -> None:
    suite = named_suite("instruct")
    by_name = {task.name: task for task in suite.tasks}
    assert suite.apply_chat_template
    assert by_name["gsm8k_cot"].shots == 5
    assert by_name["gsm8k_cot"].max_gen_tokens == 3072
    assert {name for name, task in by_name.items() if not task.multiturn} == {
        "piqa",
        "arc_easy",
        "gpqa_diamond_cot_zeroshot",
        "gpqa_main_cot_zeroshot",
        "xlstm_humaneval_64_instruct",
        "xlstm_humaneval_plus_64_instruct",
        "ifeval",
        "mt_bench",
    }
    assert set(suite.domains().values()) == {"understanding", "math", "code", "stem", "chat"}


def test_the_suite_of_long_context() -> None:
    settings = suite_settings("long-context")
    assert set(settings) == {"long_context", "tasks"}  # the chat template is another suite's
    # The same as without a suite.
    defaults = LongContextSettings().model_dump()
    listed = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in settings["long_context"].items()
    }
    assert listed.items() <= defaults.items()
    lengths = {own.length for name, own in local_tasks().items() if "niah" in name}
    assert lengths == {1024, 4096, 8192, 16384}  # the paper's
    # LongBench's authors ask these without a chat template.
    names = {task["name"] for task in settings["tasks"]}
    assert not names & {"longbench_trec", "longbench_triviaqa", "longbench_lcc"}


def test_several_suites_are_one_after_the_other() -> None:
    joined = joined_settings(["instruct", "long-context"], leave_out=["longbench_*", "mmlu"])
    expected = [task["name"] for task in suite_settings("instruct")["tasks"]]
    expected += [task["name"] for task in suite_settings("long-context")["tasks"]]
    assert [task["name"] for task in joined["tasks"]] == [
        name for name in expected if name != "mmlu" and not name.startswith("longbench_")
    ]
    assert joined["apply_chat_template"] is True
    assert joined["long_context"] == suite_settings("long-context")["long_context"]


def test_suites_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="base and instruct do not agree about apply_chat_template"):
        joined_settings(["base", "instruct"])
    (tmp_path / "mmlu.yaml").write_text("task: mmlu\nmetadata: {domain: other}\n")
    with pytest.raises(EvalError, match="mmlu has other settings in instruct than in quickstart"):
        joined_settings(["instruct", "quickstart"], tmp_path)
    with pytest.raises(FieldError, match=r"leave_out\[1\]: 'longbanch_\*' is not in the suite"):
        joined_settings(["long-context"], leave_out=["longbench_*", "longbanch_*"])


@pytest.fixture(scope="module")
def task_files() -> dict[str, dict[str, Any]]:
    """Settings of the lm-eval tasks that the suites name, from the files it installs."""
    from lm_eval.tasks._yaml_loader import load_yaml

    wanted = {task.name for name in OF_LM_EVAL for task in named_suite(name).tasks}
    wanted |= {task.original for task in local_tasks().values()}
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent / "tasks"
    folders = [root / "benchmarks", root / "leaderboard", root / "ruler"]
    # Of 14,000 files only those in folders that begin as a name does.
    folders += [
        folder for folder in root.iterdir() if any(name.startswith(folder.name) for name in wanted)
    ]
    # No task of lm-eval: it generates, and a judge scores.
    found: dict[str, dict[str, Any]] = {MT_BENCH: {"output_type": "generate_until"}}
    for path in (path for folder in folders for path in folder.rglob("*.yaml")):
        # MMLU alone has hundreds, one for each subject and prompt.
        if "mmlu" in path.parts and path.stem != "_mmlu":
            continue
        named = re.search(r"^(?:task|group): *(\S+) *$", path.read_text(), re.MULTILINE)
        if named and named[1] in wanted:
            # Without importing the tasks' functions: those of code tasks ask the hub.
            found[named[1]] = load_yaml(path, resolve_func=False)
    return found


def metrics_of(settings: dict[str, Any]) -> set[str]:
    """Names of a task's metrics, as its file says."""
    rows = settings.get("metric_list") or settings.get("aggregate_metric_list") or []
    found = set()
    for row in rows:
        name = row["metric"].rpartition(".")[2]
        counts = [f"pass@{k}" for k in row.get("k", ())]
        found |= set(counts) or {name}
    return found


@pytest.mark.parametrize("suite", OF_LM_EVAL)
def test_lm_eval_knows_every_task_metric_and_filter(
    suite: str, task_files: dict[str, dict[str, Any]]
) -> None:
    for task in named_suite(suite).tasks:
        own = local_tasks().get(task.name)
        settings = task_files[own.original if own else task.name]
        if own is not None and own.length is not None:
            assert task.metric == ruler.METRIC
            # The prompt is sized for the whole budget of the answer.
            assert task.max_gen_tokens == settings["generation_kwargs"]["max_gen_toks"]
            continue
        if own is not None:
            assert task.metric == "pass@1"
            assert 1 in own.pass_at
            assert max(own.pass_at) <= settings.get("repeats", 1)
            continue
        members = settings.get("task")
        # Members of a group are files of their own; the group names the metric it aggregates.
        if isinstance(members, list) and not metrics_of(settings):
            continue
        assert task.metric in metrics_of(settings) or task.name == MT_BENCH, task.name
        filters = {row["name"] for row in settings.get("filter_list", ())}
        assert task.filter is None or task.filter in filters, task.name


@pytest.mark.parametrize("suite", PAPERS)
def test_generation_leads_and_log_likelihood_follows(
    suite: str, task_files: dict[str, dict[str, Any]]
) -> None:
    kinds = []
    for task in named_suite(suite).tasks:
        own = local_tasks().get(task.name)
        settings = task_files[own.original if own else task.name]
        # Groups: those of mathematics generate, MMLU does not.
        generates = settings.get("output_type", "") == "generate_until" or "math" in task.name
        kinds.append(generates)
    assert kinds == sorted(kinds, reverse=True)
    assert 0 < sum(kinds) < len(kinds)


def test_ifeval_without_the_data_for_its_answers_is_refused(tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    check_sentences("gsm8k")
    with pytest.raises(EvalError, match="leaderboard_ifeval needs nltk"):
        check_sentences("leaderboard_ifeval")
    (tmp_path / "tokenizers/punkt_tab").mkdir(parents=True)
    check_sentences("ifeval")
