"""vLLM serves a student: the plugin, and the same tokens as `generate` in every schedule.

vLLM needs a torch of its own, so it is in an environment of its own (`make test-slow` makes it).
"""

from __future__ import annotations

import concurrent.futures
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from serving import VLLM_PYTHON, Served, endless, serve

from xlstm_distill.export.source import find_student
from xlstm_distill.serving.speaker import Speaker
from xlstm_distill.serving.vllm_plugin import register, settle

TOKENS = 40
ON = {"ignore_eos": True}


@pytest.fixture(scope="module")
def model(saved_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(saved_student, tmp_path_factory.mktemp("endless") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    """One engine for all tests: prompts are read 48 tokens at a time, 24 requests at once."""
    if not VLLM_PYTHON.exists():
        pytest.skip("needs vLLM in .venv/vllm, or VLLM_PYTHON")
    pytest.importorskip("openai")
    options = ["--", "--max-num-batched-tokens", "48", "--max-num-seqs", "24"]
    with serve(
        VLLM_PYTHON,
        model,
        "--engine",
        "vllm",
        *options,
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_SERVER_DEV_MODE="1",  # preempts on request
    ) as found:
        yield found


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts of a token, of less and more than window and sinks, and of several chunks."""
    draw = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, 500, (length,), generator=draw).tolist()
        for length in (1, 2, 5, 10, 33, 48, 97, 200)
    ]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What `generate` gives, greedily and one prompt at a time."""
    student = Speaker.load(find_student(model), "cpu", None).student
    found = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        whole = student.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=TOKENS, do_sample=False
        )
        found.append(whole[0, len(prompt) :].tolist())
    return found


def stream(server: Served, prompt: list[int], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Yield the new tokens of a greedy completion as they come."""
    chunks = server.client.completions.create(
        model=server.name,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True} | ON,
    )
    for chunk in chunks:
        if chunk.choices:
            yield list(chunk.choices[0].token_ids or [])


def complete(server: Served, prompt: list[int]) -> list[int]:
    return [token for piece in stream(server, prompt) for token in piece]


def preemptions(server: Served) -> float:
    """How often a request was preempted so far."""
    with urllib.request.urlopen(f"{server.root}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith("vllm:num_preemptions_total{"))
    return float(line.split()[-1])


@pytest.mark.vllm
def test_alone_each_prompt_gets_the_tokens_of_generate(
    server: Served, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert [model.id for model in server.client.models.list()] == [server.name]
    assert [complete(server, prompt) for prompt in prompts] == expected


@pytest.mark.vllm
def test_so_do_64_streams_of_mixed_lengths(
    server: Served, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """More than the engine takes at once; prompts are read in chunks beside what decodes."""
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda prompt: complete(server, prompt), prompts * 8))
    assert found == expected * 8


@pytest.mark.vllm
def test_so_do_requests_that_are_preempted(
    server: Served, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    before = preemptions(server)
    streams = [stream(server, prompt) for prompt in prompts]
    found = [next(one) for one in streams]
    reset = f"{server.root}/reset_prefix_cache?reset_running_requests=true"
    with urllib.request.urlopen(urllib.request.Request(reset, method="POST")) as answer:
        assert answer.status == 200
    for tokens, one in zip(found, streams, strict=True):
        for piece in one:
            tokens += piece
    assert found == expected
    assert preemptions(server) >= before + 2


@pytest.mark.vllm
def test_it_chats_and_refuses_what_is_malformed(server: Served) -> None:
    import openai

    messages: Any = [{"role": "user", "content": "Add 3 and 4."}]
    create = server.client.chat.completions.create
    settings: Any = {"model": server.name, "messages": messages, "temperature": 0}
    settings |= {"max_tokens": 24, "extra_body": ON}
    answer = create(**settings)
    assert answer.usage.completion_tokens == 24
    text = answer.choices[0].message.content
    stop = text[len(text) // 2 :][:2]
    found = create(**settings, stop=[stop]).choices[0]
    assert (found.message.content, found.finish_reason) == (text[: text.index(stop)], "stop")
    for problem in ({"max_tokens": -1}, {"messages": [{"content": "x"}]}):
        with pytest.raises(openai.BadRequestError):
            create(**(settings | problem))
    with pytest.raises(openai.NotFoundError):
        create(**(settings | {"model": "other"}))


def settings(**changed: Any) -> SimpleNamespace:
    values = {
        "enable_prefix_caching": False,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "quantization": None,
        "cache_dtype": "auto",
        "block_size": None,
    } | changed
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            enable_prefix_caching=values["enable_prefix_caching"],
            cache_dtype=values["cache_dtype"],
            user_specified_block_size=values["block_size"] is not None,
            mamba_block_size=None,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=values["tensor_parallel_size"],
            pipeline_parallel_size=values["pipeline_parallel_size"],
        ),
        model_config=SimpleNamespace(
            quantization=values["quantization"],
            max_model_len=4096,
        ),
        speculative_config=values.get("speculative_config"),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"enable_prefix_caching": True},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"quantization": "fp8"},
        {"speculative_config": object()},
        {"cache_dtype": "fp8"},
        {"block_size": 64},
    ],
)
def test_settings_that_do_not_apply_are_refused_by_name(change: dict[str, Any]) -> None:
    setting = next(iter(change))
    with pytest.raises(ValueError, match=rf"^[a-z_.]*{setting}: does not apply to a student"):
        settle(settings(**change))


def test_a_request_has_one_block_for_its_state() -> None:
    found = settings()
    settle(found)
    assert found.cache_config.mamba_block_size == 4096
    assert found.model_config.enforce_eager


def test_another_vllm_goes_on_without_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    with pytest.warns(UserWarning, match="serves no students"):
        register()
