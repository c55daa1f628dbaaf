"""Train the embedded teacher: `python -m xlstm_distill.embedded.train --out DIR`."""

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_distill.embedded.induction import start_with_induction
from xlstm_distill.embedded.items import COUNT
from xlstm_distill.embedded.packing import Batch, batches
from xlstm_distill.embedded.scoring import accuracies, by_level, outcomes
from xlstm_distill.embedded.tasks import TASKS
from xlstm_distill.embedded.tokenizer import train_tokenizer
from xlstm_distill.embedded.unfinished import Checkpoint, Progress
from xlstm_distill.errors import RunError, UserError

logger = logging.getLogger(__name__)

SCORED_EVERY = 1000  # steps between two checkpoints, each with a glance at held-out items
GLANCE = 20  # items of a task in such a glance


@dataclass(frozen=True)
class Settings:
    """Everything the checkpoint depends on, apart from the number of threads and the versions."""

    tokens: int = 11_000_000
    seed: int = 0
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    context: int = 384
    rope_theta: float = 500_000.0
    rows: int = 8
    learning_rate: float = 2e-3
    # Steps, not a share: a short training would begin with the full rate and lose its start.
    warmup_steps: int = 200
    decay_share: float = 0.5
    weight_decay: float = 0.05
    induction: bool = True

    @property
    def steps(self) -> int:
        """Count the steps that `tokens` row positions make."""
        return max(1, self.tokens // (self.rows * self.context))


def build(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained teacher, seeded."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=32,
        max_position_embeddings=settings.context,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    if settings.induction:
        start_with_induction(model, theta=settings.rope_theta)
    return model


def learning_rate(step: int, settings: Settings) -> float:
    """Warm up, hold, and decay linearly to zero over the last `decay_share` of the steps."""
    total = settings.steps
    up = min(1.0, (step + 1) / settings.warmup_steps)
    down = min(1.0, (total - step) / max(1.0, settings.decay_share * total))
    return settings.learning_rate * up * down


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return the weighted mean cross-entropy of the next token."""
    # Positions restart in each document, and the mask keeps documents apart.
    hidden = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.mask(),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1])
    each = F.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (each * weights).sum() / weights.sum()


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """Make AdamW; weight decay is for matrices, as norms' gains would be pulled to 0."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    checkpoint: Checkpoint,
) -> Progress:
    """Train for `settings.steps` steps, or go on with a checkpoint.

    Raises:
        RunError: the loss is not finite.
        UserError: the checkpoint is of other settings.
    """
    optimizer = make_optimizer(model, settings)
    progress = checkpoint.load(model, optimizer)
    stream = batches(tokenizer, settings.rows, settings.context, settings.seed)
    begun = time.perf_counter() - progress.seconds
    model.train()
    for step, batch in enumerate(islice(stream, progress.step, settings.steps), progress.step):
        loss = take_step(model, optimizer, batch, learning_rate(step, settings))
        if not math.isfinite(loss):
            raise RunError(f"train: the loss is {loss} at step {step}; lower the learning rate")
        progress.step, progress.seconds = step + 1, time.perf_counter() - begun
        if step % 50 == 0 or step == settings.steps - 1:
            _log_loss(progress, settings, loss)
        if progress.step % SCORED_EVERY == 0 and progress.step < settings.steps:
            _log_scores(progress, model, tokenizer)
            checkpoint.save(model, optimizer, progress)
    return progress


def take_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, rate: float
) -> float:
    """Take one step at a learning rate and return the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _log_loss(progress: Progress, settings: Settings, loss: float) -> None:
    seconds = round(progress.seconds, 1)
    progress.losses.append({"step": progress.step - 1, "loss": round(loss, 4), "seconds": seconds})
    rate = progress.step * settings.rows * settings.context / progress.seconds
    logger.info(
        "step %d of %d, loss %.4f, %.0f tokens/s", progress.step - 1, settings.steps, loss, rate
    )


def _log_scores(
    progress: Progress, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Score some held-out items, so that a training can be judged before it ends."""
    scores = accuracies(outcomes(model, tokenizer, count=GLANCE))
    model.train()
    progress.scores.append({"step": progress.step, "accuracy": scores})
    shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
    logger.info("step %d, %d held-out items a task: %s", progress.step, GLANCE, shown)


def train(out: Path, settings: Settings) -> dict[str, float]:
    """Train, score on held-out items, publish under `out`, and return the accuracies."""
    tokenizer = train_tokenizer(seed=settings.seed)
    model = build(settings, tokenizer)
    checkpoint = Checkpoint(out, asdict(settings))
    progress = fit(model, tokenizer, settings, checkpoint)
    found = outcomes(model, tokenizer, count=COUNT)
    scores = accuracies(found)
    log = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": settings.steps,
        "tokens": settings.steps * settings.rows * settings.context,
        "seconds": round(progress.seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "held_out_items_per_task": COUNT,
        "held_out_accuracy": scores,
        "held_out_items_and_accuracy_by_level": by_level(found),
        "held_out_items_at_a_glance": GLANCE,
        "held_out_accuracy_while_training": progress.scores,
        "loss": progress.losses,
    }
    publish(out, model, tokenizer, log)
    checkpoint.remove()
    return scores


def publish(
    out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: dict[str, Any]
) -> None:
    """Write model, tokenizer, log and card beside `out`, then rename: never an incomplete `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        fresh = Path(folder) / "new"
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "training.json").write_text(json.dumps(log, indent=1) + "\n")
        (fresh / "README.md").write_text(card(log))
        if out.exists():
            out.rename(Path(folder) / "old")
        fresh.rename(out)


def card(log: dict[str, Any]) -> str:
    """Write the model card."""
    rows = "\n".join(
        f"| {TASKS[name].domain} | {name} | {value:.2f} |"
        for name, value in log["held_out_accuracy"].items()
    )
    return f"""---
license: apache-2.0
library_name: transformers
---
# The embedded teacher

A Llama of {log["parameters"]:,} parameters, trained from scratch by
`python -m xlstm_distill.embedded.train` on generated conversations in four domains. It stands in
for a large teacher where there is no network and no GPU. It answers the tasks below and
nothing else. `training.json` holds settings, versions and loss curve; `docs/embedded-teacher.md`
says how tasks, split and training work.

- Training: {log["tokens"]:,} tokens, {log["steps"]:,} steps, {log["seconds"]:.0f} s
  (threads: {log["threads"]}), seed {log["settings"]["seed"]}
- Held-out accuracy, exact match, {log["held_out_items_per_task"]} items a task:

| domain | task | accuracy |
|---|---|---|
{rows}
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train; return the exit code."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.embedded.train", description="Train the embedded teacher."
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory to write; replaced when the training is done",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=defaults.tokens,
        help="tokens to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help="seed of weights and data (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; the committed teacher took 1 (default: 1)",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        for name in ("tokens", "threads"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name}: {getattr(options, name)}; allowed: 1 or more")
        torch.set_num_threads(options.threads)
        scores = train(options.out, Settings(tokens=options.tokens, seed=options.seed))
    except UserError as error:
        logger.error("%s", error)
        return 2
    except (RunError, OSError) as error:
        logger.error("train: %s", error)
        return 1
    for name, value in scores.items():
        logger.info("%-10s %.2f", name, value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
