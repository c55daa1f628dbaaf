"""The benchmark of prefill and decoding: what it measures, and what it prints."""

from __future__ import annotations

import json
import subprocess

import pytest

from xlstm_distill.benchmarks import curves, decoding
from xlstm_kernels.benchmarks.parts import UNFINISHED, WITH_FAILURES

FLAGS = ["--device", "cpu", "--model", "tiny", "--window", "16", "--rounds", "2", "--tokens", "2"]


def test_the_models_take_turns_and_each_case_is_written_at_once(tmp_path, capsys, monkeypatch):
    out = tmp_path / "cases.jsonl"

    def fails_later(prompt, batch, arguments):
        if prompt > 64:
            raise RuntimeError("out of memory\nmore of it")
        assert arguments[:2] == ["--device", "cpu"]
        return {name: {"peak": 2**20, "total": 2**21} for name in decoding.VARIANTS}

    monkeypatch.setattr(decoding, "peaks", fails_later)
    flags = [*FLAGS, "--prompts", "64", "128", "--same-products", "--out", str(out)]
    assert decoding.main(flags) == WITH_FAILURES
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    rounds = first["rounds"]
    assert len(rounds["student"]) == len(rounds["attention"]) == 2
    pairs = zip(rounds["attention"], rounds["student"], strict=True)
    times = [a["prefill"]["wall"] / s["prefill"]["wall"] for a, s in pairs]
    assert first["prefill_speedup"]["wall"] == [sum(times) / 2, min(times), max(times)]
    pairs = zip(rounds[decoding.SAME_PRODUCTS], rounds["student"], strict=True)
    times = [a["prefill"]["wall"] / s["prefill"]["wall"] for a, s in pairs]
    assert first["same_products_speedup"]["wall"] == [sum(times) / 2, min(times), max(times)]
    # 64 + 4 tokens, 2 key heads of 16 numbers, keys and values, in fp32.
    assert first["attention"]["state_bytes"] == 68 * 2 * 16 * 2 * 4
    assert second["failed"] == "out of memory"
    table = capsys.readouterr().out.splitlines()
    assert table[-2].startswith("| 64 | 1 |")
    assert table[-2].count("|") == table[0].count("|")
    assert table[-1] == "| 128 | 1 | out of memory |"
    # Started again, it measures the case that failed; with other settings, all.
    monkeypatch.setattr(decoding, "peaks", lambda *_: first["memory"])
    assert decoding.main(flags) == 0
    again = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert again == [64, 128, 128]
    assert capsys.readouterr().out.splitlines()[-2] == table[-2]
    assert decoding.main([*flags, "--window", "8", "--budget-s", "0.001"]) == UNFINISHED
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.slow  # in processes of their own: here, earlier tests have left memory behind
def test_the_peak_is_that_of_the_prompt_alone():
    found = {prompt: decoding.peaks(prompt, 1, FLAGS)["attention"] for prompt in (64, 4096)}
    # 4096 tokens have 1 MiB of keys and values, and activations of some MiB.
    assert found[4096]["peak"] > found[64]["peak"] + 2**20
    assert found[4096]["peak"] < found[4096]["total"]


def test_curves_are_drawn_of_the_cases_that_did_not_fail(tmp_path):
    one = {"prefill_tokens_per_second": 9.0, "decode_ms": 2.0, "state_bytes": 2**20}
    memory = {name: {"peak": 2**20} for name in decoding.VARIANTS}
    cases = [
        {"prompt": 2048, "memory": memory, **dict.fromkeys(decoding.VARIANTS, one)},
        {"prompt": 1024, "memory": memory, **dict.fromkeys(decoding.VARIANTS, one)},
        {"prompt": 4096, "failed": "out of memory"},
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)))
    assert curves.main([str(tmp_path / "cases.jsonl"), str(tmp_path / "out.svg")]) == 0
    drawn = (tmp_path / "out.svg").read_text()
    assert "<!-- 2,048 -->" in drawn
    assert "<!-- 4,096 -->" not in drawn
    (tmp_path / "failed.jsonl").write_text(json.dumps(cases[2]))
    with pytest.raises(SystemExit) as refused:
        curves.main([str(tmp_path / "failed.jsonl"), str(tmp_path / "none.svg")])
    assert refused.value.code == 2
    assert not (tmp_path / "none.svg").exists()


def test_a_process_that_is_killed_is_a_case_that_failed(monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(RuntimeError, match="student: ended with exit code -9"):
        decoding.peaks(64, 1, FLAGS)


def test_the_fastest_of_each_round_are_compared():
    seconds = {"a": [6.0, 1.0], "b": [2.0, 8.0], "c": [4.0, 4.0]}
    rounds = {
        name: [{"decode": {"process": t, "wall": 2 * t}} for t in times]
        for name, times in seconds.items()
    }
    found = decoding.spread(rounds, "decode", ["a", "b"], ["c"])
    assert found == {"process": [0.375, 0.25, 0.5], "wall": [0.375, 0.25, 0.5]}
