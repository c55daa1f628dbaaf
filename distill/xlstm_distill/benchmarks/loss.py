"""Compare the fused and the plain loss: `python -m xlstm_distill.benchmarks.loss --hidden 2048`.

Each loss runs forward and backward on the same random inputs, in a process of its own, so that its
peak memory is its own. The two must agree in value and in the gradients of hidden states and head;
otherwise nothing is reported.
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

# The paper's weights (Eq. 13).
WEIGHTS = LossWeights(cross_entropy=0.9, kl=0.1)
PROBES = 1024
"""Entries of a gradient that the two losses compare, at random places of the head."""
# fp32 in another order of summation, and bf16 with its 8 significant bits.
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
        """Draw from a seed, in place: a temporary copy would show in the peak memory."""
        generator = torch.Generator(options.device).manual_seed(0)
        device, tokens, vocabulary = options.device, options.tokens, options.vocabulary
        hidden = torch.empty(tokens, options.hidden, device=device).normal_(generator=generator)
        # 0.02 is the size of a head's weights at its initialisation (Llama's initializer_range).
        weight = torch.empty(vocabulary, options.hidden, device=device).normal_(
            std=0.02, generator=generator
        )
        labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        targets = random_targets(tokens, vocabulary, options.top_k, device)
        # Only now, because in-place drawing into a leaf that needs gradients is an error.
        return cls(hidden.requires_grad_(), weight.requires_grad_(), labels, targets)


def random_targets(tokens: int, vocabulary: int, top_k: int, device: str) -> SparseTargets:
    """Make targets with `top_k` different ids for each token, spread over the vocabulary."""
    generator = torch.Generator(device).manual_seed(2)
    # A stride through the vocabulary gives different ids without a permutation of it for each
    # token.
    first = torch.randint(vocabulary, (tokens, 1), generator=generator, device=device)
    ids = (first + torch.arange(top_k, device=device) * (vocabulary // top_k)) % vocabulary
    log_probs = torch.randn(tokens, top_k, generator=generator, device=device).log_softmax(dim=-1)
    return SparseTargets(ids, log_probs, torch.zeros(tokens, device=device))


def weighted_loss(kind: str, inputs: Inputs, chunk: int | None) -> Tensor:
    """Compute the loss that stage II differentiates; `kind`: `fused` or `plain`."""
    if kind == "fused":
        return linear_distill_loss(
            inputs.hidden,
            inputs.weight,
            None,
            inputs.labels,
            inputs.targets,
            WEIGHTS,
            chunk=chunk,
        )[0]
    parts = distill_loss(linear(inputs.hidden, inputs.weight), inputs.labels, inputs.targets)
    return WEIGHTS.cross_entropy * parts.cross_entropy + WEIGHTS.kl * parts.kl


def measure(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Run a loss `repeats` times; return seconds, peak memory over the inputs, and figures."""
    inputs = Inputs.draw(options)
    seconds: list[float] = []
    # After the inputs are made: both losses need these.
    before = peak_bytes(inputs.hidden.device)
    for _ in range(options.repeats):
        # Otherwise the second repetition would add to the gradients of the first.
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
    # The process sends a sample: the head's gradient alone has 262 million entries at these sizes.
    stride = max(1, inputs.hidden.numel() // PROBES)
    places = _probes(inputs.labels, options.vocabulary).to(options.device)
    figures = {
        "loss": [float(loss.detach())],
        "hidden gradient": inputs.hidden.grad.flatten()[::stride].tolist(),
        "head gradient": inputs.weight.grad[places, 0].tolist(),
    }
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "head_gradient_bytes": inputs.weight.nbytes,
        "figures": figures,
    }


def _probes(labels: Tensor, vocabulary: int) -> Tensor:
    """Choose rows of the head's gradient to compare: half of them of labels, which weigh most."""
    places = torch.randint(vocabulary, (PROBES,), generator=torch.Generator().manual_seed(1))
    half = PROBES // 2
    places[:half] = labels[:half].cpu()[torch.arange(half) % len(labels)]
    return places


def clock(device: torch.device) -> float:
    """Return the time in seconds: the process's own on a CPU, the wall clock on CUDA.

    Other processes disturb a process's own time less.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def disagreement(fused: dict[str, list[float]], plain: dict[str, list[float]]) -> dict[str, float]:
    """Return the RMS ratio of the error of each of the fused loss's figures to the plain one's."""
    ratios = {}
    for name, expected in plain.items():
        a, b = (torch.tensor(values, dtype=torch.float64) for values in (fused[name], expected))
        # RMS ratio and not the largest relative error: single entries near zero would decide that
        # one.
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
    """Show the comparison as Markdown."""
    plain, fused = results["plain"], results["fused"]
    # Both losses return the head's gradient, so the table also shows what they need beside it.
    gradient = plain["head_gradient_bytes"]
    agreement = ", ".join(f"{name} {ratio:.1e}" for name, ratio in ratios.items())
    lines = [
        f"{options.device}, {options.dtype}, N {options.tokens}, V {options.vocabulary}, "
        f"d {options.hidden}, k {options.top_k}, torch {torch.__version__}; "
        f"fused to plain, RMS ratio: {agreement}.",
        "",
        "| loss | peak over inputs, MiB | of it beside the head's gradient "
        "| seconds, median (range) |",
        "|---|---|---|---|",
    ]
    for name, result in results.items():
        seconds, peak = result["seconds"], result["peak_bytes"]
        lines.append(
            f"| {name} | {peak / MIB:.0f} | {(peak - gradient) / MIB:.0f} "
            f"| {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |"
        )
    times = statistics.median(plain["seconds"]) / statistics.median(fused["seconds"])
    all_memory = plain["peak_bytes"] / fused["peak_bytes"]
    less = (plain["peak_bytes"] - gradient) / (fused["peak_bytes"] - gradient)
    lines.append(f"| plain / fused | {all_memory:.1f} | {less:.1f} | {times:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure both losses; return the exit status, 1 if they disagree."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    # One thread by default: CPU time is then wall time of one core, and repeatable.
    torch.set_num_threads(options.threads)
    if options.only:
        sys.stdout.write(json.dumps(measure(options.only, options)) + "\n")
        return 0
    results = {}
    for kind in ("plain", "fused"):
        # A process each, since peak memory is a figure of the process.
        module = [sys.executable, "-m", "xlstm_distill.benchmarks.loss"]
        command = [*module, *arguments, "--only", kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[kind] = json.loads(done.stdout)
    ratios = disagreement(results["fused"].pop("figures"), results["plain"].pop("figures"))
    # `not ... <` and not `>=`: NaN must fail.
    if not max(ratios.values()) < BOUNDS[options.dtype]:
        sys.stderr.write(
            f"the losses disagree, nothing is reported: {ratios}; "
            f"allowed {BOUNDS[options.dtype]:.0e}\n"
        )
        return 1
    text = json.dumps({"options": vars(options), "disagreement": ratios, **results})
    sys.stdout.write((text if options.json else table(results, ratios, options)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
