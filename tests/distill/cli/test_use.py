"""`export`, `generate` and `chat` from the command line."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from command_line import call_cli
from torch._dynamo.testing import CompileCounter

from xlstm_distill.models.decoding import compiled
from xlstm_distill.serving.speaker import Speaker


def test_generate_writes_text_or_json(saved_student: Path, tmp_path: Path) -> None:
    words = ("generate", saved_student, "-p", "3 + 4 =", "--max-tokens", "8", "--temperature", "0")
    plain, as_json = call_cli(*words), call_cli(*words, "--json")
    assert plain.returncode == as_json.returncode == 0, plain.stderr
    found = json.loads(as_json.stdout)
    assert plain.stdout == found["text"] + "\n"
    assert "new ones" in plain.stderr
    assert "state" in plain.stderr
    assert found["new_tokens"] <= 8
    out = call_cli("export", saved_student, tmp_path / "out")
    assert out.returncode == 0, out.stderr
    assert "trust_remote_code=True" in out.stdout
    exported = call_cli(words[0], tmp_path / "out", *words[2:], "--json")
    assert json.loads(exported.stdout)["ids"] == found["ids"]


def test_compiling_is_done_before_the_answer(
    saved_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, graphs = CompileCounter(), []
    plainly = functools.partial(compiled.compile_decoding, backend=counter)
    monkeypatch.setattr(compiled, "compile_decoding", plainly)
    warmed = Speaker.warm_up

    def warm_up(speaker: Speaker) -> None:
        warmed(speaker)
        graphs.append(counter.frame_count)

    monkeypatch.setattr(Speaker, "warm_up", warm_up)
    words = ("generate", saved_student, "-p", "3 + 4 =", "--max-tokens", "8", "--temperature", "0")
    plain, done = call_cli(*words), call_cli(*words, "--compile")
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain.stdout
    assert done.stderr.startswith("Compiling")
    assert graphs == [counter.frame_count] == [1]


def test_chat_answers_until_the_conversation_ends(saved_student: Path) -> None:
    typed = "Add 3 and 4.\n\n/new\nAdd 3 and 4.\n/quit\nnever read\n"
    done = call_cli("chat", saved_student, "--max-tokens", "6", "--temperature", "0", typed=typed)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert done.stderr.count("tokens/s") == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("generate", "nowhere", "-p", "x"), "error: RUN_OR_MODEL: nowhere is neither a run"),
        (("generate", "nowhere", "-p", ""), "error: --prompt: there is no text"),
        (("export", "nowhere", "out"), "error: RUN_OR_MODEL: nowhere is neither a run"),
        (("export", "nowhere", "."), "error: OUT: . is there already"),
        (
            ("generate", "STUDENT", "-p", "x", "--device", "warp:9"),
            "error: --device: 'warp:9' is not there",
        ),
        (("export", "STUDENT", "out", "--shard-size", "x"), "error: --shard-size: 'x' is no size"),
        (("chat", "nowhere", "--dtype", "int8"), "error: --dtype: 'int8' is not allowed; one of"),
    ],
)
def test_bad_input_gives_one_line(
    words: tuple[str, ...], problem: str, saved_student: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")  # the folder is not empty
    words = tuple(str(saved_student) if word == "STUDENT" else word for word in words)
    done = call_cli(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(problem)
    assert len(done.stderr.splitlines()) == 1
