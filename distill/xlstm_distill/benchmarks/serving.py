"""Time answers to many prompts at once: `python -m xlstm_distill.benchmarks.serving FOLDER`.

A randomly initialised Llama (`attention`) and its student in one dtype, each in vLLM and in
`generate` with a batch. Measured is the time from the prompts to the last token of the longest
answer, and apart from it the time to read the prompts and make one token. Each model has a process
of its own in each engine; the processes take turns, and every turn counts. Needs an environment
with vLLM. FOLDER takes the models; they stay there for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from xlstm_distill.benchmarks.decoding import VARIANTS, make_models
from xlstm_distill.benchmarks.llamas import MODELS

Answer = Callable[[list[list[int]], int], None]
"""Continue each prompt by this many tokens, whatever they are."""
Row = dict[str, Any]


def save_models(options: argparse.Namespace) -> None:
    """Write both models with the same random weights, unless they are there."""
    if all((options.folder / name / "config.json").exists() for name in VARIANTS):
        return
    longest = options.prompt + options.tokens
    settings = {"prompts": [longest], "rounds": 1, "layers": None, "device": "cpu"}
    found = make_models(VARIANTS, argparse.Namespace(**vars(options) | settings, backend="auto"))
    for name, model in found.items():
        # Nothing ends an answer, so that all have the same length.
        model.config.eos_token_id = None
        model.generation_config.eos_token_id = None
        model.save_pretrained(options.folder / name)


def with_generate(directory: Path, options: argparse.Namespace) -> Answer:
    """Load a model in transformers; its batch has a row for each prompt."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    def answer(prompts: list[list[int]], tokens: int) -> None:
        rows = torch.tensor(prompts)
        model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=tokens, do_sample=False
        )

    return answer


def with_vllm(directory: Path, options: argparse.Namespace) -> Answer:
    """Load a model in vLLM with its own settings, but for those that a student refuses."""
    # One process, so that its threads are those that `--threads` gives.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(directory),
        dtype=options.dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=options.prompt + options.tokens,
        max_num_seqs=max(options.sequences),
        seed=0,
    )
    torch.set_num_threads(options.threads)

    def answer(prompts: list[list[int]], tokens: int) -> None:
        settings = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        engine.generate(given, settings, use_tqdm=False)

    return answer


ENGINES: dict[str, Callable[[Path, argparse.Namespace], Answer]] = {
    "generate": with_generate,
    "vllm": with_vllm,
}


def seconds_of(answer: Answer, prompts: list[list[int]], tokens: int) -> float:
    """Time one call."""
    begun = time.perf_counter()
    answer(prompts, tokens)
    return time.perf_counter() - begun


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Time one model in one engine (`options.only`): a row for each number of sequences."""
    engine, name = options.only
    torch.set_num_threads(options.threads)
    answer = ENGINES[engine](options.folder / name, options)
    vocabulary = MODELS[options.model]["vocab_size"]
    for sequences in options.sequences:
        # Other prompts than the warm-up's, so that no cache of them helps.
        warm, prompts = torch.randint(vocabulary, (2, sequences, options.prompt)).tolist()
        answer(warm, 2)
        yield {
            "engine": engine,
            "model": name,
            "sequences": sequences,
            "first": seconds_of(answer, prompts, 1),
            "whole": seconds_of(answer, prompts, options.tokens),
        }


def turns(options: argparse.Namespace, arguments: list[str]) -> Iterator[Row]:
    """Yield the rows of all processes; in each round every engine and model has its turn."""
    for number in range(options.rounds):
        order = [(engine, name) for engine in options.engines for name in VARIANTS]
        for engine, name in order[:: -1 if number % 2 else 1]:
            command = [sys.executable, "-m", "xlstm_distill.benchmarks.serving", *arguments]
            command += ["--only", engine, name]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip() or f"ended with exit code {done.returncode}"
                raise RuntimeError(f"{engine}, {name}: {said.splitlines()[-1]}")
            # vLLM writes to standard output too.
            lines = [line for line in done.stdout.splitlines() if line.startswith('{"engine"')]
            for line in lines:
                yield json.loads(line) | {"round": number}


def table(rows: list[Row], tokens: int) -> str:
    """Show new tokens a second of whole answers, median with least and most, and the ratios."""
    rates: dict[tuple[int, str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: int(row["round"])):
        key = (row["sequences"], row["engine"], row["model"])
        rates.setdefault(key, []).append(row["sequences"] * tokens / row["whole"])
    columns = sorted({key[1:] for key in rates})
    cells = ["sequences", *(f"{model}, {engine}" for engine, model in columns)]
    engines = sorted({engine for engine, _ in columns})
    cells += [f"student / attention, {engine}" for engine in engines]
    lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
    for sequences in sorted({key[0] for key in rates}):
        cells = [str(sequences)]
        cells += [spread(rates[sequences, *column], 0) for column in columns]
        for engine in engines:
            pair = (rates[sequences, engine, name] for name in VARIANTS)
            cells.append(spread([a / b for a, b in zip(*pair, strict=True)], 2))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Show a median with the least and the most."""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.serving", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the models are, or are to be")
    parser.add_argument("--model", choices=MODELS, default="28m", help="default 28m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32], help="at once")
    defaults = {"prompt": 512, "tokens": 64, "rounds": 3, "window": 128, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--out", type=Path, help="a file that gets a line of JSON for every row")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print a table when all rounds are done; returns 1 if a process failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.only:
        for row in measure(options):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
        return 0
    save_models(options)
    rows: list[Row] = []
    try:
        for row in turns(options, arguments):
            rows.append(row)
            sys.stderr.write(json.dumps(row) + "\n")
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(table(rows, options.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
