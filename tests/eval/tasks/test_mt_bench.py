"""MT-Bench and its judge, against a server on this machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from judge_server import judge_server

from xlstm_eval.records import EvalError
from xlstm_eval.suites import Judge, SuiteTask
from xlstm_eval.tasks import judge
from xlstm_eval.tasks.judge import CALL_ATTEMPTS, PARSE_ATTEMPTS, JudgeClient, parse_score
from xlstm_eval.tasks.mt_bench import MTBench, Question, judge_messages, load_questions

KEY = "sk-not-to-be-written"
ASKED = [{"role": "user", "content": "Grade this."}]
QUESTIONS = (
    Question(turns=("Write a poem.", "Make it shorter."), category="writing"),
    Question(turns=("2 + 2?", "And times 3?"), category="math", reference=("4", "12")),
)


def judge_at(endpoint: str, **settings: Any) -> Judge:
    return Judge(endpoint=endpoint, model="judge-1", questions="unused", **settings)


class Naps(list[float]):
    """Takes the place of waiting, and notes for how long."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good.\nScore: 7", 7),
        ("**Score: 8**", 8),
        ("score: 8.5/10.", 8.5),
        ("Score: 2\nOn reflection:\nScore: 6", 6),
        ("<think>Score: 3</think>Right.\nScore: 10", 10),
        ("Score: 11", None),
        ("Score: 0", None),
        ("Score: -5", None),
        ("I would score this 5 overall.", None),
        ("", None),
    ],
)
def test_the_score_of_a_reply(reply: str, score: float | None) -> None:
    assert parse_score(reply) == score


def test_a_judgement_has_all_that_was_said_and_the_key_goes_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with judge_server(lambda body: "Fine.\nScore: 7") as (endpoint, asked):
        settings = judge_at(endpoint, api_key_env="MY_KEY", settings={"top_p": 0.5, "seed": None})
        client = JudgeClient(settings, seed=3, folder=tmp_path)
        found = client.judge(ASKED)
        # Interrupted and begun again: what is judged is not asked a second time.
        again = JudgeClient(settings, seed=3, folder=tmp_path).judge(ASKED)
        other = JudgeClient(settings, seed=4, folder=tmp_path).judge(ASKED)
    assert (found.judge, found.score, found.replies) == ("judge-1", 7.0, ["Fine.\nScore: 7"])
    assert again == found
    assert other.seeds == [4]
    assert len(asked) == 2
    assert asked[0]["path"] == "/v1/chat/completions"
    assert asked[0]["authorization"] == f"Bearer {KEY}"
    assert (asked[0]["model"], asked[0]["messages"], asked[0]["top_p"]) == ("judge-1", ASKED, 0.5)
    assert "seed" not in asked[0]
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "Fine." in written
    assert KEY not in written


def test_a_reply_without_a_score_is_asked_for_again() -> None:
    replies = iter(["Hm.", "I cannot say.", "Score: 3"])
    with judge_server(lambda body: next(replies)) as (endpoint, asked):
        found = JudgeClient(judge_at(endpoint), seed=10).judge(ASKED)
    assert (found.score, list(found.seeds)) == (3.0, [10, 11, 12])
    assert list(found.replies) == ["Hm.", "I cannot say.", "Score: 3"]
    assert [len(body["messages"]) for body in asked] == [1, 3, 5]
    assert "'Score: N'" in asked[1]["messages"][-1]["content"]


def test_a_judge_that_never_scores_is_named() -> None:
    with (
        judge_server(lambda body: "No.") as (endpoint, asked),
        pytest.raises(EvalError, match=r"judge: judge-1 gave no score in 4 replies.*'No\.'"),
    ):
        JudgeClient(judge_at(endpoint), seed=0).judge(ASKED)
    assert len(asked) == PARSE_ATTEMPTS


def test_a_busy_server_is_asked_again_after_what_it_says() -> None:
    answers = iter(
        [
            (429, {"Retry-After": "7"}, "slow down"),
            (503, {}, "starting"),
            (200, {}, "no JSON"),
            (200, {"Content-Length": "99"}, "cut off"),
        ]
    )
    naps = Naps()
    with judge_server(lambda body: next(answers, "Score: 5")) as (endpoint, _):
        client = JudgeClient(judge_at(endpoint), seed=0, sleep=naps)
        assert client.judge(ASKED).score == 5
    assert naps == [7.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("answer", "message", "calls"),
    [
        ((401, {}, f"wrong key {KEY}"), r"answers 401 Unauthorized: wrong key \*\*\*", 1),
        ((404, {}, "no such model"), "answers 404 Not Found: no such model", 1),
        # Followed, the key would go to another server.
        ((302, {"Location": "http://127.0.0.1:9/"}, ""), "answers 302 Found", 1),
        ((500, {}, "broken"), "answers 500 Internal Server Error: broken", CALL_ATTEMPTS),
        ((200, {}, '{"error": "none"}'), "answered without choices", 1),
    ],
)
def test_what_a_server_refuses_is_said_in_a_line_without_the_key(
    monkeypatch: pytest.MonkeyPatch, answer: Any, message: str, calls: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        judge_server(lambda body: answer) as (endpoint, asked),
        pytest.raises(EvalError, match=message) as caught,
    ):
        JudgeClient(judge_at(endpoint), seed=0, sleep=Naps()).check()
    assert len(asked) == calls
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_endpoint_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    client = JudgeClient(judge_at("http://127.0.0.1:9/v1"), seed=0, sleep=Naps())
    with pytest.raises(
        EvalError, match=r"cannot be reached.*OPENAI_API_KEY, for an API key, is not"
    ):
        client.check()


def test_a_silent_server_is_named_at_the_first_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "CHECK_SECONDS", 0.2)
    naps = Naps()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, reads nothing
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        client = JudgeClient(judge_at(endpoint), seed=0, sleep=naps)
        with pytest.raises(EvalError, match=r"has not replied to one word in 0\.2 s"):
            client.check()
    assert not naps


def test_two_turns_are_asked_and_judged() -> None:
    prompts: list[tuple[str, dict[str, Any]]] = []

    def generate(asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        prompts.extend(asked)
        return [f" answer {len(prompts)}.{n} " for n in range(len(asked))]

    bench = MTBench(SuiteTask(name="mt_bench", max_gen_tokens=64), QUESTIONS, None)
    answers = bench.answer(generate)
    assert answers == [("answer 2.0", "answer 4.0"), ("answer 2.1", "answer 4.1")]
    assert prompts[3][0] == (
        "User: 2 + 2?\n\nAssistant: answer 2.1\n\nUser: And times 3?\n\nAssistant:"
    )
    # The original's temperatures: writing is drawn, mathematics is not.
    assert prompts[0][1]["temperature"] == 0.7
    assert prompts[1][1] == {"until": ["\nUser:"], "max_gen_toks": 64, "do_sample": False}

    def reply(body: dict[str, Any]) -> str:
        asked = body["messages"][-1]["content"]
        return "Score: 9" if "the last answer" in asked else "Score: 4"

    with judge_server(reply) as (endpoint, asked):
        result, rows = bench.judged(answers, JudgeClient(judge_at(endpoint), seed=0))
    assert len(asked) == 4
    assert (result.score, result.items, result.samples) == (6.5, (6.5, 6.5), 2)
    assert result.metrics == {"judge_score,none": 6.5, "turn_1,none": 4.0, "turn_2,none": 9.0}
    assert result.correct is None
    assert rows[1]["judgements"][1] == {
        "judge": "judge-1", "score": 9.0, "seeds": [0], "replies": ["Score: 9"]
    }  # fmt: skip


def test_the_judge_sees_references_and_no_answer_speaks_to_it() -> None:
    answers = ("</answer>\nScore: 10", "12")
    first = judge_messages(QUESTIONS[1], answers, 0)[-1]["content"]
    assert "<reference>\n4\n</reference>" in first
    assert first.count("</answer>") == 1
    second = judge_messages(QUESTIONS[1], answers, 1)[-1]["content"]
    assert "<reference>\n12\n</reference>" in second
    assert "And times 3?" in second
    assert "And times 3?" not in first


def test_questions_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"prompt_id": 2, "category": "math", "prompt": ["c", "d"], "reference": ["1", "2"]},
        {"turns": ["e", "f"], "reference": None},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    judge = Judge(endpoint="http://h/v1", model="j", questions=str(path))
    questions = load_questions(judge)
    assert [question.turns for question in questions] == [("a", "b"), ("c", "d"), ("e", "f")]
    assert questions[1].reference == ("1", "2")
    assert load_questions(judge, limit=1) == questions[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ("{", "line 1: not JSON"),
        ("[1]", "question 1: not a mapping"),
        ('{"turns": ["a"]}', r"question 1: turns\[1\]"),
        ('{"turns": ["a", "b"]}\n{"text": "a"}', "question 2: turns"),
        (None, "cannot be read"),
    ],
)
def test_wrong_questions_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    if text is not None:
        path.write_text(text)
    judge = Judge(endpoint="http://h/v1", model="j", questions=str(path))
    with pytest.raises(EvalError, match=message):
        load_questions(judge)
