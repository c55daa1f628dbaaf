"""Time and memory of the fused loss against the plain one: `python -m xlstm_distill.benchmarks.loss --hidden 2048`.

Each loss runs forward and backward in a process of its own, on the same random inputs, so that its peak is its own. The
two must agree, in value and in the gradients of hidden states and head, before anything is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from xlstm_distill.losses.fused import linear_distill_loss
from xlstm_distill.losses.plain import LossWeights, distill_loss
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.runtime.device import peak_bytes

WEIGHTS = LossWeights(cross_entropy=0.9, kl=0.1)
PROBES = 1024
"""Entries of a gradient that the two losses compare, at random places of the head."""
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest RMS ratio of the fused loss's figures to the plain one's."""
MIB = 2**20


@dataclass(frozen=True)
class Inputs:
    """Random hidden states (N, d), head (V, d), labels (N,) and targets of k tokens."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    targets: SparseTargets

    @classmethod
    def draw(cls, options: argparse.Namespace) -> Inputs:
        """Draw from a seed, in place, so that making them needs no more memory than they do."""
        generator = torch.Generator(options.device).manual_seed(0)
        device, tokens, vocabulary = options.device, options.tokens, options.vocabulary
        hidden = torch.empty(tokens, options.hidden, device=device).normal_(generator=generator)
        weight = torch.empty(vocabulary, options.hidden, device=device).normal_(
            std=0.02, generator=generator
        )
        labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        targets = random_targets(tokens, vocabulary, options.top_k, device)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), labels, targets)


def random_targets(tokens: int, vocabulary: int, top_k: int, device: str) -> SparseTargets:
    """Targets with `top_k` different ids for each token, spread over the vocabulary."""
    generator = torch.Generator(device).manual_seed(2)
    first = torch.randint(vocabulary, (tokens, 1), generator=generator, device=device)
    ids = (first + torch.arange(top_k, device=device) * (vocabulary // top_k)) % vocabulary
    log_probs = torch.randn(tokens, top_k, generator=generator, device=device).log_softmax(dim=-1)
    return SparseTargets(ids, log_probs, torch.zeros(tokens, device=device))


def weighted_loss(kind: str, inputs: Inputs, chunk: int | None) -> Tensor:
    """The loss that stage II differentiates, `fused` or `plain`."""
    if kind == "fused":
        return linear_distill_loss(
            inputs.hidden, inputs.weight, None, inputs.labels, inputs.targets, WEIGHTS, chunk=chunk,
        )[0]  # fmt: skip
    parts = distill_loss(linear(inputs.hidden, inputs.weight), inputs.labels, inputs.targets)
    return WEIGHTS.cross_entropy * parts.cross_entropy + WEIGHTS.kl * parts.kl


def measure(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Run a loss `repeats` times; its seconds, its peak memory over the inputs, and figures to compare."""
    inputs = Inputs.draw(options)
    seconds: list[float] = []
    before = peak_bytes(inputs.hidden.device)
    for _ in range(options.repeats):
        inputs.hidden.grad = inputs.weight.grad = None
        start = clock(inputs.hidden.device)
        with torch.autocast(
            options.device, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"
        ):
            loss = weighted_loss(kind, inputs, options.chunk)
        loss.backward()
        seconds.append(clock(inputs.hidden.device) - start)
    peak = peak_bytes(inputs.hidden.device) - before
    assert inputs.hidden.grad is not None
    assert inputs.weight.grad is not None
    places = torch.randint(
        options.vocabulary, (PROBES,), generator=torch.Generator().manual_seed(1)
    )
    places[: PROBES // 2] = inputs.labels[: PROBES // 2].cpu()[
        torch.arange(PROBES // 2) % len(inputs.labels)
    ]
    figures = {
        "loss": [float(loss.detach())],
        "hidden gradient": inputs.hidden.grad.flatten()[
            :: max(1, inputs.hidden.numel() // PROBES)
        ].tolist(),
        "head gradient": inputs.weight.grad[places.to(options.device), 0].tolist(),
    }
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "head_gradient_bytes": inputs.weight.nbytes,
        "figures": figures,
    }


def clock(device: torch.device) -> float:
    """Seconds: of processor time on a CPU, which other processes disturb less, of the wall clock on CUDA."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def disagreement(fused: dict[str, list[float]], plain: dict[str, list[float]]) -> dict[str, float]:
    """RMS ratio of each of the fused loss's figures to the plain one's."""
    ratios = {}
    for name, expected in plain.items():
        a, b = (torch.tensor(values, dtype=torch.float64) for values in (fused[name], expected))
        ratios[name] = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
    return ratios


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.loss", description=__doc__.splitlines()[0]
    )
    sizes = {
        "tokens": 4096,
        "vocabulary": 128256,
        "hidden": 2048,
        "top-k": 256,
        "repeats": 3,
        "threads": 1,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--chunk", type=int, help="tokens at a time; default: as many as 256 MiB of logits hold"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=device, help=f"default {device}"
    )
    parser.add_argument(
        "--dtype", choices=BOUNDS, default="float32", help="bfloat16: autocast; default float32"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--only", choices=("plain", "fused"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def table(results: dict[str, dict], ratios: dict[str, float], options: argparse.Namespace) -> str:
    """The comparison as Markdown."""
    plain, fused = results["plain"], results["fused"]
    gradient = plain["head_gradient_bytes"]
    lines = [
        f"{options.device}, {options.dtype}, N {options.tokens}, V {options.vocabulary}, d {options.hidden}, "
        f"k {options.top_k}, torch {torch.__version__}; fused to plain, RMS ratio: "
        + ", ".join(f"{name} {ratio:.1e}" for name, ratio in ratios.items()) + ".",
        "",
        "| loss | peak over inputs, MiB | of it beside the head's gradient | seconds, median (range) |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for name, r in results.items():
        s = r["seconds"]
        lines.append(
            f"| {name} | {r['peak_bytes'] / MIB:.0f} | {(r['peak_bytes'] - gradient) / MIB:.0f} "
            f"| {statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f}) |"
        )
    times = statistics.median(plain["seconds"]) / statistics.median(fused["seconds"])
    less = (plain["peak_bytes"] - gradient) / (fused["peak_bytes"] - gradient)
    lines.append(
        f"| plain / fused | {plain['peak_bytes'] / fused['peak_bytes']:.1f} | {less:.1f} | {times:.2f} |"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure both losses; returns the exit status, 1 if they disagree."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.only:
        sys.stdout.write(json.dumps(measure(options.only, options)) + "\n")
        return 0
    results = {}
    for kind in ("plain", "fused"):
        command = [
            sys.executable,
            "-m",
            "xlstm_distill.benchmarks.loss",
            *arguments,
            "--only",
            kind,
        ]
        results[kind] = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
    ratios = disagreement(results["fused"].pop("figures"), results["plain"].pop("figures"))
    if not max(ratios.values()) < BOUNDS[options.dtype]:
        sys.stderr.write(
            f"the losses disagree, nothing is reported: {ratios}; allowed {BOUNDS[options.dtype]:.0e}\n"
        )
        return 1
    text = json.dumps({"options": vars(options), "disagreement": ratios, **results})
    sys.stdout.write((text if options.json else table(results, ratios, options)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
