"""Time stage II, its parts and full-attention fine-tuning: `python -m xlstm_distill.benchmarks.training --model 1b`.

Every variant trains the same randomly initialised Llama on the same rows, one document each, with the training loop's
optimiser and precision; `attention` keeps the teacher's own attention. Variants take turns, each time in a process of
its own, so that a round meets the same conditions and each peak of memory is one variant's. Before any of it, fused and
plain loss must agree on the student in value and gradients.

MFU is useful operations (`flops.py`; with the teacher online, its forward too) over what the device could do: its
published peak on a known GPU, elsewhere the rate of a large product measured in the same process.
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
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_distill.benchmarks.loss import BOUNDS, MIB, clock, random_targets
from xlstm_distill.data.rows import IGNORE_INDEX, Batch
from xlstm_distill.losses.plain import distill_loss
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.student import convert
from xlstm_distill.planning.architecture import read_architecture
from xlstm_distill.planning.flops import MixerShape, token_flops
from xlstm_distill.recipe import MixerConfig, Optimization
from xlstm_distill.runtime.device import peak_bytes, published_peak
from xlstm_distill.targets.providers import OnlineTargets, TargetSource, kept_logits
from xlstm_distill.training.objectives import DistillObjective, Sums
from xlstm_distill.training.optim import make_optimizer

CE_WEIGHT, KL_WEIGHT = 0.9, 0.1
MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 32768, "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Llama configurations by name; 1b has the shape of Llama 3.2 1B."""
PRODUCT = 1024
"""Width of the product that is timed where no peak is published."""


@dataclass(frozen=True)
class Variant:
    """What is trained: the student or the model with its own attention; the loss; where targets come from."""

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
        parts = distill_loss(
            logits, batch.labels[batch.labels != IGNORE_INDEX], self.targets(batch)
        )
        loss = self.ce_weight * parts.cross_entropy + self.kl_weight * parts.kl
        return Sums(loss, {"ce": parts.cross_entropy.detach(), "kl": parts.kl.detach()})


class FixedTargets:
    """The same targets for every batch, as if read from a store."""

    def __init__(self, targets: SparseTargets) -> None:
        self.targets = targets

    def __call__(self, batch: Batch) -> SparseTargets:
        return self.targets


def random_batch(options: argparse.Namespace) -> Batch:
    """Rows of one document each; every token but the last is supervised."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.context)
    ids = torch.randint(MODELS[options.model]["vocab_size"], shape, generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], dim=1)
    positions = torch.arange(options.context).repeat(options.batch, 1)
    rows = tuple(("random", row) for row in range(options.batch))
    batch = Batch(
        ids, positions, torch.zeros_like(ids), labels, torch.ones_like(ids, dtype=torch.bool), rows
    )
    return batch.to(torch.device(options.device))


def make_model(variant: Variant, options: argparse.Namespace) -> tuple[CausalLM, CausalLM | None]:
    """The model to train, fp32, and the teacher where it is online, in the precision of the run."""
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
        model = convert(teacher, mixer, share_weights=not online)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train().requires_grad_(True), teacher.to(
        getattr(torch, options.dtype)
    ) if online else None


def make_objective(variant: Variant, options: argparse.Namespace, batch: Batch) -> DistillObjective:
    """The objective that a variant trains."""
    model, teacher = make_model(variant, options)
    kept = int((batch.labels != IGNORE_INDEX).sum())
    source: TargetSource = FixedTargets(
        random_targets(kept, MODELS[options.model]["vocab_size"], options.top_k, options.device)
    )
    if teacher is not None:
        source = OnlineTargets(teacher, options.top_k)
    kind = DistillObjective if variant.loss == "fused" else PlainObjective
    return kind(model, source, CE_WEIGHT, KL_WEIGHT)


def make_accelerator(options: argparse.Namespace) -> Accelerator:
    """One process; bf16 is autocast over fp32 weights."""
    return Accelerator(
        mixed_precision="bf16" if options.dtype == "bfloat16" else "no", cpu=options.device == "cpu"
    )


def backward(wrapped: nn.Module, batch: Batch, tokens: int, accelerator: Accelerator) -> float:
    """Forward and backward of one batch; returns the loss per token."""
    loss: Tensor = wrapped(batch).loss / tokens
    accelerator.backward(loss)
    return float(loss.detach())


def measure(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Train a variant: seconds of every step after the warm-up, peak memory, and the share of the device's rate."""
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
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= options.warmup:
            seconds.append(clock(accelerator.device) - start)
    memory = peak_bytes(accelerator.device)
    per_token = useful_flops(variant, options, tokens / batch.input_ids.numel())
    rate = batch.input_ids.numel() / statistics.median(seconds)
    peak, origin = peak_rate(accelerator.device, options)
    return {
        "tokens_per_second": rate, "mfu": rate * per_token / peak, "flops_per_token": per_token,
        "peak_flops": peak, "peak_origin": origin, "peak_bytes": memory,
        "seconds": seconds, "device": device_name(accelerator.device),
    }  # fmt: skip


def measured(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """`measure`, or why there is nothing to report."""
    try:
        return measure(variant, options)
    except torch.OutOfMemoryError as error:
        return {"failed": "out of memory", "reason": str(error)}


def useful_flops(variant: Variant, options: argparse.Namespace, supervised: float) -> float:
    """Operations per token of a training step, and of the teacher's forward where it is online."""
    architecture = read_architecture(LlamaConfig(**MODELS[options.model]).to_dict(), "config")
    attention = token_flops(architecture, options.context)
    mixer = MixerShape(options.window, options.sinks, architecture.head_dim)
    model = (
        token_flops(architecture, options.context, mixer)
        if variant.model == "student"
        else attention
    )
    teacher = attention.forward(supervised) if variant.targets == "online" else 0.0
    return model.training(supervised) + teacher


def peak_rate(device: torch.device, options: argparse.Namespace) -> tuple[float, str]:
    """Operations a second that the device could do, and where the figure is from."""
    if options.peak_tflops is not None:
        return 1e12 * options.peak_tflops, "given"
    if options.dtype == "bfloat16" and (known := published_peak(device)):
        return known[0], f"published for {known[1]}"
    n = PRODUCT * (8 if device.type == "cuda" else 1)
    a = torch.randn(n, n, device=device, dtype=getattr(torch, options.dtype))
    times = []
    for _ in range(8):
        start = clock(device)
        a @ a
        times.append(clock(device) - start)
    return 2 * n**3 / statistics.median(times[2:]), f"product of {n} x {n}, {options.dtype}"


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    )


def check(options: argparse.Namespace) -> dict[str, float]:
    """RMS ratios of the fused loss and the model's gradient to the plain ones, on the student and one row."""
    options = argparse.Namespace(**{**vars(options), "batch": 1})
    batch, accelerator = random_batch(options), make_accelerator(options)
    found = []
    for variant in VARIANTS[:2]:
        objective = make_objective(variant, options, batch)
        loss = backward(accelerator.prepare(objective), batch, objective.count(batch), accelerator)
        found.append((loss, [p.grad for p in objective.parameters() if p.grad is not None]))
    (fused_loss, fused), (plain_loss, plain) = found
    error = sum(float((a - b).double().square().sum()) for a, b in zip(fused, plain, strict=True))
    scale = sum(float(b.double().square().sum()) for b in plain)
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
    """The variants as Markdown: medians over rounds, and the range of tokens/s."""
    shape = f"{options.batch} rows of {options.context} tokens, window {options.window}, top {options.top_k}"
    lines = [
        f"{options.dtype}, model {options.model}, {shape}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Fused to plain, RMS ratio: loss {agreement['loss']:.1e}, gradient "
        f"{agreement['gradient']:.1e}.",
        "",
        "| variant | tokens/s (range) | to the first | MFU | MFLOP/token | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    columns = list(zip(*rounds, strict=True))
    base = _median(columns[0], "tokens_per_second")
    for variant, runs in zip(VARIANTS, columns, strict=True):
        if failed := next((run["failed"] for run in runs if "failed" in run), None):
            lines.append(f"| {variant.name} | {failed} | | | | |")
            continue
        rates = [run["tokens_per_second"] for run in runs]
        lines.append(
            f"| {variant.name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) "
            f"| {f'{statistics.median(rates) / base:.2f}' if base else ''} | {_median(runs, 'mfu'):.1%} "
            f"| {runs[0]['flops_per_token'] / 1e6:,.1f} | {_median(runs, 'peak_bytes') / MIB:,.0f} |"
        )
    seen = {
        f"{run['device']}; {run['peak_origin']}"
        for runs in columns
        for run in runs
        if "device" in run
    }
    rate = statistics.median(
        [run["peak_flops"] for runs in columns for run in runs if "device" in run] or [0.0]
    )
    return "\n".join(
        [f"{', '.join(sorted(seen))}: MFU is a share of {rate / 1e12:.3g} TFLOP/s.", *lines]
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
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Check the losses, then let the variants take turns; returns the exit status, 1 if the losses disagree."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.only:
        found = (
            check(options)
            if options.only == "check"
            else measured(VARIANTS[int(options.only)], options)
        )
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    agreement = child(arguments, "check")
    if not max(agreement.values()) < BOUNDS[options.dtype]:
        allowed = BOUNDS[options.dtype]
        sys.stderr.write(
            f"fused and plain loss disagree, nothing is timed: {agreement}; allowed: {allowed:.0e}\n"
        )
        return 1
    rounds = [
        [child(arguments, str(n)) for n in range(len(VARIANTS))] for _ in range(options.repeats)
    ]
    results = {v.name: [r[n] for r in rounds] for n, v in enumerate(VARIANTS)}
    text = json.dumps(
        {"options": vars(options), "disagreement": agreement, "variants": results}, indent=1
    )
    sys.stdout.write((text if options.json else table(rounds, agreement, options)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
