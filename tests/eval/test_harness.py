"""The harness on tiny random models and local tasks, without a network."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import math
import operator
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from judge_server import judge_server
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_eval.answering.coordinator import OneRank, Tally
from xlstm_eval.answering.decoding import Prompts, generate_rows, row_draws
from xlstm_eval.answering.language_model import free_memory
from xlstm_eval.answering.sizes import CPU_ROWS
from xlstm_eval.harness import Session, check_suite, evaluate_model, settled_objects
from xlstm_eval.loading import LoadedSuite, load_suite
from xlstm_eval.metrics import compare, pair_results
from xlstm_eval.protocol import require_same_protocol
from xlstm_eval.records import EvalError
from xlstm_eval.report import render
from xlstm_eval.report.outside import stock_report
from xlstm_eval.results import (
    all_metrics,
    pick_metric,
    read_items,
    require_same_requests,
    write_items,
    write_samples,
)
from xlstm_eval.samples import folder_rows
from xlstm_eval.stock import read_stock_results, require_same_items
from xlstm_eval.suites import Judge, Suite, SuiteTask

ITEMS = 24
NEW_TOKENS = 5
GENERATE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data/{name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: ["stop"], max_gen_toks: 5, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOICE = """task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "stop", *(f"w{index}" for index in range(59))]
    made = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def continuation(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    tokens: int = NEW_TOKENS,
) -> str:
    """Decode one item greedily, without cache, padding or batch: what the harness must see."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            token = int(
                model(torch.cat([ids, torch.tensor([new], dtype=torch.long)], dim=1))
                .logits[0, -1]
                .argmax()
            )
        if token in (2, 4):  # end of text, "stop"
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    """Write task files whose first answers are the model's own, and whose others it cannot give."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "data").mkdir()
    generator = torch.Generator().manual_seed(1)
    for name, right in (("first", 18), ("second", 6)):
        rows = []
        for index in range(ITEMS):
            length = 2 + int(torch.randint(12, (1,), generator=generator))
            prompt = " ".join(
                f"w{int(torch.randint(59, (1,), generator=generator))}" for _ in range(length)
            )
            answer = continuation(model, tokenizer, prompt)
            rows.append(
                {"question": prompt, "answer": answer if index < right else answer + " w0 w1"}
            )
        (root / f"{name}.yaml").write_text(GENERATE.format(name=name))
        (root / "data" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    rows = [
        {"question": f"w{i} w{i + 1}", "choices": ["w3", "w4", "w5 w6"], "answer": i % 3}
        for i in range(ITEMS)
    ]
    (root / "choice.yaml").write_text(CHOICE)
    (root / "data" / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedSuite:
    tasks = (
        SuiteTask(name="first", domain="math"),
        SuiteTask(name="second", domain="code"),
        SuiteTask(name="choice", domain="stem", metric="acc_norm"),
    )
    return load_suite(Suite(include=folder, tasks=tasks))


@pytest.fixture(scope="module")
def result(model: Any, tokenizer: Any, loaded: LoadedSuite) -> Any:
    return evaluate_model(model, tokenizer, loaded, Session(batch_size=16))


def test_scores_equal_decoding_one_item_at_a_time(result: Any) -> None:
    first, second, choice = result.tasks
    assert (first.task, first.metric, first.correct, first.samples) == (
        "first",
        "exact_match,none",
        18,
        ITEMS,
    )
    assert (second.correct, second.score, second.domain) == (6, 0.25, "code")
    assert first.stderr == pytest.approx((0.75 * 0.25 / (ITEMS - 1)) ** 0.5)
    assert (choice.metric, choice.samples) == ("acc_norm,none", ITEMS)
    # The other metric is kept beside the one that counts.
    assert set(choice.metrics) == {"acc,none", "acc_norm,none"}
    assert choice.metrics["acc_norm,none"] == choice.score
    accuracy = [row["acc"] for row in result.samples["choice"]]
    assert choice.metrics["acc,none"] == pytest.approx(sum(accuracy) / ITEMS)
    assert result.warnings == ()
    assert result.seconds > 0


def test_multiple_choice_equals_log_likelihoods_by_hand(
    model: Any, tokenizer: Any, result: Any
) -> None:
    right = 0
    for row in result.samples["choice"]:
        document = row["doc"]
        scores = []
        for choice in document["choices"]:
            ids = tokenizer(f"{document['question']} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0, 1:-1]
            scores.append(float(logs.gather(1, ids[0, 2:, None]).sum()) / len(choice))
        right += scores.index(max(scores)) == document["answer"]
    assert result.tasks[2].correct == right


def test_every_model_is_asked_the_same(tokenizer: Any, loaded: LoadedSuite, result: Any) -> None:
    other = evaluate_model(tiny_model(1), tokenizer, loaded, Session(batch_size=8))
    require_same_requests({"teacher": result.requests_hash, "student": other.requests_hash})
    assert other.settings_hash == result.settings_hash
    assert other.tasks != result.tasks
    fewer = Suite(include=loaded.suite.include, tasks=loaded.suite.tasks[:2], limit=5)
    short = evaluate_model(tiny_model(1), tokenizer, fewer, Session(batch_size=8))
    assert [task.samples for task in short.tasks] == [5, 5]
    with pytest.raises(EvalError, match="student: its requests differ from the teacher's"):
        require_same_requests({"teacher": result.requests_hash, "student": short.requests_hash})


def test_lengths_are_counted_once_for_all_models_and_models_are_freed(
    tokenizer: Any, loaded: LoadedSuite, result: Any
) -> None:
    known = loaded.lengths.of(tokenizer)
    assert len(known) > ITEMS
    before, model = dict(known), tiny_model(1)
    freed = weakref.ref(model)
    evaluate_model(model, tokenizer, loaded, Session(batch_size=16))
    assert loaded.lengths.of(tokenizer) is known
    assert known == before
    gc.disable()
    try:
        del model  # by its references: a second model of 16 GB may not fit beside it
        assert freed() is None
    finally:
        gc.enable()
    other = copy.deepcopy(tokenizer)
    again = evaluate_model(tiny_model(0), other, loaded, Session(batch_size=16))
    assert again.tasks == result.tasks
    assert loaded.lengths.tokenizer is other
    assert loaded.lengths.of(other) == known
    assert gc.get_freeze_count() == 0


def test_memory_that_only_garbage_holds_is_freed_where_a_batch_needs_it() -> None:
    gc.disable()
    try:
        model = torch.nn.Linear(1, 1)
        model.itself = [model]
        freed = weakref.ref(model)
        del model
        with settled_objects():
            assert freed() is not None
            free_memory()
            assert freed() is None
            assert gc.get_freeze_count() > 0
            with settled_objects():  # a caller may have done so before
                pass
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_the_same_model_ties_with_itself_at_another_batch_size(
    model: Any, tokenizer: Any, loaded: LoadedSuite, result: Any
) -> None:
    again = evaluate_model(model, tokenizer, loaded, Session(batch_size=5))
    found = compare("again", pair_results(result.tasks, again.tasks))
    assert (found.critical_tolerance, found.worst_drop, found.lossless) == (0.0, 0.0, True)


def test_a_size_found_for_single_turn_prompts_is_not_that_of_multi_turn_ones(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    tasks = (SuiteTask(name="first"), SuiteTask(name="second", shots=2, multiturn=True))
    (tmp_path / "generate_until-single-turn.json").write_text('{"rows": 5}')
    suite = Suite(include=folder, tasks=tasks, limit=3)
    for _ in range(2):  # the second time both sizes are kept ones
        found = evaluate_model(model, tokenizer, suite, Session(sizes=tmp_path))
        assert found.protocol["batch"] == {
            "generate_until-single-turn": 5,
            "generate_until-multi-turn": CPU_ROWS,
        }
    assert len(list(tmp_path.iterdir())) == 2


def test_tasks_resolve_from_any_folder_and_relative_path(
    folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    suite = Suite(include=Path(folder.name), tasks=(SuiteTask(name="first"),), limit=3)
    assert evaluate_model(model, tokenizer, suite, Session(batch_size=4)).tasks[0].samples == 3


def test_overrides_reach_the_requests(folder: Path, model: Any, tokenizer: Any) -> None:
    task = SuiteTask(name="first", max_gen_tokens=2, generation={"until": "w0"})
    got = evaluate_model(
        model, tokenizer, Suite(include=folder, tasks=(task,), limit=4), Session(batch_size=4)
    )
    for row in got.samples["first"]:
        assert row["arguments"][0][1] == {"until": "w0", "max_gen_toks": 2, "do_sample": False}
        assert len(row["resps"][0][0].split()) <= 2


def test_stops_and_sampling_of_a_suite_reach_the_requests_and_the_protocol(
    folder: Path, model: Any, tokenizer: Any
) -> None:
    wanted = {"temperature": 0.9, "top_k": 20, "min_p": None}
    task = SuiteTask(name="first", stop=("w1", "w2"), generation=wanted)
    suite = Suite(include=folder, tasks=(task,), limit=6)
    got = evaluate_model(model, tokenizer, suite, Session(batch_size=4))
    own = evaluate_model(
        model,
        tokenizer,
        suite.model_copy(update={"tasks": (SuiteTask(name="first"),)}),
        Session(batch_size=4),
    )
    assert got.protocol["tasks"]["first"]["generation"] == {
        "until": ["w1", "w2"],
        "max_gen_toks": NEW_TOKENS,
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 20,
    }
    with pytest.raises(EvalError, match=r"tasks\.first\.generation"):
        require_same_protocol({"teacher": own.protocol, "student": got.protocol})
    answers = [row["resps"][0][0] for row in got.samples["first"]]
    assert answers != [row["resps"][0][0] for row in own.samples["first"]]
    assert not any(word in ("w1", "w2") for text in answers for word in text.split())


def test_progress_counts_to_the_end_and_the_terminal_stays_clean(
    model: Any, tokenizer: Any, loaded: LoadedSuite, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int]] = []
    model.train()

    def progress(tally: Tally) -> None:
        seen.append((tally.done, tally.total))

    evaluate_model(model, tokenizer, loaded, Session(batch_size=16, progress=progress))
    assert model.training
    model.eval()
    total = ITEMS * (1 + 1 + 3)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert capfd.readouterr() == ("", "")


def test_a_truncated_prompt_is_told(folder: Path, model: Any, tokenizer: Any) -> None:
    suite = Suite(include=folder, tasks=(SuiteTask(name="first", max_gen_tokens=60),), limit=4)
    result = evaluate_model(model, tokenizer, suite, Session(batch_size=4))
    assert result.warnings
    assert all("truncat" in message.lower() for message in result.warnings)


def test_the_protocol_is_recorded_and_another_is_named(
    folder: Path, tokenizer: Any, loaded: LoadedSuite, result: Any
) -> None:
    protocol = result.protocol
    assert (protocol["dtype"], protocol["seed"], protocol["context"]) == ("float32", 0, 64)
    assert protocol["lm_eval"].startswith("0.4")
    assert protocol["tasks"]["first"]["shots"] == 0
    assert protocol["tasks"]["first"]["generation"]["max_gen_toks"] == 5
    # As the manifest keeps it.
    saved = json.loads(json.dumps(dict(protocol)))
    require_same_protocol({"teacher": saved, "student": protocol})
    require_same_protocol({"teacher": {}, "student": protocol})  # of before it was recorded
    other = evaluate_model(
        tiny_model(1).to(torch.bfloat16), tokenizer, loaded, Session(batch_size=8), seed=3
    )
    with pytest.raises(EvalError) as caught:
        require_same_protocol({"teacher": protocol, "student": other.protocol})
    message = str(caught.value)
    assert message.startswith("student: batch.")
    assert "dtype is 'bfloat16', the teacher's 'float32'" in message
    assert "seed is 3, the teacher's 0" in message
    assert "not compared" in message


def test_items_and_the_level_of_chance_are_kept(result: Any, tmp_path: Path) -> None:
    first = result.tasks[0]
    assert sum(first.items) == first.correct == 18
    assert [task.chance for task in result.tasks] == [None, None, pytest.approx(1 / 3)]
    write_items(result, tmp_path / "items.json")
    plain = [task.model_copy(update={"items": None}) for task in result.tasks]
    assert read_items(tmp_path, plain) == result.tasks
    # An evaluation of before there was such a file has its samples.
    (tmp_path / "items.json").unlink()
    write_samples(result, tmp_path / "samples")
    assert read_items(tmp_path, plain) == result.tasks


@pytest.fixture(scope="module")
def stock(folder: Path, model: Any, tokenizer: Any) -> Path:
    """What the stock lm-eval writes for two models, with its own model class and tracker."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    target, before = folder.parent / "stock", Path.cwd()
    os.chdir(folder)  # where lm-eval looks for a task's data
    try:
        for name, own in (("teacher", model), ("student", tiny_model(1))):
            tracker = EvaluationTracker(output_path=str(target / name))
            output = lm_eval.simple_evaluate(
                HFLM(pretrained=own, tokenizer=tokenizer, batch_size=8),
                tasks=["first", "second", "choice"],
                task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                evaluation_tracker=tracker,
                bootstrap_iters=0,
                log_samples=True,
            )
            samples = output.pop("samples")
            tracker.save_results_aggregated(results=output, samples=samples)
            for task in output["configs"]:
                tracker.save_results_samples(task_name=task, samples=samples[task])
    finally:
        os.chdir(before)
    return target


def stock_file(stock: Path, name: str) -> Path:
    (found,) = (stock / name).rglob("results_*.json")
    return found


def test_results_of_the_stock_lm_eval_are_read(stock: Path, result: Any) -> None:
    teacher, student = (read_stock_results(stock_file(stock, n)) for n in ("teacher", "student"))
    ours = {task.task: task for task in result.tasks}
    for task in teacher.tasks:
        own = ours[task.task]
        assert task.samples == ITEMS
        if task.task != "choice":  # the suite names another metric there
            assert (task.metric, task.score, task.items) == (own.metric, own.score, own.items)
    assert {task.task: task.chance for task in teacher.tasks}["choice"] == pytest.approx(1 / 3)
    require_same_items(teacher, student)
    assert teacher.protocol["dtype"] == "float32"
    assert teacher.protocol["tasks"]["first"]["generation"]["max_gen_toks"] == 5


def test_a_report_of_stock_results(stock: Path, tmp_path: Path) -> None:
    files = [stock_file(stock, name) for name in ("teacher", "student")]
    values = json.loads(render(stock_report(files))["report.json"])
    (model,) = values["models"]
    assert model["decision"] == "inferior"
    assert model["p_values"]["first"] < 0.01
    assert "evaluation: dtype" in values["provenance"]
    assert str(tmp_path.parent) not in json.dumps(values)
    with pytest.raises(EvalError, match="give the teacher's results file"):
        stock_report(files[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"model_dtype": "torch.bfloat16"}}, "dtype is 'bfloat16', the teacher's"),
        ({"versions": {"first": 9}}, "tasks.first.version is 9, the teacher's"),
        ({"chat_template_sha": "abc"}, "chat_template is 'abc', the teacher's None"),
        ({"n-shot": {"second": 5}}, "tasks.second.shots is 5, the teacher's 0"),
    ],
)
def test_stock_results_of_another_protocol_are_refused(
    stock: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    teacher, student = (stock_file(stock, name) for name in ("teacher", "student"))
    changed = json.loads(student.read_text())
    for key, value in change.items():
        changed[key] = {**changed[key], **value} if isinstance(value, dict) else value
    # With the samples inside, as a script that dumps lm-eval's output has them.
    changed["samples"] = {}
    for file in student.parent.glob("samples_*.jsonl"):
        name = file.name.split("_")[1]
        changed["samples"][name] = [json.loads(line) for line in file.read_text().splitlines()]
    (tmp_path / "student.json").write_text(json.dumps(changed))
    with pytest.raises(EvalError) as caught:
        stock_report([teacher, tmp_path / "student.json"])
    assert message in str(caught.value)


def test_stock_results_show_prompts_and_both_answers(stock: Path) -> None:
    data = stock_report([stock_file(stock, name) for name in ("teacher", "student")])
    assert data.items is not None
    assert data.items.total == 3 * ITEMS
    assert data.no_items == ""
    (item,) = (i for i in data.items.items if (i.task, i.number) == ("first", 3))
    for name, answer in (("teacher", item.teacher), ("student", item.student)):
        (file,) = (stock / name).rglob("samples_first_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        (row,) = (row for row in rows if row["doc_id"] == 3)
        assert item.prompt == row["arguments"]["gen_args_0"]["arg_0"]
        assert answer.startswith(row["filtered_resps"][0])
        assert getattr(item, f"{name}_score") == row["exact_match"]
    chosen = [item for item in data.items.items if item.task == "choice"]
    assert all("(log-likelihood -" in item.teacher for item in chosen)
    page = render(data)["report.html"]
    assert 'id="item-data"' in page
    assert 'id="no-items"' not in page
    # Some benchmarks ask not to publish their items.
    kept = stock_report([stock_file(stock, name) for name in ("teacher", "student")], most_items=0)
    assert kept.items is None


def test_stock_results_without_samples_are_compared_and_said(stock: Path, tmp_path: Path) -> None:
    teacher, student = (stock_file(stock, name) for name in ("teacher", "student"))
    own = shutil.copy(student, tmp_path / "alone.json")
    data = stock_report([teacher, own])
    assert data.items is None
    assert data.no_items.endswith("Run lm-eval with --log_samples.")
    scores = {task.task: task.score for task in data.models[0].results}
    assert scores == {task.task: task.score for task in read_stock_results(student).tasks}
    files = render(data)
    assert data.no_items in files["report.md"]
    assert 'id="no-items"' in files["report.html"]
    (model,) = json.loads(files["report.json"])["models"]
    assert model["decision"] == "undecided"
    # Of one task alone: the others keep their items.
    (file,) = student.parent.glob("samples_first_*.jsonl")
    shutil.copytree(student.parent, tmp_path / "some")
    (tmp_path / "some" / file.name).unlink()
    some = stock_report([teacher, tmp_path / "some" / student.name])
    assert some.no_items.startswith(f"{some.models[0].name} has no samples of first:")
    assert some.items is not None
    assert {item.task for item in some.items.items} == {"second", "choice"}
    # Samples that the score was not made from.
    rows = [json.loads(line) | {"exact_match": 0.5} for line in file.read_text().splitlines()]
    other = tmp_path / "some" / file.name
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = stock_report([teacher, tmp_path / "some" / student.name])
    assert found.no_items.endswith(f"the mean of its samples: first ({found.models[0].name}).")
    other.write_text("[" * 100_000)
    with pytest.raises(EvalError, match="not JSON lines"):
        stock_report([teacher, tmp_path / "some" / student.name])


def stock_values() -> dict[str, Any]:
    """A results file as lm-eval writes it, with its samples inside."""
    rows = [
        {
            "doc_id": number,
            "filter": "none",
            "arguments": {"gen_args_0": {"arg_0": f"Q{number}", "arg_1": {}}},
            "resps": [["<script>alert(1)</script>\x1b[2J\ud800"]],
            "filtered_resps": ["<b>"],
            "target": "t",
            "exact_match": float(number % 2),
        }
        for number in range(10)
    ]
    return {
        "results": {"a": {"exact_match,none": 0.5}},
        "configs": {"a": {"output_type": "generate_until"}},
        "n-samples": {"a": {"effective": 10}},
        "higher_is_better": {"a": {"exact_match": True}},
        "model_name": "\x1b[2J<i>m</i>",
        "samples": {"a": rows},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["samples"]["a"].append(v["samples"]["a"][0]), "item 0 is there twice"),
        (lambda v: v["samples"]["a"][0].pop("doc_id"), "a row has no doc_id"),
        (lambda v: v["samples"]["a"][3].pop("filter"), "item 3 has no filter"),
        (lambda v: [r.update(filter="z") for r in v["samples"]["a"]], "under the filter 'none'"),
        (lambda v: v["results"]["a"].update({"exact_match,none": "0.5"}), "is no number"),
        (lambda v: v["results"]["a"].update({"exact_match,none": math.nan}), "not a finite number"),
        (lambda v: v.update(results={"a": {"alias": "a"}}), "no task has a score"),
        (lambda v: v.update(configs={"a": None}), "configs.'a' is nothing"),
        (lambda v: v.update(versions=[1]), "versions is no object"),
        (lambda v: v.update(group_subtasks={"a": ["b"], "b": ["a"]}), "is a member of itself"),
        (lambda v: v["results"].update({"\x1b": {"exact_match,none": 1}}), "is no task's name"),
    ],
)
def test_damaged_stock_results_get_one_line(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    for name in ("teacher", "student"):
        values = stock_values()
        change(values)
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    with pytest.raises(EvalError) as caught:
        stock_report([tmp_path / "teacher.json", tmp_path / "student.json"])
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Name every place of a value: those of mappings, and the first one of lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, inside in entries:
        yield (*above, key)
        if isinstance(inside, dict | list):
            yield from places(inside, (*above, key))


@pytest.mark.parametrize("samples", [True, False])
def test_any_damage_of_stock_results_is_read_or_gets_one_line(
    tmp_path: Path, samples: bool
) -> None:
    whole = stock_values()
    whole |= {"versions": {"a": 1}, "n-shot": {"a": 0}, "group_subtasks": {"a": []}}
    whole |= {"config": {"model_dtype": "torch.float32", "batch_size": 8, "random_seed": 0}}
    whole["results"]["a"] |= {"exact_match_stderr,none": 0.1, "alias": "a"}
    whole["configs"]["a"]["generation_kwargs"] = {"until": ["x"]}
    if not samples:
        del whole["samples"]
    paths = [tmp_path / f"{name}.json" for name in ("teacher", "student")]
    paths[0].write_text(json.dumps(whole))
    missing = object()
    odd = [None, "text", [], [1], [[None]], {}, {"a": 1}, {"a": None}, {"a": [1]}]
    refused: list[str] = []
    for place in places(whole):
        for value in (missing, *odd, math.nan, -math.inf, -1, True, 10**400):
            changed = copy.deepcopy(whole)
            inside = functools.reduce(operator.getitem, place[:-1], changed)
            if value is missing:
                del inside[place[-1]]
            else:
                inside[place[-1]] = value
            paths[1].write_text(json.dumps(changed))
            try:
                stock_report(paths)
            except EvalError as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert all(line.isprintable() for line in refused)


def test_odd_samples_are_shown_and_obeyed_by_nobody(tmp_path: Path) -> None:
    odd = stock_values()
    odd["samples"]["a"][0] |= {"resps": 5, "filtered_resps": None, "arguments": "x"}
    odd["samples"]["a"][1] |= {"resps": [], "filtered_resps": [["-1.0", "True"]]}
    for name, values in (("teacher", stock_values()), ("student", odd)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    files = render(stock_report([tmp_path / "teacher.json", tmp_path / "student.json"]))
    for text in files.values():
        assert text.encode()
        assert "\x1b" not in text
    assert "<script>alert" not in files["report.html"]
    assert "<i>m</i>" not in files["report.html"]


def test_stock_results_of_other_items_are_refused(stock: Path, tmp_path: Path) -> None:
    teacher, student = (stock_file(stock, name) for name in ("teacher", "student"))
    shutil.copytree(student.parent, tmp_path / "other")
    (file,) = (tmp_path / "other").glob("samples_first_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["prompt_hash"] = "0"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(EvalError, match=r"first: item 3 of .* has another prompt"):
        stock_report([teacher, tmp_path / "other" / student.name])
    second = file.with_name("samples_first_2025-01-01T00-00-00.jsonl")
    shutil.copy(file, second)
    renamed = (tmp_path / "other" / student.name).rename(tmp_path / "other" / "mine.json")
    with pytest.raises(EvalError, match=r"has 2 samples files of first beside it; one is needed"):
        stock_report([teacher, renamed])
    with pytest.raises(EvalError, match="no such file"):
        stock_report([teacher, tmp_path / "none.json"])
    (tmp_path / "scores.json").write_text('{"tasks": []}')
    with pytest.raises(EvalError, match="has no configs and no results"):
        stock_report([teacher, tmp_path / "scores.json"])


def test_samples_are_written_as_jsonl(result: Any, tmp_path: Path) -> None:
    paths = write_samples(result, tmp_path / "samples")
    assert [path.name for path in paths] == ["first.jsonl", "second.jsonl", "choice.jsonl"]
    rows = [json.loads(line) for line in paths[0].read_text(encoding="utf-8").splitlines()]
    assert len(rows) == ITEMS
    assert sum(row["exact_match"] for row in rows) == 18


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ({"name": "frist"}, {}, "suite.tasks: unknown task 'frist'. Did you mean 'first'?"),
        (
            {"name": "first"},
            {"include": Path("nowhere")},
            "suite.include: nowhere is not a folder.",
        ),
        (
            {"name": "choice", "metric": "ac"},
            {},
            "choice.metric: the task has no 'ac'. Did you mean 'acc'?",
        ),
        (
            {"name": "first", "filter": "strict"},
            {},
            "first.filter: exact_match has no 'strict'. Allowed: none.",
        ),
        (
            {"name": "choice", "stop": ("x",)},
            {},
            "choice.stop: the task generates nothing, it compares probabilities. Leave it out.",
        ),
        (
            {"name": "first", "generation": {"top_p": 0.9}},
            {},
            "first.generation: the task is greedy, so top_p has no effect. Give a temperature",
        ),
        (
            {"name": "first", "max_gen_tokens": 64},
            {},
            "first.max_gen_tokens: 64 leaves no room for a prompt",
        ),
    ],
)
def test_bad_suites_get_one_line(
    folder: Path,
    model: Any,
    tokenizer: Any,
    task: dict[str, Any],
    change: dict[str, Any],
    message: str,
) -> None:
    suite = Suite(**({"include": folder, "tasks": (SuiteTask(**task),), "limit": 2} | change))
    with pytest.raises(EvalError) as caught:
        evaluate_model(model, tokenizer, suite, Session(batch_size=2))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(EvalError) as without_model:
        check_suite(suite, model.config, tokenizer)
    assert str(without_model.value) == str(caught.value)


def test_a_suite_is_checked_without_a_model_as_its_tasks_report(
    folder: Path, model: Any, tokenizer: Any, loaded: LoadedSuite, tmp_path: Path
) -> None:
    check_suite(loaded.suite, model.config, tokenizer)
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [first, second]\naggregate_metric_list:\n"
        "  - {metric: exact_match, aggregation: mean, weight_by_size: true}\n"
    )
    for name in ("first", "second"):
        text = (folder / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace("data/", f"{folder}/data/"))
    group = SuiteTask(name="both", metric="exact_match", multiturn=True)
    both = Suite(include=tmp_path, tasks=(group,), limit=2)
    check_suite(both, model.config, tokenizer)
    found = evaluate_model(model, tokenizer, both, Session(batch_size=4))
    assert found.groups == {"both": ["first", "second"]}
    write_samples(found, tmp_path / "samples")
    rows = list(folder_rows(tmp_path / "samples")(found.tasks[0]))
    assert tuple(row["exact_match"] for row in rows) == found.tasks[0].items
    assert [row["doc_id"] for row in rows] == [0, 1, 0, 1]
    wrong = Suite(include=tmp_path, tasks=(group.model_copy(update={"metric": "acc"}),))
    with pytest.raises(
        EvalError, match=r"both\.metric: the task has no 'acc'\. Allowed: exact_match\."
    ):
        check_suite(wrong, model.config, tokenizer)


def test_missing_data_and_unsafe_code_are_refused(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "lost.yaml").write_text(GENERATE.format(name="lost"))
    with pytest.raises(EvalError, match=r"data_files: data/lost\.jsonl is not in"):
        load_suite(Suite(include=tmp_path, tasks=(SuiteTask(name="lost"),)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "code.jsonl").write_text((folder / "data" / "first.jsonl").read_text())
    (tmp_path / "code.yaml").write_text(GENERATE.format(name="code") + "unsafe_code: true\n")
    suite = Suite(include=tmp_path, tasks=(SuiteTask(name="code"),))
    with pytest.raises(
        EvalError, match=r"code: runs code that a model wrote\. Allow it with --run"
    ):
        evaluate_model(model, tokenizer, suite, Session(batch_size=2))
    with pytest.raises(
        EvalError, match=r"code: runs code that a model wrote\. Allow it with --run"
    ):
        check_suite(suite, model.config, tokenizer)


def test_a_judged_task_stands_beside_the_others(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    turns = [[f"w{n} w{n + 1}", "w7 w8"] for n in range(3)]
    questions.write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    first = SuiteTask(name="first")
    both = (SuiteTask(name="mt_bench", domain="chat", max_gen_tokens=6), first)
    with judge_server(lambda body: "Score: 4") as (endpoint, asked):
        judge = Judge(endpoint=endpoint, model="j", questions=str(questions))
        suite = Suite(include=folder, tasks=both, judge=judge, limit=2)
        result = evaluate_model(model, tokenizer, suite, Session(batch_size=2))
        other = evaluate_model(tiny_model(9), tokenizer, suite, Session(batch_size=2))
        check_suite(suite, model.config, tokenizer)
    # One word before all answers, then two turns of two questions; the check asks nothing.
    assert len(asked) == 2 * (1 + 4)
    judged, plain = result.tasks
    assert (judged.task, judged.metric, judged.score) == ("mt_bench", "judge_score,none", 4.0)
    assert (judged.kind, judged.samples, judged.items) == ("generation", 2, (4.0, 4.0))
    assert judged.metrics["turn_2,none"] == 4.0
    assert plain.kind == "generation"
    # What the models said differs, and with it their second prompts; what they were asked does not.
    rows, others = result.samples["mt_bench"], other.samples["mt_bench"]
    assert rows[0]["resps"] != others[0]["resps"]
    require_same_requests({"teacher": result.requests_hash, "student": other.requests_hash})
    require_same_protocol({"teacher": result.protocol, "student": other.protocol})
    assert rows[1]["judgements"][0]["replies"] == ["Score: 4"]
    answer = rows[0]["resps"][0][0]
    assert answer == continuation(model, tokenizer, "User: w0 w1\n\nAssistant:", 6)

    skipped = evaluate_model(
        model, tokenizer, suite.model_copy(update={"judge": None}), Session(batch_size=2)
    )
    assert [task.task for task in skipped.tasks] == ["first"]
    assert skipped.warnings[-1].startswith("mt_bench is skipped: no judge is named")
    with pytest.raises(EvalError, match="mt_bench is the only task"):
        load_suite(Suite(tasks=both[:1]))
    own = (SuiteTask(name="mt_bench"), first)
    with pytest.raises(EvalError, match=r"mt_bench\.max_gen_tokens: 1024 leaves no room for a"):
        check_suite(suite.model_copy(update={"tasks": own}), model.config, tokenizer)


@pytest.mark.parametrize(
    ("entry", "scores", "picked"),
    [
        ({}, {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6}, ("acc", "none")),
        ({"metric": "acc_norm"}, {"acc,none": 0.5, "acc_norm,none": 0.6}, ("acc_norm", "none")),
        ({}, {"odd,none": 0.5}, ("odd", "none")),
        ({}, {"exact_match,strict": 0.1, "exact_match,flexible": 0.2}, ("exact_match", "strict")),
        (
            {"filter": "flexible"},
            {"exact_match,strict": 0.1, "exact_match,flexible": 0.2},
            ("exact_match", "flexible"),
        ),
    ],
)
def test_the_rule_that_picks_the_score(
    entry: dict[str, str], scores: dict[str, float], picked: tuple[str, str]
) -> None:
    assert (
        pick_metric(SuiteTask(name="t", **entry), {"name": "t", "sample_len": 3} | scores) == picked
    )


def test_all_scores_are_kept_and_nothing_else() -> None:
    scores = {
        "name": "t",
        "sample_len": 3,
        "acc_norm,none": np.float32(0.5),
        "acc,none": 0.25,
        "acc_stderr,none": 0.1,
        "word_perplexity,none": float("nan"),
        "f1,none": "N/A",
    }
    assert list(all_metrics(scores).items()) == [("acc,none", 0.25), ("acc_norm,none", 0.5)]


def test_several_unknown_metrics_need_a_name() -> None:
    with pytest.raises(EvalError, match=r"t\.metric: not named, and the task has odd, odder"):
        pick_metric(SuiteTask(name="t"), {"odd,none": 1.0, "odder,none": 1.0})


class TwoRanks(OneRank):
    """Rank 0 of two; the other one, a model of its own, computes when it gets its share."""

    count = 2

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from xlstm_eval.answering.language_model import BatchModel

        self.other, self.made = BatchModel(model, tokenizer, []), 0

    def scatter(self, values: Any) -> Any:
        self.share = values[1] or []
        self.made += len(self.share)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        return [value, [self.other.compute(batch) for batch in self.share]]


@pytest.fixture(scope="module")
def everything(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedSuite:
    """Load tasks of every kind: greedy, drawn at random three times, choices, whole texts."""
    root = tmp_path_factory.mktemp("everything")
    greedy = (folder / "first.yaml").read_text().replace("data/", f"{folder}/data/")
    drawn = greedy.replace("task: first", "task: drawn").replace(
        "do_sample: false}", "do_sample: true, temperature: 0.9, top_k: 20}\nrepeats: 3"
    )
    choice = CHOICE.replace("data/", f"{folder}/data/")
    texts = choice.partition("metric_list")[0].replace("task: choice", "task: texts")
    texts = texts.replace("multiple_choice", "loglikelihood_rolling")
    texts = texts.replace("doc_to_target: answer\ndoc_to_choice: choices\n", "")
    texts = texts.replace("doc_to_text: question", 'doc_to_text: ""\ndoc_to_target: question')
    texts += "metric_list:\n  - {metric: word_perplexity}\n"
    for name, text in (("first", greedy), ("drawn", drawn), ("choice", choice), ("texts", texts)):
        (root / f"{name}.yaml").write_text(text)
    tasks = tuple(SuiteTask(name=name) for name in ("first", "drawn", "choice", "texts"))
    return load_suite(Suite(include=root, tasks=tasks))


class Interrupted(BaseException):
    """Stands for a kill in the middle of an evaluation."""


def test_one_rank_two_ranks_and_an_interrupted_evaluation_give_the_same_bits(
    model: Any, tokenizer: Any, everything: LoadedSuite, tmp_path: Path
) -> None:
    whole = evaluate_model(model, tokenizer, everything, Session(batch_size=7))
    ranks = TwoRanks(tiny_model(0), tokenizer)
    shared = evaluate_model(model, tokenizer, everything, Session(batch_size=7, ranks=ranks))
    assert ranks.made > 3
    beside = Session(batch_size=7, processes=2 if sys.platform == "linux" else 1)
    forked = evaluate_model(model, tokenizer, everything, beside)
    first: list[Tally] = []

    def die(tally: Tally) -> None:
        first.append(tally)
        if tally.done > 60:
            raise Interrupted

    kept = Session(batch_size=7, journal=tmp_path, identity="m", progress=die)
    with pytest.raises(Interrupted):
        evaluate_model(model, tokenizer, everything, kept)
    seen: list[Tally] = []
    on = dataclasses.replace(kept, progress=seen.append)
    resumed = evaluate_model(model, tokenizer, everything, on)
    assert seen[-1].kept == first[-1].done > 60
    assert seen[-1].done == seen[-1].total
    for other in (shared, forked, resumed):
        assert other.samples == whole.samples
        assert other.tasks == whole.tasks
        assert other.requests_hash == whole.requests_hash
    answers = [tuple(row["resps"][0]) for row in whole.samples["drawn"]]
    assert all(len(given) == 3 for given in answers)
    assert len({text for given in answers for text in given}) > len(answers)
    assert whole.protocol["batch"] == {
        "generate_until-single-turn": 7,
        "loglikelihood-single-turn": 7,
        "loglikelihood_rolling-single-turn": 7,
    }


def test_drawn_answers_depend_on_the_question_alone(
    model: Any, tokenizer: Any, everything: LoadedSuite
) -> None:
    (entry,) = (task for task in everything.suite.tasks if task.name == "drawn")
    alone = Suite(include=everything.suite.include, tasks=(entry,), limit=5)
    found = evaluate_model(model, tokenizer, alone, Session(batch_size=3))
    # Rows that are done leave a batch of this size.
    several = evaluate_model(model, tokenizer, everything, Session(batch_size=24))
    for row, other in zip(found.samples["drawn"], several.samples["drawn"], strict=False):
        assert row["resps"] == other["resps"]
    other_seed = evaluate_model(model, tokenizer, alone, Session(batch_size=3), seed=1)
    assert other_seed.samples["drawn"] != found.samples["drawn"]


def test_settings_that_count_from_the_start_keep_rows_together(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every second token ends an answer, but not among its first three.
    ends = list(range(0, model.config.vocab_size, 2))
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    rows, budget = 20, 9
    ids = torch.arange(rows)[:, None] % 7 + torch.tensor([[3, 5, 4]])
    random = row_draws(range(rows), budget, ids.device)

    def answers(chosen: slice) -> list[list[int]]:
        own = ids[chosen]
        prompts = Prompts(own, torch.ones_like(own), budget, [], random[chosen], None)
        found = generate_rows(model, tokenizer, prompts, {"min_new_tokens": 3})
        cut = [next((at for at, t in enumerate(row) if t in ends), budget) for row in found]
        return [row[: at + 1] for row, at in zip(found, cut, strict=True)]

    together = answers(slice(None))
    assert {len(row) for row in together} > {4, 5}
    assert together == [*answers(slice(0, 8)), *answers(slice(8, 16)), *answers(slice(16, 20))]


def test_a_batch_that_does_not_fit_is_halved_and_said(
    model: Any, tokenizer: Any, loaded: LoadedSuite
) -> None:
    from xlstm_eval.answering.batches import Measured, form_batches, make_questions
    from xlstm_eval.answering.language_model import BatchModel

    class SmallMemory(BatchModel):
        most = 3

        def answer_at_once(self, batch: Any) -> list[Any]:
            if len(batch.questions) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().answer_at_once(batch)

    pairs = [(f"w{n} w{n + 1}", " w3 w4") for n in range(8)]
    questions = make_questions("loglikelihood", pairs)
    (batch,) = form_batches([Measured(q, 2, 2) for q in questions], 8)
    small = SmallMemory(model, tokenizer, [])
    halved, whole = small.compute(batch), BatchModel(model, tokenizer, []).compute(batch)
    assert (halved.pieces, whole.pieces) == (4, 1)
    for (value, greedy), (expected, same) in zip(halved.answers, whole.answers, strict=True):
        assert value == pytest.approx(expected, abs=1e-5)
        assert greedy == same
    small.most = 0
    with pytest.raises(EvalError, match=r"evaluate\.batch: one request of 4 tokens does not fit"):
        small.compute(batch)
