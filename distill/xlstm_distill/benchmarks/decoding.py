"""Time prefill and decoding: `python -m xlstm_distill.benchmarks.decoding --model 28m`.

A randomly initialised Llama (`attention`) and its student, in one dtype: the time to read a prompt
and to decode a token after it, the peak memory of reading, and the bytes of the decoding state. In
each round the two take turns, and a ratio is of one round; so what else runs on the machine touches
both. Peak memory is measured in a process of its own for each model and prompt.

Every case is a row of the table as soon as it is there, and a line of JSON in `--out`; started
again with that file, the benchmark measures what is missing there. A case that fails says why. The
attention's cache is transformers' default, which grows with the prompt. With `--compile` a compiled
step of both takes its turns too, the attention's with transformers' static cache; the fastest of
each are compared. With `--same-products` the attention also reads the prompt with its linear layers
as the student's (`runtime/products.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from xlstm_distill.benchmarks.kept import Kept
from xlstm_distill.benchmarks.llamas import MODELS
from xlstm_distill.models.cache import StudentCache
from xlstm_distill.models.decoding.compiled import compile_decoding
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.student import convert
from xlstm_distill.recipe import MixerConfig
from xlstm_distill.runtime.device import forget_peak, peak_bytes
from xlstm_distill.runtime.products import fast_linear_layers
from xlstm_kernels.benchmarks.parts import DONE, UNFINISHED, WITH_FAILURES, seconds
from xlstm_kernels.benchmarks.timing import OutOfTime, alarm

VARIANTS = ("student", "attention")
MIB = 2**20
FIRST = 2
"""Steps of a cache that are not timed: they may fold weights or compile."""
WARM_UP = 16
"""Tokens that are read before anything is measured."""
Step = Callable[..., Any]


def make_models(variants: Iterable[str], options: argparse.Namespace) -> dict[str, CausalLM]:
    """Make models of the same random weights, at once on the device and in the dtype."""
    torch.manual_seed(0)
    settings = MODELS[options.model]
    if options.layers:
        settings = settings | {"num_hidden_layers": options.layers}
    longest = max(options.prompts) + options.tokens * options.rounds + WARM_UP + FIRST
    config = LlamaConfig(**settings, max_position_embeddings=longest)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    found: dict[str, CausalLM] = {}
    try:
        with torch.device(options.device):
            teacher: CausalLM = LlamaForCausalLM(config).eval()
            if "student" in variants:
                mixer = MixerConfig(window=options.window)
                found["student"] = convert(teacher, mixer, share_weights=True).eval()
                for module in found["student"].mixers():
                    module.backend = options.backend
            if "attention" in variants:
                found["attention"] = teacher
    finally:
        torch.set_default_dtype(before)
    return found


def draw(prompt: int, batch: int, options: argparse.Namespace) -> Tensor:
    """Draw random token ids (B, T)."""
    vocabulary = MODELS[options.model]["vocab_size"]
    return torch.randint(vocabulary, (batch, prompt), device=options.device)


def new_cache(model: CausalLM, static: int | None = None) -> Cache:
    """Make an empty cache; static: the tokens that the attention's has room for from the start."""
    if hasattr(model, "new_cache"):
        return cast(Cache, model.new_cache())
    return DynamicCache() if static is None else StaticCache(model.config, max_cache_len=static)


def state_bytes(cache: Cache) -> int:
    """Count what a cache holds."""
    if isinstance(cache, StudentCache):
        return cache.nbytes()
    layers: list[Any] = cache.layers
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)


class Clock:
    """Seconds since it was made: `process`, this process's own, and `wall`.

    On CUDA both are the wall's, after all kernels. On a CPU, other processes disturb a process's
    own time less.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter(), time.perf_counter()
        return time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return the seconds so far."""
        process, wall = self._now()
        return {"process": process - self.start[0], "wall": wall - self.start[1]}


class Turn(NamedTuple):
    """A model that takes turns: step: its compiled one, if any; products: the student's."""

    model: CausalLM
    step: Step | None = None
    products: bool = False


COMPILED = {name: f"compiled {name}" for name in VARIANTS}
SAME_PRODUCTS = "attention, same products"


@torch.no_grad()
def one_round(turn: Turn, ids: Tensor, tokens: int) -> dict[str, Any]:
    """Read a prompt and decode `tokens` after it; seconds of the prompt and of one token."""
    device, model = ids.device, turn.model
    room = None if turn.step is None else ids.shape[1] + FIRST + tokens
    cache, clock = new_cache(model, room), Clock(device)
    with fast_linear_layers(device) if turn.products else contextlib.nullcontext():
        model(ids, past_key_values=cache, logits_to_keep=1)
    read = clock.read()
    token, step = ids[:, -1:], model if turn.step is None else turn.step
    for _ in range(FIRST):
        step(token, past_key_values=cache)
    clock = Clock(device)
    for _ in range(tokens):
        step(token, past_key_values=cache)
    per_token = {name: seconds / tokens for name, seconds in clock.read().items()}
    return {"prefill": read, "decode": per_token, "state_bytes": state_bytes(cache)}


def timed(
    turns: dict[str, Turn], prompt: int, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Have the models take turns, and return medians with their spread."""
    ids = draw(prompt, batch, options)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for n in range(options.rounds):
        # Who is first takes turns too.
        for name in list(turns)[:: -1 if n % 2 else 1]:
            rounds[name].append(one_round(turns[name], ids, options.tokens))
    found: dict[str, Any] = {"rounds": rounds}
    for name, seen in rounds.items():
        read = statistics.median(one["prefill"]["process"] for one in seen)
        step = statistics.median(one["decode"]["process"] for one in seen)
        found[name] = {
            "prefill_ms": 1e3 * read,
            "prefill_tokens_per_second": batch * prompt / read,
            "decode_ms": 1e3 * step,
            "decode_tokens_per_second": batch / step,
            "state_bytes": seen[-1]["state_bytes"],
        }
    # How many times the attention's tokens a second, and how much of its time for a token.
    found["prefill_speedup"] = spread(rounds, "prefill", ["attention"], ["student"])
    found["decode_time"] = spread(rounds, "decode", ["student"], ["attention"])
    if options.same_products:
        found["same_products_speedup"] = spread(rounds, "prefill", [SAME_PRODUCTS], ["student"])
    if options.compile:
        pairs = [[name, COMPILED[name]] for name in VARIANTS]
        found["fastest_decode_time"] = spread(rounds, "decode", *pairs)
    return found


def make_turns(options: argparse.Namespace) -> dict[str, Turn]:
    """Make the models that take turns, by name."""
    models = make_models(VARIANTS, options)
    turns = {name: Turn(model) for name, model in models.items()}
    if options.same_products:
        turns[SAME_PRODUCTS] = Turn(models["attention"], products=True)
    if options.compile:
        # Another student, because its step is compiled in place.
        student, attention = make_models(VARIANTS, options).values()
        compile_decoding(student)  # prompts run as before
        turns[COMPILED["student"]] = Turn(student, student)
        turns[COMPILED["attention"]] = Turn(attention, torch.compile(attention, fullgraph=True))
    return turns


def spread(
    rounds: dict[str, list[Any]], what: str, above: list[str], below: list[str]
) -> dict[str, Any]:
    """Return the ratio of times in each round: median, least, most, by each clock.

    above, below: names of models, of which the fastest of a round counts.
    """
    found = {}
    for clock in ("process", "wall"):
        least = []
        for names in (above, below):
            each = zip(*(rounds[name] for name in names), strict=True)
            least.append([min(one[what][clock] for one in seen) for seen in each])
        ratios = [a / b for a, b in zip(*least, strict=True)]
        found[clock] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


@torch.no_grad()
def reading_memory(options: argparse.Namespace) -> dict[str, int]:
    """Return the most bytes that reading one prompt takes beyond what is held before it.

    peak: of the prompt. total: of the whole process on a CPU, of the device on CUDA.
    """
    device, prompt = torch.device(options.device), options.prompts[0]
    (model,) = make_models([options.only], options).values()
    model(draw(WARM_UP, 1, options), past_key_values=new_cache(model), logits_to_keep=1)
    ids, cache = draw(prompt, options.batches[0], options), new_cache(model)
    forget_peak()
    before = peak_bytes(device)
    model(ids, past_key_values=cache, logits_to_keep=1)
    total = peak_bytes(device)
    return {"peak": total - before, "total": total}


def peaks(prompt: int, batch: int, arguments: list[str]) -> dict[str, dict[str, int]]:
    """Measure the peak memory of each model in a process of its own."""
    found = {}
    for name in VARIANTS:
        command = [sys.executable, "-m", "xlstm_distill.benchmarks.decoding", *arguments]
        command += ["--only", name, "--prompts", str(prompt), "--batches", str(batch)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            # A process that the system kills for its memory says nothing.
            said = done.stderr.strip() or f"ended with exit code {done.returncode}"
            raise RuntimeError(f"{name}: {said.splitlines()[-1]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


COLUMNS = (
    "context",
    "batch",
    "prefill tokens/s, student",
    "attention",
    "speedup (least to most)",
    "decode ms, student",
    "attention",
    "ratio (least to most)",
    "peak of prefill MiB, student",
    "attention",
    "state MiB, student",
    "attention",
)
SAME_COLUMNS = ("attention, same products, tokens/s", "speedup (least to most)")
COMPILED_COLUMNS = (
    "compiled decode ms, student",
    "attention",
    "fastest student / fastest attention (least to most)",
)


def header(options: argparse.Namespace) -> str:
    """Show the table's columns."""
    names: tuple[str, ...] = COLUMNS
    names += SAME_COLUMNS if options.same_products else ()
    names += COMPILED_COLUMNS if options.compile else ()
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"


def shown(ratio: dict[str, list[float]]) -> str:
    """Show what `spread` found."""
    median, least, most = ratio["process"]
    return f"**{median:.2f}** ({least:.2f} to {most:.2f})"


def row(case: dict[str, Any]) -> str:
    """Show a case as a row of the table."""
    cells = [f"{case['prompt']:,}", str(case["batch"])]
    if "failed" in case:
        return f"| {' | '.join(cells)} | {case['failed']} |\n"
    student, attention = case["student"], case["attention"]
    for what, ratio, digits in (
        ("prefill_tokens_per_second", "prefill_speedup", 0),
        ("decode_ms", "decode_time", 2),
    ):
        cells += [f"{x[what]:,.{digits}f}" for x in (student, attention)]
        cells.append(shown(case[ratio]))
    memory = case.get("memory")
    for name in VARIANTS:
        cells.append(f"{memory[name]['peak'] / MIB:,.0f}" if memory else "")
    cells += [f"{x['state_bytes'] / MIB:,.2f}" for x in (student, attention)]
    if SAME_PRODUCTS in case:
        cells.append(f"{case[SAME_PRODUCTS]['prefill_tokens_per_second']:,.0f}")
        cells.append(shown(case["same_products_speedup"]))
    if "fastest_decode_time" in case:
        cells += [f"{case[COMPILED[name]]['decode_ms']:,.2f}" for name in VARIANTS]
        cells.append(shown(case["fastest_decode_time"]))
    return f"| {' | '.join(cells)} |\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.decoding", description=__doc__.splitlines()[0]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--model", choices=MODELS, default="tiny", help="default tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default bfloat16 on CUDA, else float32"
    )
    parser.add_argument(
        "--backend", choices=("auto", "torch", "triton"), default="auto", help="of the mixers"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024], help="tokens read")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="rows")
    defaults = {"tokens": 32, "window": 128, "rounds": 3, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--out", type=Path,
        help="a file that gets a line of JSON for every case; one that is there is not timed again",
    )  # fmt: skip
    parser.add_argument(
        "--budget-s", type=seconds, help="seconds after which to stop, with what there is"
    )
    parser.add_argument("--compile", action="store_true", help="time a compiled step as well")
    parser.add_argument(
        "--same-products", action="store_true", help="time the attention with the student's, too"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print a table, a row as soon as its case is measured.

    Returns the exit status (`xlstm_kernels.benchmarks.parts`).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.only:
        sys.stdout.write(json.dumps(reading_memory(options)) + "\n")
        return DONE
    try:
        with alarm(options.budget_s):
            failed = measure_cases(options, arguments)
    except OutOfTime:
        sys.stdout.write("Stopped: the time of --budget-s is up.\n")
        return UNFINISHED
    return WITH_FAILURES if failed else DONE


def measure_cases(options: argparse.Namespace, arguments: list[str]) -> bool:
    """Measure every case that `--out` does not have; return whether one failed."""
    failed, kept = False, Kept(options.out, options)
    turns = make_turns(options)
    for turn in turns.values():
        one_round(turn._replace(step=None), draw(WARM_UP, 1, options), 1)
    sys.stdout.write(header(options))
    for prompt in options.prompts:
        for batch in options.batches:
            case: dict[str, Any] = {"model": options.model, "prompt": prompt, "batch": batch}
            if known := kept.known(**case):
                sys.stdout.write(row(known))
                continue
            try:
                case |= timed(turns, prompt, batch, options)
                if not options.no_memory:
                    case["memory"] = peaks(prompt, batch, arguments)
            except RuntimeError as error:  # the cache of a long prompt may not fit
                failed, case["failed"] = True, str(error).splitlines()[0]
            sys.stdout.write(row(case))
            sys.stdout.flush()
            kept.add(case)
    return failed


if __name__ == "__main__":
    sys.exit(main())
