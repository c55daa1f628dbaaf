"""Time prefill and decoding: `python -m xlstm_distill.benchmarks.decoding --model 8b`.

A randomly initialised Llama and its student, in the run's dtype: the time to read a prompt, and to
decode a token after it. Every case is a line of JSON as soon as it is there; one that fails says
why. The student's memory does not grow with the prompt, the teacher's cache does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from xlstm_distill.benchmarks.loss import clock
from xlstm_distill.benchmarks.training import MODELS
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.student import convert
from xlstm_distill.recipe import MixerConfig
from xlstm_distill.runtime.device import peak_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 97,
    },
    "1b": MODELS["1b"],
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""Llama configurations by name; 1b and 8b have the shapes of Llama 3.2 1B and 3.1 8B."""
VARIANTS = ("student", "attention")


def make_model(variant: str, options: argparse.Namespace) -> CausalLM:
    """Make a model with random weights, at once on the device and in the dtype."""
    torch.manual_seed(0)
    settings = SHAPES[options.model]
    if options.layers:
        settings = settings | {"num_hidden_layers": options.layers}
    longest = max(options.prompts) + options.tokens
    config = LlamaConfig(**settings, max_position_embeddings=longest)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            model: CausalLM = LlamaForCausalLM(config).eval()
            if variant == "student":
                model = convert(model, MixerConfig(window=options.window)).eval()
                for mixer in model.mixers():
                    mixer.backend = options.backend
    finally:
        torch.set_default_dtype(before)
    return model


@torch.no_grad()
def measured(
    model: CausalLM, variant: str, prompt: int, batch: int, options: argparse.Namespace
) -> dict[str, float]:
    """Time a prompt and the tokens after it; medians in milliseconds, the peak in bytes."""
    device = torch.device(options.device)
    vocabulary = SHAPES[options.model]["vocab_size"]
    ids = torch.randint(vocabulary, (batch, prompt), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reads, steps = [], []
    for _ in range(options.repeats + 1):
        cache = model.new_cache() if variant == "student" else DynamicCache()
        start = clock(device)
        model(ids, past_key_values=cache, logits_to_keep=1)
        reads.append(1e3 * (clock(device) - start))
    for _ in range(options.tokens):
        start = clock(device)
        model(ids[:, -1:], past_key_values=cache)
        steps.append(1e3 * (clock(device) - start))
    # The first of each may compile.
    read, step = statistics.median(reads[1:]), statistics.median(steps[1:] or steps)
    return {
        "prefill_ms": read,
        "prefill_tokens_per_second": 1e3 * batch * prompt / read,
        "decode_ms": step,
        "decode_tokens_per_second": 1e3 * batch / step,
        "peak_bytes": peak_bytes(device),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.decoding", description=__doc__.splitlines()[0]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--model", choices=SHAPES, default="tiny", help="default tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--backend", choices=("auto", "torch", "triton"), default="auto", help="of the mixers"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024], help="tokens read")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="rows")
    for name, default in {"tokens": 32, "window": 512, "repeats": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print a line of JSON for every case; returns 1 if one failed."""
    options, failed = parse(arguments), False
    for variant in VARIANTS:
        model = make_model(variant, options)
        for prompt in options.prompts:
            for batch in options.batches:
                case: dict[str, Any] = {"variant": variant, "prompt": prompt, "batch": batch}
                try:
                    case |= measured(model, variant, prompt, batch, options)
                except RuntimeError as error:  # the cache of a long prompt may not fit
                    failed = True
                    case["failed"] = str(error).splitlines()[0]
                sys.stdout.write(json.dumps(case) + "\n")
                sys.stdout.flush()
        del model
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
