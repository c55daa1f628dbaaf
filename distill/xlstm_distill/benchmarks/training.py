"""Time stage II: `python -m xlstm_distill.benchmarks.training --model 1b`.

Every variant trains the same randomly initialised Llama on the same rows, one document each, with
the training loop's optimiser and precision. `attention` keeps the teacher's own attention. Variants
take turns, so that all meet the same conditions in a round. Each runs in a process of its own, so
that its peak memory is its own. First, fused and plain loss must agree on the student, in value and
gradients; otherwise nothing is timed. Each run is a line of JSON in `--out` as soon as it is there;
started again with that file, the benchmark makes what is missing there.

MFU is the rate of useful operations (`planning.flops`; with the teacher online, its forward pass
too) over the device's peak: the published one of a known GPU, elsewhere the rate of a large product
measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_distill.benchmarks.kept import Kept
from xlstm_distill.benchmarks.llamas import MODELS
from xlstm_distill.benchmarks.loss import BOUNDS, MIB, clock, random_targets
from xlstm_distill.data.rows import IGNORE_INDEX, Batch
from xlstm_distill.losses.plain import LossWeights, distill_loss
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.student import convert
from xlstm_distill.planning.architecture import read_architecture
from xlstm_distill.planning.flops import MixerShape, token_flops
from xlstm_distill.recipe import MixerConfig, Optimization
from xlstm_distill.runtime.device import peak_bytes, published_peak
from xlstm_distill.targets.providers import OnlineTargets, TargetSource, kept_logits
from xlstm_distill.training.objectives import DistillObjective, Sums, checkpoint_activations
from xlstm_distill.training.optim import make_optimizer
from xlstm_kernels.benchmarks.parts import DONE, UNFINISHED, WITH_FAILURES
from xlstm_kernels.benchmarks.parts import seconds as allowed_seconds
from xlstm_kernels.benchmarks.timing import OutOfTime, alarm

# The paper's weights (Eq. 13).
WEIGHTS = LossWeights(cross_entropy=0.9, kl=0.1)
PRODUCT = 1024
"""Width of the product that is timed where no peak is published."""


@dataclass(frozen=True)
class Variant:
    """What is trained (`student` or `attention`), its loss, and where its targets come from."""

    model: str
    loss: str
    targets: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.model}, {self.loss} loss, targets {self.targets}"


VARIANTS = (
    Variant("student", "fused", "stored"),
    Variant("student", "plain", "stored"),
    Variant("student", "fused", "online"),
    Variant("attention", "fused", "stored"),
    Variant("attention", "plain", "stored"),
)


class PlainObjective(DistillObjective):
    """Stage II with the plain formula: logits of all kept tokens at once."""

    def forward(self, batch: Batch) -> Sums:
        """Weighted loss summed over kept tokens."""
        logits = kept_logits(self.student, batch, segment_ids=batch.segment_ids)
        labels = batch.labels.flatten()[batch.kept]
        parts = distill_loss(logits, labels, self.targets(batch))
        loss = self.weights.cross_entropy * parts.cross_entropy + self.weights.kl * parts.kl
        return Sums(loss, {"ce": parts.cross_entropy.detach(), "kl": parts.kl.detach()})


class FixedTargets:
    """The same targets for every batch, as if read from a store."""

    def __init__(self, targets: SparseTargets) -> None:
        self.targets = targets

    def __call__(self, batch: Batch) -> SparseTargets:
        return self.targets


def random_batch(options: argparse.Namespace) -> Batch:
    """Rows of one document each; every token but the last is supervised."""
    # Random ids: speed and memory depend on shapes, not on text.
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.context)
    ids = torch.randint(MODELS[options.model]["vocab_size"], shape, generator=generator)
    # The last token has no next one.
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], dim=1)
    positions = torch.arange(options.context).repeat(options.batch, 1)
    rows = tuple(("random", row) for row in range(options.batch))
    batch = Batch(
        ids, positions, torch.zeros_like(ids), labels, torch.ones_like(ids, dtype=torch.bool), rows
    )
    return batch.to(torch.device(options.device))


def make_model(variant: Variant, options: argparse.Namespace) -> tuple[CausalLM, CausalLM | None]:
    """Make the model to train, in fp32, and an online teacher in the run's precision."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODELS[options.model], max_position_embeddings=options.context, use_cache=False
    )
    with torch.device(options.device):
        teacher = LlamaForCausalLM(config)
    online = variant.targets == "online"
    model: CausalLM = teacher
    if variant.model == "student":
        mixer = MixerConfig(window=options.window, sinks=options.sinks)
        # With an online teacher the student needs weights of its own: it trains, and the teacher
        # goes to another dtype.
        model = convert(teacher, mixer, share_weights=not online)
    if options.checkpointing:
        checkpoint_activations(model)
    # Stage II trains all parameters.
    model.train().requires_grad_(True)
    return model, teacher.to(getattr(torch, options.dtype)) if online else None


def make_objective(variant: Variant, options: argparse.Namespace, batch: Batch) -> DistillObjective:
    """The objective that a variant trains."""
    model, teacher = make_model(variant, options)
    source: TargetSource = FixedTargets(
        random_targets(
            len(batch.kept), MODELS[options.model]["vocab_size"], options.top_k, options.device
        )
    )
    if teacher is not None:
        source = OnlineTargets(teacher, options.top_k)
    kind = DistillObjective if variant.loss == "fused" else PlainObjective
    return kind(model, source, WEIGHTS)


def make_accelerator(options: argparse.Namespace) -> Accelerator:
    """Make the accelerator of one process; bf16 is autocast over fp32 weights."""
    return Accelerator(
        mixed_precision="bf16" if options.dtype == "bfloat16" else "no", cpu=options.device == "cpu"
    )


def backward(wrapped: nn.Module, batch: Batch, tokens: int, accelerator: Accelerator) -> float:
    """Run one batch forward and backward; return the loss per token."""
    # The objective returns a sum over kept tokens.
    loss: Tensor = wrapped(batch).loss / tokens
    accelerator.backward(loss)
    return float(loss.detach())


def measure(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Train a variant; return the seconds of every step after the warm-up, peak memory and MFU."""
    batch, accelerator = random_batch(options), make_accelerator(options)
    objective = make_objective(variant, options, batch)
    optimizer = make_optimizer(
        objective.named_parameters(), Optimization(batch=options.batch, lr=1e-5)
    )
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    tokens, seconds = objective.count(batch), []
    for step in range(options.warmup + options.steps):
        start = clock(accelerator.device)
        backward(wrapped, batch, tokens, accelerator)
        # Clipping at 1.0 is part of the paper's step, and costs a pass over the gradients.
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # The first steps compile kernels and allocate memory.
        if step >= options.warmup:
            seconds.append(clock(accelerator.device) - start)
    memory = peak_bytes(accelerator.device)
    per_token = useful_flops(variant, options, tokens / batch.input_ids.numel())
    # Tokens of the rows and not supervised ones, as everywhere tokens/s are given.
    rate = batch.input_ids.numel() / statistics.median(seconds)
    # Measured after the steps: on an unknown device this runs large products.
    peak, origin = peak_rate(accelerator.device, options)
    return {
        "tokens_per_second": rate,
        "mfu": rate * per_token / peak,
        "flops_per_token": per_token,
        "peak_flops": peak,
        "peak_origin": origin,
        "peak_bytes": memory,
        "seconds": seconds,
        "device": device_name(accelerator.device),
    }


def measured(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a variant; where memory does not suffice, say so instead."""
    try:
        return measure(variant, options)
    except torch.OutOfMemoryError as error:
        return {"failed": "out of memory", "reason": str(error)}


def useful_flops(variant: Variant, options: argparse.Namespace, supervised: float) -> float:
    """Count the operations per token of a training step, with an online teacher's forward pass."""
    architecture = read_architecture(LlamaConfig(**MODELS[options.model]).to_dict(), "config")
    attention = token_flops(architecture, options.context)
    mixer = MixerShape(options.window, options.sinks, architecture.head_dim)
    student = token_flops(architecture, options.context, mixer)
    model = student if variant.model == "student" else attention
    # Its forward pass is useful work: without a store it must be done in every step.
    teacher = attention.forward(supervised) if variant.targets == "online" else 0.0
    return model.training(supervised) + teacher


def peak_rate(device: torch.device, options: argparse.Namespace) -> tuple[float, str]:
    """Return the operations a second that the device could do, and where the figure is from."""
    if options.peak_tflops is not None:
        return 1e12 * options.peak_tflops, "given"
    if options.dtype == "bfloat16" and (known := published_peak(device)):
        return known[0], f"published for {known[1]}"
    n = PRODUCT * (8 if device.type == "cuda" else 1)  # a GPU needs more work to reach its rate
    a = torch.randn(n, n, device=device, dtype=getattr(torch, options.dtype))
    times = []
    for _ in range(8):
        start = clock(device)
        a @ a
        times.append(clock(device) - start)
    seconds = statistics.median(times[2:])  # the first two warm up
    return 2 * n**3 / seconds, f"product of {n} x {n}, {options.dtype}"


def device_name(device: torch.device) -> str:
    """Name the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def check(options: argparse.Namespace) -> dict[str, float]:
    """Compare fused and plain loss on the student and one row; return RMS ratios of the errors."""
    # One row: the gradients of both losses are held at the same time.
    options = argparse.Namespace(**{**vars(options), "batch": 1})
    batch, accelerator = random_batch(options), make_accelerator(options)
    found = []
    for variant in VARIANTS[:2]:
        objective = make_objective(variant, options, batch)
        loss = backward(accelerator.prepare(objective), batch, objective.count(batch), accelerator)
        found.append((loss, [p.grad for p in objective.parameters() if p.grad is not None]))
    (fused_loss, fused), (plain_loss, plain) = found
    error = scale = 0.0
    for a, b in zip(fused, plain, strict=True):
        error += float((a - b).double().square().sum())
        scale += float(b.double().square().sum())
    return {"loss": abs(fused_loss - plain_loss) / plain_loss, "gradient": (error / scale) ** 0.5}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; sizes that are not given depend on the model."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.training", description=__doc__.splitlines()[0]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=device, help=f"default {device}"
    )
    parser.add_argument(
        "--model", choices=MODELS, default="small", help="randomly initialised Llama; default small"
    )
    parser.add_argument(
        "--dtype", choices=BOUNDS, help="default bfloat16 on CUDA, float32 on a CPU"
    )
    sizes = {
        "batch": 2,
        "top-k": 256,
        "sinks": 4,
        "warmup": 2,
        "steps": 5,
        "repeats": 3,
        "threads": 1,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--context", type=int, help="tokens of a row; default 512 (small), 4096 (1b)"
    )
    parser.add_argument("--window", type=int, help="default 64 (small), 512 (1b)")
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute activations again in the backward pass",
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="rate that MFU is a share of, in place of the known one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--out", type=Path,
        help="a file that gets a line of JSON for every run; one that is there is not run again",
    )  # fmt: skip
    parser.add_argument(
        "--budget-s", type=allowed_seconds, help="seconds after which to stop, with what there is"
    )
    parser.add_argument(
        "--only", choices=("check", *map(str, range(len(VARIANTS)))), help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    small = options.model == "small"
    options.context = options.context or (512 if small else 4096)
    options.window = options.window or (64 if small else 512)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def table(
    rounds: list[list[dict[str, Any]]], agreement: dict[str, float], options: argparse.Namespace
) -> str:
    """Show the variants as Markdown: medians over rounds, and the range of tokens/s."""
    measurements = [run for runs in rounds for run in runs if "device" in run]
    origins = sorted({f"{run['device']}; {run['peak_origin']}" for run in measurements})
    peak = statistics.median([run["peak_flops"] for run in measurements] or [0.0])
    shape = f"{options.batch} rows of {options.context} tokens"
    lines = [
        f"{', '.join(origins)}: MFU is a share of {peak / 1e12:.3g} TFLOP/s.",
        f"{options.dtype}, model {options.model}, {shape}, window {options.window}, "
        f"top {options.top_k}; torch {torch.__version__}, transformers {transformers.__version__}. "
        f"Fused to plain, RMS ratio: loss {agreement['loss']:.1e}, gradient "
        f"{agreement['gradient']:.1e}.",
        "",
        "| variant | tokens/s (range) | to the first | MFU | MFLOP/token | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    columns = list(zip(*rounds, strict=True))
    first = _median(columns[0], "tokens_per_second")
    rows = zip(VARIANTS, columns, strict=True)
    return "\n".join([*lines, *(_row(variant, runs, first) for variant, runs in rows)])


def _row(variant: Variant, runs: Sequence[dict[str, Any]], first: float) -> str:
    """Show one variant; `first` is the first variant's tokens/s, 0 where it failed."""
    failures = [run["failed"] for run in runs if "failed" in run]
    if failures:
        return f"| {variant.name} | {failures[0]} | | | | |"
    rates = [run["tokens_per_second"] for run in runs]
    rate = statistics.median(rates)
    relative = f"{rate / first:.2f}" if first else ""
    megaflops, mebibytes = runs[0]["flops_per_token"] / 1e6, _median(runs, "peak_bytes") / MIB
    return (
        f"| {variant.name} | {rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {relative} "
        f"| {_median(runs, 'mfu'):.1%} | {megaflops:,.1f} | {mebibytes:,.0f} |"
    )


def _median(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Median of a figure over the runs that have it; 0 where none has."""
    return statistics.median([run[key] for run in runs if key in run] or [0.0])


def child(arguments: list[str], only: str) -> Any:
    """Run a part of the benchmark in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "xlstm_distill.benchmarks.training",
        *arguments,
        "--only",
        only,
    ]
    # stderr is not taken: warnings and progress stay visible.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    # The last line: a library may print before it.
    return json.loads(done.stdout.splitlines()[-1])


def run_once(
    kept: Kept, arguments: list[str], only: str, number: int = 0, name: str = "check"
) -> dict[str, Any]:
    """Return what a run of the benchmark found, now or at an earlier start; number: its round."""
    key = {"run": only, "round": number}
    found = kept.known(**key)
    if found is None:
        found = key | child(arguments, only)
        kept.add(found)
        rate = found.get("tokens_per_second")
        said = f"{rate:,.0f} tokens/s" if rate else found.get("failed", "made")
        sys.stderr.write(f"round {number + 1}, {name}: {said}\n")
    return {name: value for name, value in found.items() if name not in key}


def measure_all(
    arguments: list[str], options: argparse.Namespace
) -> tuple[dict[str, float], list[list[dict[str, Any]]]]:
    """Return how far the losses disagree, and the runs of each round; none if they do."""
    kept = Kept(options.out, options)
    agreement = run_once(kept, arguments, "check")
    rounds: list[list[dict[str, Any]]] = []
    if max(agreement.values()) < BOUNDS[options.dtype]:
        # Rounds and not variant after variant: a machine that gets slower meanwhile then hits all
        # alike.
        for number in range(options.repeats):
            rounds.append([])
            for n, variant in enumerate(VARIANTS):
                rounds[-1].append(run_once(kept, arguments, str(n), number, variant.name))
    return agreement, rounds


def main(arguments: list[str] | None = None) -> int:
    """Check the losses, then let the variants take turns.

    Returns 1 if the losses disagree, else the exit status (`xlstm_kernels.benchmarks.parts`).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.only:
        if options.only == "check":
            found = check(options)
        else:
            found = measured(VARIANTS[int(options.only)], options)
        sys.stdout.write(json.dumps(found) + "\n")
        return DONE
    try:
        with alarm(options.budget_s):
            agreement, rounds = measure_all(arguments, options)
    except OutOfTime:
        sys.stderr.write("Stopped: the time of --budget-s is up.\n")
        return UNFINISHED
    if not rounds:
        allowed = BOUNDS[options.dtype]
        sys.stderr.write(
            f"fused and plain loss disagree, nothing is timed: {agreement}; "
            f"allowed: {allowed:.0e}\n"
        )
        return 1
    columns = zip(*rounds, strict=True)
    results = {variant.name: runs for variant, runs in zip(VARIANTS, columns, strict=True)}
    text = json.dumps(
        {"options": vars(options), "disagreement": agreement, "variants": results},
        indent=1, default=str,
    )  # fmt: skip
    sys.stdout.write((text if options.json else table(rounds, agreement, options)) + "\n")
    failed = any("failed" in run for runs in rounds for run in runs)
    return WITH_FAILURES if failed else DONE


if __name__ == "__main__":
    sys.exit(main())
