"""Batches, journal, sizes and the coordinator, with answers that no model makes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from xlstm_eval.answering.batches import (
    Batch,
    Measured,
    deal,
    form_batches,
    halves,
    make_questions,
)
from xlstm_eval.answering.coordinator import Coordinator, OneRank, Tally
from xlstm_eval.answering.journal import Answered, Journal
from xlstm_eval.answering.processes import TOKENS_AT_ONCE, answer_side_by_side, side_by_side
from xlstm_eval.answering.sizes import MOST_ROWS, BatchSizes, largest_that_fits
from xlstm_eval.records import EvalError

GREEDY = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
SAMPLED = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.8}


def choices(count: int) -> list[Measured]:
    """Questions of four continuations each; those of every third are one token long."""
    found = []
    for item in range(count):
        context = "word " * (item % 7 + 1) + str(item)
        pairs = [(context, f" answer {choice}") for choice in range(4)]
        answer = 1 if item % 3 == 0 else 5
        found += [Measured(q, len(context), answer) for q in make_questions("loglikelihood", pairs)]
    return found


def generations(count: int, settings: dict[str, Any] = GREEDY) -> list[Measured]:
    prompts = [("x" * (item * 7 % 31 + 1) + str(item), settings) for item in range(count)]
    return [Measured(q, len(q.arguments[0]), 8) for q in make_questions("generate_until", prompts)]


def keys(batches: list[Batch]) -> list[str]:
    return [batch.key for batch in batches]


def test_batches_depend_on_the_questions_and_the_rows_alone() -> None:
    questions = [*generations(50), *generations(20, SAMPLED), *choices(40)]
    batches = form_batches(questions, 16)
    shuffled = random.Random(0).sample(choices(40), k=160)
    again = form_batches([*generations(20, SAMPLED), *shuffled, *generations(50)], 16)
    assert sorted(keys(again)) == sorted(keys(batches))
    asked = [q.key for batch in batches for q in batch.questions]
    assert sorted(asked) == sorted(entry.question.key for entry in questions)
    for batch in batches:
        assert batch.rows <= 16
        assert len({json.dumps(q.arguments[1:]) for q in batch.questions}) == 1 or (
            batch.kind == "loglikelihood"
        )
    assert keys(form_batches(questions, 8)) != keys(batches)


def test_continuations_of_a_context_stay_together_and_those_of_one_token_need_no_row() -> None:
    batches = form_batches(choices(40), 16)
    homes: dict[str, set[str]] = {}
    for batch in batches:
        for question in batch.questions:
            homes.setdefault(question.arguments[0], set()).add(batch.key)
    assert all(len(home) == 1 for home in homes.values())
    # 13 or 14 items of one row, the others of four.
    assert sum(batch.rows for batch in batches) == 14 + 26 * 4
    wide = form_batches(choices(2)[4:], 2)
    assert [(len(batch.questions), batch.rows) for batch in wide] == [(4, 4)]


def test_ranks_get_every_batch_once_and_about_the_same_cost() -> None:
    batches = form_batches(generations(200), 4)
    shares = deal(batches, 3)
    assert sorted(key for share in shares for key in keys(share)) == sorted(keys(batches))
    costs = [sum(batch.cost for batch in share) for share in shares]
    assert max(costs) - min(costs) <= max(batch.cost for batch in batches)
    assert deal(batches, 1)[0] == sorted(batches, key=lambda batch: -batch.cost)


def test_equal_requests_are_one_question_unless_their_answers_are_drawn() -> None:
    greedy = make_questions("generate_until", [("a", GREEDY)] * 3)
    assert len({question.key for question in greedy}) == 1
    drawn = make_questions("generate_until", [("a", SAMPLED), ("b", SAMPLED), ("a", SAMPLED)])
    assert [question.repeat for question in drawn] == [0, 0, 1]
    assert len({question.seed for question in drawn}) == 3
    other = make_questions("generate_until", [("a", SAMPLED)], seed=1)
    assert other[0].seed not in {question.seed for question in drawn}


def entry(batch: str, answers: list[Any]) -> Answered:
    return Answered(batch, answers, tokens=5, seconds=0.5, warnings=["cut"])


def read_back(folder: Path, identity: str = "me") -> dict[str, Answered]:
    journal = Journal(folder, identity)
    journal.read()
    return journal.answered


def test_the_journal_gives_back_whole_lines_of_its_own_evaluation_alone(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, "me"), Journal(tmp_path, "me", rank=1)
    first.add(entry("a", ["\ud800 text\n", -1e-300]))
    first.add(entry("b", [[-0.1, True]]))
    second.add(entry("c", [float("-inf")]))
    Journal(tmp_path, "another model").add(entry("d", ["wrong"]))
    assert read_back(tmp_path) == {
        "a": entry("a", ["\ud800 text\n", -1e-300]),
        "b": entry("b", [[-0.1, True]]),
        "c": entry("c", [float("-inf")]),
    }
    file = next(tmp_path.glob("answers-0-*.jsonl"), None)
    assert file is not None
    mine = next(f for f in tmp_path.glob("answers-0-*.jsonl") if b'"a"' in f.read_bytes())
    lines = mine.read_bytes().splitlines(keepends=True)
    # A killed process tears the last line; a lost block damages one in the middle.
    mine.write_bytes(b"".join(lines) + lines[-1][:20])
    assert set(read_back(tmp_path)) == {"a", "b", "c"}
    mine.write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])
    assert set(read_back(tmp_path)) == {"b", "c"}
    mine.write_bytes(lines[0][:10])
    assert set(read_back(tmp_path)) == {"c"}


def test_a_torn_line_is_read_once_its_end_is_there(tmp_path: Path) -> None:
    writer, reader = Journal(tmp_path, "me"), Journal(tmp_path, "me")
    writer.add(entry("a", ["1"]))
    writer.add(entry("b", ["2"]))
    writer.close()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for end in range(len(whole) + 1):
        file.write_bytes(whole[:end])
        reader.read()
    assert reader.answered == {"a": entry("a", ["1"]), "b": entry("b", ["2"])}


def test_the_first_found_size_counts_for_all_and_a_given_one_for_itself(tmp_path: Path) -> None:
    assert BatchSizes(None, tmp_path / "s").rows("generate_until", False, lambda: 24) == 24
    later = BatchSizes(None, tmp_path / "s")
    assert later.rows("generate_until", False, lambda: 99) == 24
    assert later.rows("loglikelihood", False, lambda: 99) == 99
    assert later.used == {"generate_until-single-turn": 24, "loglikelihood-single-turn": 99}
    assert BatchSizes(7, tmp_path / "s").rows("generate_until", False, lambda: 99) == 7
    assert not [path for path in (tmp_path / "s").iterdir() if path.name.startswith(".")]
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= 40

    assert largest_that_fits(fits) == 32
    assert tried[0] == MOST_ROWS
    assert largest_that_fits(lambda rows: False) == 1


def test_each_call_of_lm_eval_finds_and_keeps_its_own_size(tmp_path: Path) -> None:
    def ask_both(sizes: BatchSizes, short: int, long: int) -> tuple[int, int]:
        """Ask in lm-eval's order: the short prompts of the single-turn call come first."""
        single = sizes.rows("generate_until", False, lambda: short)
        return single, sizes.rows("generate_until", True, lambda: long)

    assert ask_both(BatchSizes(None, tmp_path / "s"), 256, 8) == (256, 8)
    # Another model, or the same one after a kill between the two calls.
    assert ask_both(BatchSizes(None, tmp_path / "s"), 99, 99) == (256, 8)
    assert ask_both(BatchSizes(7, tmp_path / "s"), 256, 8) == (7, 7)
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "generate_until.json").write_text('{"rows": 16}')
    assert ask_both(BatchSizes(None, earlier), 256, 8) == (16, 16)


class Killed(BaseException):
    """Stands for SIGKILL: nothing runs after it."""


class Counting:
    """Answers with the prompt reversed; dies after some batches."""

    def __init__(self, die_after: int | None = None) -> None:
        self.computed: list[str] = []
        self.die_after = die_after

    def __call__(self, batch: Batch) -> Answered:
        if len(self.computed) == self.die_after:
            raise Killed
        self.computed.append(batch.key)
        answers = [question.arguments[0][::-1] for question in batch.questions]
        return Answered(batch.key, answers, tokens=len(answers), seconds=0.0)


class TwoRanks(OneRank):
    """Rank 0 of two; the other one computes when it gets its share."""

    count = 2

    def __init__(self, other: Counting) -> None:
        self.other, self.made = other, []

    def scatter(self, values: Any) -> Any:
        self.made = [self.other(batch) for batch in values[1] or ()]
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        return [value, self.made]


def ask(
    coordinator: Coordinator, measured: list[Measured], rows: int = 4
) -> tuple[list[str], list[Batch]]:
    batches = form_batches(measured, rows)
    # Every question twice: requests may be equal.
    questions = [entry.question for entry in measured] * 2
    return coordinator.answer(questions, batches), batches


def test_what_is_in_the_journal_is_not_asked_again(tmp_path: Path) -> None:
    measured = generations(30)
    expected = [entry.question.arguments[0][::-1] for entry in measured] * 2
    with pytest.raises(Killed):
        ask(Coordinator(Counting(die_after=3), Journal(tmp_path, "me"), OneRank()), measured)
    seen: list[Tally] = []
    own, other = Counting(), Counting()
    coordinator = Coordinator(
        own, Journal(tmp_path, "me"), TwoRanks(other), seen.append, count=lambda: 60
    )
    answers, batches = ask(coordinator, measured)
    assert answers == expected
    assert len(batches) == 8
    assert len(own.computed) + len(other.computed) == 5
    assert own.computed
    assert other.computed
    assert (seen[0].done, seen[0].kept, seen[0].total) == (24, 24, 60)
    assert (seen[-1].done, seen[-1].kept, seen[-1].tokens) == (60, 24, 18)
    assert len(coordinator.results()) == 8
    # Another size makes other batches: their answers may differ in the last digits.
    fresh = Counting()
    ask(Coordinator(fresh, Journal(tmp_path, "me"), OneRank()), measured, rows=5)
    assert len(fresh.computed) == 6


def test_halves_hold_all_questions_in_order() -> None:
    (batch,) = form_batches(generations(5), 8)
    first, second = halves(batch)
    assert first.questions + second.questions == batch.questions
    assert len(first.questions) == 3


forks = pytest.mark.skipif(sys.platform != "linux", reason="only Linux answers in forks")


@forks
def test_processes_beside_each_other_answer_what_one_answers(tmp_path: Path) -> None:
    measured, own = generations(30), Counting()
    coordinator = Coordinator(own, Journal(tmp_path, "me"), OneRank(), processes=2)
    answers, batches = ask(coordinator, measured)
    assert answers == [entry.question.arguments[0][::-1] for entry in measured] * 2
    assert own.computed == []  # not in this process
    assert set(read_back(tmp_path)) == set(keys(batches))
    assert multiprocessing.active_children() == []
    # Batches that are too large to be held side by side are answered one by one.
    large = [Batch(b.kind, b.questions, b.rows, TOKENS_AT_ONCE) for b in batches]
    assert len(list(answer_side_by_side(own, large, 2))) == len(own.computed) == len(batches)


@forks
def test_a_killed_process_is_named_and_a_stop_waits_for_none() -> None:
    parent = os.getpid()

    def die(item: int) -> int:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(EvalError, match=r"one of 2 processes that answered was killed; the memory"):
        list(side_by_side(die, [1, 2, 3], 2))

    def wait(item: int) -> int:
        time.sleep(item)
        return item

    began = time.monotonic()
    found = side_by_side(wait, [0, 600, 600], 2)
    assert next(found) == 0
    found.close()
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []
    with pytest.raises(EvalError, match="its own"):
        list(side_by_side(refuse, [1, 2], 2))


@forks
def test_errors_that_cannot_be_sent_and_missing_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="TwoParts: the cause, 3"):
        list(side_by_side(raise_two_parts, [1, 2], 2))

    fork, forked = os.fork, []

    def once() -> int:
        if forked:
            raise BlockingIOError("no more processes")
        forked.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", once)
    # One was begun: it ends, and the items are computed here.
    assert list(side_by_side(lambda item: (item, os.getpid()), [1, 2, 3], 2)) == [
        (item, os.getpid()) for item in (1, 2, 3)
    ]
    assert forked
    assert multiprocessing.active_children() == []

    def no_semaphores(*given: Any) -> None:
        raise FileNotFoundError("/dev/shm")

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", no_semaphores)
    assert list(side_by_side(abs, [-1, 2], 2)) == [1, 2]


class TwoParts(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, words: str, number: int) -> None:
        super().__init__(f"{words}, {number}")


def raise_two_parts(item: int) -> int:
    raise TwoParts("the cause", 3)


def refuse(item: int) -> int:
    raise EvalError("its own error arrives")
