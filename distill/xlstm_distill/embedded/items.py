"""Write evaluation items and lm-eval tasks: `python -m xlstm_distill.embedded.items --out DIR`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from xlstm_distill.embedded.tasks import TASKS, Task, held_out_items

COUNT = 500  # items of a task
ANSWER_TOKENS = 24  # the longest answer and its end token


def files(count: int = COUNT) -> dict[str, str]:
    """Return file name -> content: for each task a YAML for lm-eval and its items as JSON lines."""
    written = {}
    for task in TASKS.values():
        name = f"qs_{task.domain}_{task.name}"
        lines = []
        for item in held_out_items(task, count):
            line = {"prompt": item.prompt, "answer": item.answer}
            lines.append(json.dumps(line) + "\n")
        written[f"{name}.jsonl"] = "".join(lines)
        written[f"{name}.yaml"] = yaml.safe_dump(definition(name, task), sort_keys=False)
    return written


def definition(name: str, task: Task) -> dict[str, Any]:
    """Describe the task for lm-eval; the data file is relative to the YAML's folder."""
    return {
        "task": name,
        "tag": [f"qs_{task.domain}"],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": ["<|end|>"],
            "max_gen_toks": ANSWER_TOKENS,
            "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0, "domain": task.domain, "recall": task.passage is not None},
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.embedded.items", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (out / name).write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
