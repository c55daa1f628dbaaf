"""Score generated code: pass@k over programs that run in the sandbox, for lm-eval's tasks and ours.

lm-eval's own tasks run programs with Hugging Face's `code_eval` or, in cruxeval, by themselves: in
this process's files and network. Here both are led into the sandbox.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

from xlstm_eval.records import EvalError
from xlstm_eval.tasks.sandbox import run_program, run_programs

CODE_EVAL, EVALUATE = "code_eval", "evaluate"
RUNNER = "check_correctness"
"""The function by which lm-eval's cruxeval runs a program: True if it passed."""
Scores = dict[str, float]


def estimated_pass_at_k(answers: int, right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: that one of k answers out of ``answers`` is right.

    1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374). Raises EvalError: fewer than k.
    """
    if not 1 <= k <= answers:
        raise EvalError(f"pass@{k}: there are {answers} answers. Take k from 1 to {answers}.")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def pass_at_k(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: int | Sequence[int] = 1
) -> Scores:
    """Return the mean pass@k over problems for each k, as ``{"pass@1": ...}``.

    A problem has its tests in ``references`` and its answers in ``predictions``. It is a metric of
    lm-eval: task files name it as ``!function xlstm_eval.tasks.code.pass_at_k``.
    """
    programs, owners = [], []
    for problem, (tests, answers) in enumerate(zip(references, predictions, strict=True)):
        programs += [f"{answer}\n{tests}" for answer in answers]
        owners += [problem] * len(answers)
    right = [0] * len(references)
    for problem, outcome in zip(owners, run_programs(programs), strict=True):
        right[problem] += outcome.passed
    scores = {}
    for each in [k] if isinstance(k, int) else k:
        found = [
            estimated_pass_at_k(len(answers), count, each)
            for answers, count in zip(predictions, right, strict=True)
        ]
        scores[f"pass@{each}"] = math.fsum(found) / len(found)
    return scores


def code_of_answers(answers: Sequence[Sequence[str]], docs: Sequence[Any]) -> list[list[str]]:
    """Return the code of every answer to every item: a filter of lm-eval."""
    return [[code_of(answer) for answer in each] for each in answers]


def code_of(answer: str) -> str:
    """Return the code of an answer to a prompt that has opened a code block already.

    It ends at the first fence, which closes that block. A fence with a language, or one before
    which there is nothing, opens a block of the answer's own.
    """
    head, _, rest = answer.partition("```")
    language, newline, body = rest.partition("\n")
    opens = newline and (language.strip().isalnum() or not head.strip())
    return body.partition("```")[0] if opens else head


class SandboxedCodeEval:
    """Takes the place of Hugging Face's metric ``code_eval`` in lm-eval's tasks."""

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1,),
    ) -> tuple[Scores, dict[int, Any]]:
        """Return the scores, and an empty log where the original has one."""
        return pass_at_k(references, predictions, k), {}


SANDBOXED = SandboxedCodeEval()


@contextlib.contextmanager
def sandboxed_metrics() -> Iterator[None]:
    """Give lm-eval's task files the sandbox in place of ``code_eval`` while they are loaded.

    They load that metric from the hub, and try it in this process, as soon as they are imported.
    So for that time a stand-in has the name of Hugging Face's package `evaluate`, whose import
    takes seconds; it is imported if something else of it is wanted.
    """
    before = sys.modules.get(EVALUATE)
    stand_in = types.ModuleType(EVALUATE, "A stand-in of xlstm_eval.")

    def real() -> types.ModuleType:
        if before is not None:
            return before
        sys.modules.pop(EVALUATE, None)
        try:
            return importlib.import_module(EVALUATE)
        finally:
            sys.modules[EVALUATE] = stand_in

    def load(path: str, *given: Any, **settings: Any) -> Any:
        return SANDBOXED if path == CODE_EVAL else real().load(path, *given, **settings)

    def attribute(name: str) -> Any:
        # Whoever walks over all modules (inspect does) asks for __file__ and the like.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(real(), name)

    stand_in.load = load  # type: ignore[attr-defined]
    stand_in.__getattr__ = attribute  # type: ignore[method-assign]
    sys.modules[EVALUATE] = stand_in
    try:
        yield
    finally:
        sys.modules.pop(EVALUATE, None)
        if before is not None:
            sys.modules[EVALUATE] = before


def runs_programs(task: Any) -> bool:
    """Tell whether a metric of an lm-eval task runs programs; they are led into the sandbox."""
    return any(_confine(metric) for metric in getattr(task, "_metric_fn_list", {}).values())


def is_confined(task: Any) -> bool:
    """Lead the programs of an lm-eval task into the sandbox; tell whether all of its metrics do.

    ``task`` is a task object that lm-eval marks as one that runs generated code.
    """
    # A task that scores by a function of its own runs programs where nobody sees them.
    if task.get_config("process_results") is not None:
        return False
    return all(_confine(metric) for metric in task._metric_fn_list.values())


def _confine(metric: Any) -> bool:
    # lm-eval keeps a function's bound `__call__`.
    function = getattr(metric, "__self__", metric)
    if function is pass_at_k:
        return True
    names: dict[str, Any] = getattr(function, "__globals__", {})
    confined = False
    for name, value in names.items():
        # Also where the module was imported before, with the original.
        if getattr(value, "name", None) == CODE_EVAL and hasattr(value, "compute"):
            names[name] = value = SANDBOXED
        confined = confined or value is SANDBOXED
    if "unsafe_execute" in names and callable(names.get(RUNNER)):
        names[RUNNER] = _passes
        confined = True
    return confined


def _passes(program: str, timeout: float | None = None) -> bool:
    """Run one program. The sandbox's limits hold for all tasks, whatever ``timeout`` says."""
    return run_program(program).passed
