"""Needle items as tasks of lm-eval: one task for each kind and length, scored by exact match."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from xlstm_eval.loading import LoadedSuite, load_configs
from xlstm_eval.long_context.items import Item
from xlstm_eval.long_context.prompts import is_right
from xlstm_eval.suites import Suite, SuiteTask

METRIC = "exact_match"


def load_tasks(items: Sequence[Item], chat: bool) -> LoadedSuite:
    """Return the items of one length as a suite that lm-eval runs."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(f"{item.kind}-{item.length}", []).append(item)
    suite = Suite(
        name=f"long-context-{items[0].length}",
        tasks=tuple(SuiteTask(name=name, metric=METRIC) for name in by_task),
        apply_chat_template=chat,
    )
    return load_configs(suite, [_config(name, rows) for name, rows in by_task.items()])


def _config(name: str, items: Sequence[Item]) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": functools.partial(_dataset, items),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "content",
        "doc_to_target": "{{answers|join(', ')}}",
        "gen_prefix": "prefix",
        "generation_kwargs": {
            # Only the end of the text: some models begin with empty lines, and the budget is small.
            "until": [],
            "max_gen_toks": items[0].budget,
            "do_sample": False,
        },
        "process_results": _score,
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _dataset(items: Sequence[Item], **_: Any) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list([asdict(item) for item in items])})


def _score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {METRIC: float(is_right(doc["kind"], doc["answers"], results[0]))}
