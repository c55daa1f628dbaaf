"""The stage evaluate: the check before any training, and the gates of held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judge_server import judge_server

from xlstm_distill.artifacts import Artifact, Run
from xlstm_distill.data.packing import PackedRow
from xlstm_distill.data.rows import load_batch
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.models.gates import GateMeter
from xlstm_distill.models.student import convert
from xlstm_distill.recipe import MixerConfig, load_recipe
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages import evaluate
from xlstm_distill.stages.choices import choose
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.workbench import Bar
from xlstm_eval.answering import scoring
from xlstm_eval.answering.coordinator import Tally
from xlstm_eval.answering.decoding import Prompts, generate_rows
from xlstm_eval.answering.scoring import Pair, score_pairs
from xlstm_eval.protocol import flat
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


@pytest.mark.parametrize("kept", [{}, {"heads": {1: [0]}}, {"layers": [0]}])
def test_gates_are_measured_in_parts_and_equal_those_of_all_rows_at_once(
    tiny_teacher, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "GATE_TOKENS", 4 * Rows.context)
    mixer = MixerConfig.model_validate({"window": 4, "sinks": 2, "attention": kept or None})
    student = convert(tiny_teacher(), mixer).eval()
    for _, parameter in student.new_parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.manual_seed(0))
    domains = {"math": Rows(0), "code": Rows(1)}
    seen: list[int] = []
    with student.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True
    ):
        found = evaluate.mean_gates(student, domains, torch.device("cpu"))
    assert seen == [4, 2]
    batch = load_batch(domains, [(name, row) for name in domains for row in range(3)])
    with torch.no_grad(), GateMeter(student) as meter:
        meter.expect(batch.real)
        student.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segment_ids=batch.segment_ids,
        )
    means, expected = np.array(found, dtype=float), np.array(meter.means(), dtype=float)
    assert means.shape == (2, 4)
    assert np.isnan(means).any() == bool(kept)
    assert np.allclose(means, expected, rtol=0, atol=2e-6, equal_nan=True)


def test_rows_that_are_done_leave_the_batch_and_answers_stay(tiny_teacher) -> None:
    teacher = tiny_teacher()
    student = convert(teacher, MixerConfig(window=4, sinks=2)).eval()
    for _, parameter in student.new_parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.manual_seed(0))
    # Answers end at any of these, and so at different lengths.
    ends = [*range(3, 20)]
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 12, (24,), generator=draw)
    ids = torch.randint(20, 97, (24, 12), generator=draw)
    mask = (torch.arange(12) >= 12 - lengths[:, None]).long()

    class Plain:
        pad_token_id = 0

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            return ["" for _ in rows]

    for model in (teacher, student):
        model.generation_config.eos_token_id = ends
        rows: list[int] = []
        with (
            torch.no_grad(),
            model.model.register_forward_pre_hook(
                lambda _, __, given, rows=rows: rows.append(len(given["input_ids"])),
                with_kwargs=True,
            ),
        ):
            asked = Prompts(ids, mask, 30, (), None, None)
            found = generate_rows(model, Plain(), asked, {"do_sample": False})
            shrinking = list(rows)
            for row in range(24):
                alone = Prompts(ids[row : row + 1], mask[row : row + 1], 30, (), None, None)
                (expected,) = generate_rows(model, Plain(), alone, {"do_sample": False})
                while found[row][-1] == 0:
                    found[row].pop()
                assert found[row] == expected
        assert shrinking == sorted(shrinking, reverse=True)
        assert shrinking[0] == 24
        assert len(set(shrinking)) > 2
        assert len({len(row) for row in found}) > 3


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
            "{name: qs_math_add, max_gen_tokens: 384}",
            "qs_math_add.max_gen_tokens: 384 leaves no room for a prompt",
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


@pytest.mark.parametrize(
    ("branches", "at_once"),
    [(("mlstm", "window"), 2048), (("mlstm", "window"), 2), (("window",), 2)],
)
def test_a_student_scores_continuations_from_copies_of_its_cache_as_in_one_pass(
    tiny_teacher, monkeypatch: pytest.MonkeyPatch, branches: tuple[str, ...], at_once: int
) -> None:
    monkeypatch.setattr(scoring, "READ_AT_ONCE", at_once)
    student = convert(tiny_teacher(), MixerConfig(window=4, sinks=2, branches=branches)).eval()
    for _, parameter in student.new_parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.manual_seed(0))
    random = torch.Generator().manual_seed(1)
    pairs = []
    # Contexts of other lengths than the window's, and continuations of one token and of more.
    for length, answers in ((3, (1, 4, 2)), (17, (1, 1)), (30, (7,)), (1, (2, 1))):
        context = tuple(torch.randint(3, 97, (length,), generator=random).tolist())
        for tokens in answers:
            answer = torch.randint(3, 97, (tokens,), generator=random).tolist()
            pairs.append(Pair(context, tuple(answer)))
    for model in (student, tiny_teacher()):
        widths: list[int] = []

        def note(_: Any, __: Any, logits: torch.Tensor, seen: list[int] = widths) -> None:
            seen.append(logits.shape[1])

        model.get_output_embeddings().register_forward_hook(note)
        score_pairs(model, pairs, 0)
        # Logits of as many tokens at a time as may be read at once.
        assert max(widths) == min(6, at_once)
        for pair, (value, greedy) in zip(pairs, score_pairs(model, pairs, 0), strict=True):
            ids = torch.tensor([pair.context + pair.continuation])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            asked = logits[0, len(pair.context) - 1 : -1].log_softmax(-1)
            wanted = torch.tensor(pair.continuation)
            assert value == pytest.approx(float(asked.gather(1, wanted[:, None]).sum()), abs=2e-5)
            assert greedy == bool((asked.argmax(-1) == wanted).all())


def test_a_model_is_chosen_by_name_or_by_the_index_of_an_array_task(
    root: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(root / "recipes" / "quickstart.yaml")
    models = Lineage(recipe).evaluated_models()
    words = ("--model", "the recipe's models")
    assert choose(models, "code", *words) == ["code"]
    assert choose(models, "0", *words) == ["teacher"]
    assert choose(models, None, *words) == models
    with pytest.raises(UserError) as caught:
        choose(models, "6", *words)
    assert str(caught.value) == (
        "--model: '6' is not in the recipe's models; it has teacher, merged, math, code, stem, "
        "chat (or by index: 0 to 5)."
    )


def test_missing_evaluations_are_named_in_one_line(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe(root / "recipes" / "quickstart.yaml")
    run, lineage = Run.open(tmp_path, recipe), Lineage(recipe)
    for label in ("merge", *(f"distill/{name}" for name in recipe.distill.experts)):
        run.make(lineage.request(label), lambda draft: None)
    run.make(lineage.request("evaluate/code"), lambda draft: None)
    with pytest.raises(RunError) as caught:
        evaluate.find_evaluations(lineage, run)
    assert "evaluations of teacher, merged, math, stem, chat are not there yet" in str(caught.value)


def test_another_judge_makes_no_answer_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge is added, then changed; a run that had the last one from the start gives the same."""
    asks = '{"turns": ["1 + 2", "3 + 4"]}\n{"turns": ["5 + 6", "7 + 8"]}\n'
    (tmp_path / "questions.jsonl").write_text(asks)
    loads: list[object] = []
    load = evaluate.load_teacher
    monkeypatch.setattr(
        evaluate, "load_teacher", lambda *given: loads.append(given) or load(*given)
    )

    def evaluated(folder: str, judge: str | None, endpoint: str) -> Artifact:
        named = {"endpoint": endpoint, "model": judge, "questions": f"{tmp_path}/questions.jsonl"}
        sets = [
            "evaluate.tasks=[{name: mt_bench, max_gen_tokens: 3}, {name: qs_math_add}]",
            f"evaluate.judge={json.dumps(named if judge else None)}",
            "evaluate.limit=2",
            "evaluate.speed.seconds=0",
        ]
        recipe = load_recipe(root / "recipes" / "quickstart.yaml", sets)
        run = Run.open(tmp_path / folder, recipe)
        return evaluate.evaluate(Lineage(recipe), run, QuietConsole(), "teacher")[0]

    scores = {"j": "Score: 4", "k": "Score: 7"}
    with judge_server(lambda body: scores[body["model"]]) as (endpoint, asked):
        plain = evaluated("run", None, endpoint)
        before = (plain.path / "samples" / "qs_math_add.jsonl").read_bytes()
        added = evaluated("run", "j", endpoint)
        # One word, and two turns of two questions. Their answers alone were made.
        assert (len(asked), len(loads)) == (5, 2)
        changed = evaluated("run", "k", endpoint)
        assert (len(asked), len(loads)) == (10, 2)
        fresh = evaluated("other", "k", endpoint)
        assert (len(asked), len(loads)) == (15, 3)
    assert changed.read_json("results.json")[0]["score"] == 7.0
    assert (changed.path / "samples" / "qs_math_add.jsonl").read_bytes() == before
    for name in ("results.json", "items.json", "samples/mt_bench.jsonl"):
        assert (changed.path / name).read_bytes() == (fresh.path / name).read_bytes()
    found, wanted = changed.manifest["results"], fresh.manifest["results"]
    for key in ("requests_hash", "settings_hash", "warnings", "mean_score"):
        assert found[key] == wanted[key]
    assert flat(found["protocol"]) == flat(wanted["protocol"])
    assert found["protocol"]["tokens"] == wanted["protocol"]["tokens"]
    assert changed.manifest["wall_seconds"] >= added.manifest["wall_seconds"]


def test_a_bar_counts_what_this_run_answers_and_not_what_it_found() -> None:
    console = QuietConsole()
    with console.progress("evaluate/teacher", None, unit="requests") as progress:
        bar = Bar(progress)
        for done in (40, 50, 100):
            bar(Tally(done=done, total=100, kept=40, tokens=(done - 40) * 7))
    (line,) = console.lines
    assert line.startswith("evaluate/teacher: 100 of 100 requests (100%), ")
    assert "tokens/s" in line
