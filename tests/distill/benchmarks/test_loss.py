"""The benchmark of the loss: what it runs, what it refuses, and what it prints."""

from __future__ import annotations

import json

import pytest
import torch

from xlstm_distill.benchmarks import loss


def test_each_loss_runs_in_a_process_of_its_own(capsys, monkeypatch, root):
    monkeypatch.setenv(
        "PYTHONPATH", ":".join(str(root / name) for name in ("distill", "kernels", "eval"))
    )
    sizes = {"tokens": 768, "vocabulary": 40000, "hidden": 16, "top-k": 8}
    flags = ["--device=cpu", *(f"--{name}={value}" for name, value in sizes.items())]
    assert loss.main([*flags, "--repeats", "2", "--chunk", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert max(found["disagreement"].values()) < 1e-5
    assert len(found["plain"]["seconds"]) == len(found["fused"]["seconds"]) == 2
    logits = 768 * 40000 * 4
    assert found["plain"]["peak_bytes"] > 2 * logits
    assert found["fused"]["peak_bytes"] < logits / 2


def test_nothing_is_reported_when_the_losses_disagree(monkeypatch, capsys):
    def run(command, **_):
        kind = command[-1]
        figures = {"loss": [1.0 if kind == "plain" else 1.1]}
        return type("Done", (), {"stdout": json.dumps({"figures": figures})})

    monkeypatch.setattr(loss.subprocess, "run", run)
    assert loss.main(["--device", "cpu"]) == 1
    assert "disagree, nothing is reported: {'loss': 0.1" in capsys.readouterr().err


def test_disagreement_is_a_ratio_of_rms():
    ratios = loss.disagreement({"a": [1.0, 2.2]}, {"a": [1.0, 2.0]})
    assert ratios == pytest.approx({"a": (0.04 / 5) ** 0.5})


def test_random_targets_name_each_token_once():
    targets = loss.random_targets(5, 100, 16, "cpu")
    assert all(len(set(row.tolist())) == 16 for row in targets.ids)
    torch.testing.assert_close(targets.log_probs.exp().sum(1), torch.ones(5))
