"""Start vLLM on students, one engine after another in this process: a start then takes 2 seconds.

Run with a Python that has vLLM: `vllm_engines.py JOB OUT`. JOB is JSON: prompts (token ids), tokens
of each answer, and students with a name, a directory and settings of the engine. OUT gets a line of
JSON for each: name, tokens and log probabilities of the greedy answers, and how often vLLM
preempted.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # vLLM compiles how it counts ranks of log probabilities, which takes longer than all else.
    "TORCHDYNAMO_DISABLE": "1",
}


def answers(student: dict[str, Any], prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Return what an engine answers: prompts come in chunks of 48 tokens, 5 requests at once."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        student["directory"],
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_batched_tokens=48,
        max_num_seqs=5,
        max_model_len=256,
        seed=0,
        disable_log_stats=False,
        **student["settings"],
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1
    )
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = [answer.outputs[0] for answer in engine.generate(given, sampling, use_tqdm=False)]
    chosen = [
        [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)]
        for one in found
    ]
    counts = [m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions"]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return {
        "name": student["name"],
        "tokens": [list(one.token_ids) for one in found],
        "logprobs": chosen,
        "preemptions": sum(counts),
    }


def main() -> None:
    """Answer for all students of the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("w") as out:
        for student in job["students"]:
            out.write(json.dumps(answers(student, job["prompts"], job["tokens"])) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
