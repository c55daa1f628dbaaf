"""The server of transformers with a student, as clients of the OpenAI API find it."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import call_cli
from processes import process_environment
from serving import Served, endless, serve

from xlstm_distill.export.source import find_student
from xlstm_distill.serving.conversation import Conversation
from xlstm_distill.serving.endpoint import NEEDED
from xlstm_distill.serving.speaker import Sampling, Speaker

MISSING = [name for name in NEEDED["transformers"] if importlib.util.find_spec(name) is None]
needs_server = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
GREEDY = {"temperature": 0, "max_tokens": 12}
ENDLESS = {"temperature": 0, "max_tokens": 200_000}


def ask(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}]


@pytest.fixture(scope="module")
def model(saved_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(saved_student, tmp_path_factory.mktemp("endless") / "model")


@pytest.fixture(scope="module")
def speaker(model: Path) -> Speaker:
    return Speaker.load(find_student(model), "cpu", None)


def expected(speaker: Speaker, words: str) -> str:
    """What `generate --chat` writes for a message."""
    return Conversation(speaker).answer(words, Sampling(12, temperature=0), lambda _: None).text


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with serve(sys.executable, model, "--engine", "transformers") as found:
        yield found


def chat(server: Served, words: str, **more: Any) -> Any:
    settings = GREEDY | more
    return server.client.chat.completions.create(model=server.name, messages=ask(words), **settings)


@needs_server
@pytest.mark.slow
def test_its_model_has_the_name_that_was_given(server: Served) -> None:
    assert [model.id for model in server.client.models.list()] == [server.name]


@needs_server
@pytest.mark.slow
def test_answers_equal_generate(server: Served, speaker: Speaker) -> None:
    answer = chat(server, "Add 3 and 4.")
    assert answer.choices[0].message.content == expected(speaker, "Add 3 and 4.")
    assert answer.model == server.name
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    text = server.client.completions.create(model=server.name, prompt="3 + 4 =", **GREEDY)
    ids = speaker.tokenizer("3 + 4 =")["input_ids"]
    spoken = speaker.say(ids, Sampling(12, temperature=0), lambda _: None)
    assert text.choices[0].text == spoken.text


@needs_server
@pytest.mark.slow
def test_a_stream_brings_the_same_piece_by_piece(server: Served, speaker: Speaker) -> None:
    chunks = list(chat(server, "Sort 5 2 9.", stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected(speaker, "Sort 5 2 9.")
    assert sum(map(bool, pieces)) > 2
    assert chunks[-1].choices[0].finish_reason == "length"


@needs_server
@pytest.mark.slow
def test_a_stop_string_ends_the_answer(server: Served, speaker: Speaker) -> None:
    whole = expected(speaker, "Add 3 and 4.")
    stop = whole[3:5]
    found = chat(server, "Add 3 and 4.", stop=[stop]).choices[0]
    end = whole.index(stop) + len(stop)
    # A token may reach beyond the string.
    assert whole[:end] in found.message.content
    assert len(found.message.content) < len(whole)
    assert found.finish_reason == "stop"


@needs_server
@pytest.mark.slow
def test_eight_at_once_get_their_own_answers(server: Served, speaker: Speaker) -> None:
    words = [f"Add {n} and {2 * n}." for n in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda w: chat(server, w), words))
    found = [answer.choices[0].message.content for answer in answers]
    assert found == [expected(speaker, w) for w in words]


@needs_server
@pytest.mark.slow
def test_a_client_that_leaves_stops_its_answer(server: Served, speaker: Speaker) -> None:
    stream = chat(server, "Count.", stream=True, **ENDLESS)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    begun = time.monotonic()
    assert chat(server, "Add 1 and 1.").choices[0].message.content
    # All of the other answer would take minutes.
    assert time.monotonic() - begun < 60


@needs_server
@pytest.mark.slow
def test_malformed_requests_are_refused_and_the_server_goes_on(server: Served) -> None:
    import openai

    good = {"model": server.name, "messages": ask("x")}
    cases: list[tuple[dict[str, Any], str]] = [
        (good | {"model": "other/model"}, "pinned to"),
        (good | {"messages": []}, "empty conversation"),
        (good | {"messages": [{"content": "x"}]}, "'role' is missing"),
        (good | {"messages": [{"role": "system", "content": "x"}]}, "Role system is unknown"),
        (good | {"max_tokens": -1}, "must be greater than 0"),
        (good | {"max_tokens": "many"}, "many"),
    ]
    for request, problem in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            server.client.chat.completions.create(**request)
        assert problem in caught.value.response.text
    for body, status in ((b"{no json", 422), (json.dumps({"model": server.name}).encode(), 400)):
        request = urllib.request.Request(f"{server.root}/v1/chat/completions", body)
        request.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == status
        refused.value.close()
    # Models that it was not started with are not loaded.
    load = urllib.request.Request(f"{server.root}/load_model", b'{"model": "other/model"}')
    load.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(load) as answer:
        assert b"is not served here" in answer.read()
    assert chat(server, "x").choices[0].finish_reason == "length"


@needs_server
@pytest.mark.slow
def test_transformers_chat_talks_to_it(server: Served) -> None:
    """`transformers chat NAME URL`, with what a user types."""
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from transformers.cli.transformers import app; app()",
            "chat",
            server.name,
            f"{server.root}/v1",
            "max_new_tokens=12",
            "do_sample=False",
        ],
        input="Add 3 and 4.\nn\n!exit\n",  # n: the answer is not to go on
        capture_output=True,
        text=True,
        # Its client refuses even this machine where the hub's is offline.
        env=process_environment() | {"HF_HUB_OFFLINE": "0"},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert f"<{server.name}>:" in found.stdout.replace("\n", "")


@needs_server
@pytest.mark.slow
def test_a_taken_port_is_named(server: Served) -> None:
    found = call_cli("serve", server.name, "--port", str(server.port), "--engine", "transformers")
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: --port: cannot listen on 127.0.0.1:{server.port}")


@needs_server
@pytest.mark.slow
def test_a_signal_ends_it_in_the_middle_of_an_answer(server: Served) -> None:
    """The last test: it ends the server."""
    stream = chat(server, "Count.", stream=True, **ENDLESS)
    next(iter(stream))
    server.process.send_signal(signal.SIGINT)
    said, _ = server.process.communicate(timeout=60)
    stream.close()
    assert server.process.returncode == 0, said
    # The server's log of requests lies between.
    first, second, *_, last = said.splitlines()
    assert first.startswith("Engine: transformers (one request at a time")
    assert second == f"Serving {server.name} at {server.root}/v1, on cpu."
    assert last == "Stopped."


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--engine", "other"), "--engine: 'other' is not allowed; one of vllm, transformers."),
        (("--engine", "vllm"), "serve: vllm missing, which the engine vllm needs"),
    ],
)
def test_an_engine_that_is_not_there_gives_one_line(
    words: tuple[str, ...], problem: str, saved_student: Path
) -> None:
    found = call_cli("serve", saved_student, *words)
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: {problem}")


def test_missing_packages_give_one_line(
    saved_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, gone = importlib.util.find_spec, {"vllm", *NEEDED["transformers"]}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in gone else there(name)
    )
    found = call_cli("serve", saved_student)
    assert found.returncode == 2
    assert found.stderr == (
        "error: serve: fastapi, uvicorn, openai missing, which the engine transformers needs; "
        "pip install 'xlstm-distill[serve]'.\n"
    )
