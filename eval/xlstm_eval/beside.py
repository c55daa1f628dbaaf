"""What an evaluation has beside lm-eval: MT-Bench with its judge, and words on generated code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xlstm_eval.loading import LoadedSuite
from xlstm_eval.tasks.judge import JudgeClient
from xlstm_eval.tasks.mt_bench import MT_BENCH, MTBench
from xlstm_eval.tasks.sandbox import Limits, not_isolated


def mt_bench(loaded: LoadedSuite, lm: Any = None) -> MTBench | None:
    """Return MT-Bench with its questions, where it is to be run.

    ``lm`` writes the prompts; without one, earlier answers can be judged, and nothing asked.
    """
    if not loaded.questions:
        return None
    (entry,) = (task for task in loaded.suite.tasks if task.name == MT_BENCH)
    template = None
    if loaded.suite.apply_chat_template:
        # Where prompts have a template, answers end by themselves, also those that are there.
        template = _asks_nothing if lm is None else lm.apply_chat_template
    return MTBench(entry, loaded.questions, template)


def _asks_nothing(messages: object) -> str:
    raise TypeError("answers are there: no prompt is to be written")


def open_judge(loaded: LoadedSuite, seed: int, folder: Path | None) -> JudgeClient | None:
    """Return the judge, once it has answered: before hours of answers and not after them."""
    if not loaded.questions or loaded.suite.judge is None:
        return None
    judge = JudgeClient(loaded.suite.judge, seed, folder)
    judge.check()
    return judge


def generate(lm: Any, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Answer prompts on all ranks, in the batches of conversations."""
    lm.multiturn = True
    answers: list[str] = lm.generate_until([SimpleNamespace(args=each) for each in asked])
    return answers


SKIPPED = f"{MT_BENCH} is skipped"


def skipped(loaded: LoadedSuite) -> list[str]:
    """Say which tasks were not run."""
    if loaded.questions or len(loaded.harnessed()) == len(loaded.suite.tasks):
        return []
    return [f"{SKIPPED}: no judge is named (evaluate.judge, docs/evaluation.md)."]


def sandbox_warnings(loaded: LoadedSuite) -> list[str]:
    """Say what generated code could reach, where this platform does not isolate it fully."""
    missing = not_isolated() if loaded.runs_code() else ()
    if not missing:
        return []
    return [
        f"generated code ran with limits of time and memory, but this platform did not keep it "
        f"from: {', '.join(missing)} (docs/evaluation.md)."
    ]


def sandbox_protocol(loaded: LoadedSuite) -> dict[str, Any]:
    """Record the limits of generated code, by which answers are right or wrong."""
    if not loaded.runs_code():
        return {}
    return {"code_limits": asdict(Limits()), "code_not_isolated_from": list(not_isolated())}
