"""Sampling with the weights of a student that trains, many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from xlstm_distill.models.families import CausalLM
from xlstm_distill.training.on_policy.prompts import PURPOSE

ASK_EVERY = 8
"""Tokens after which the host asks which rows have ended; each question waits for a GPU.

Once half of the rows have, the others go on alone: a row's state is read for every token.
"""


@dataclass(frozen=True)
class SampleSettings:
    """How tokens are drawn; `ends` are the ids after which a continuation is over."""

    new_tokens: int
    temperature: float
    top_p: float
    rows: int
    """Rows that are decoded at once."""
    seed: int
    ends: tuple[int, ...]


class Sampler:
    """Continues prompts with the current weights of a student.

    `copy` is a student of the same shape, whole on this device, which gets the weights before each
    use. It is needed where the student's own are cut over ranks (every token would gather them) or
    in another format than the one computed in. None: the student itself samples.
    """

    def __init__(
        self, student: CausalLM, settings: SampleSettings, copy: CausalLM | None = None
    ) -> None:
        self.student, self.copy, self.settings = student, copy, settings

    @torch.no_grad()
    def __call__(self, prompts: Sequence[np.ndarray], numbers: Sequence[int]) -> list[list[int]]:
        """Sample a continuation of each prompt, its end token included where there is one.

        What is drawn follows from seed and number, whatever the other prompts. All ranks call this
        where the student is cut over them, also without a prompt.
        """
        model = self.student
        if self.copy is not None:
            copy_weights(self.student, self.copy)
            model = self.copy
        trains = model.training
        # In training mode a student that checkpoints activations would take no cache.
        model.eval()
        try:
            found: list[list[int]] = []
            for start in range(0, len(prompts), self.settings.rows):
                part = slice(start, start + self.settings.rows)
                found += self._sample(model, prompts[part], numbers[part])
        finally:
            model.train(trains)
        return found

    def _sample(
        self, model: CausalLM, prompts: Sequence[np.ndarray], numbers: Sequence[int]
    ) -> list[list[int]]:
        settings, device = self.settings, next(model.parameters()).device
        ids, mask = (x.to(device) for x in pad_left(prompts))
        draws = row_draws(settings.seed, numbers, settings.new_tokens).to(device)
        ends = torch.tensor(settings.ends, device=device)
        cache: Any = model.new_cache()
        read: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits = model(input_ids=ids, attention_mask=mask, **read).logits[:, -1]
        found = torch.zeros(len(prompts), settings.new_tokens, dtype=torch.int64, device=device)
        # Where the rows that are still decoded belong, and which of them have ended.
        places = torch.arange(len(prompts), device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for step in range(settings.new_tokens):
            if step % ASK_EVERY == 0 and step:
                going = (~ended).nonzero().squeeze(1)
                if not len(going):
                    break
                if 2 * len(going) <= len(ended):
                    cache.batch_select_indices(going)
                    places, ended, logits = places[going], ended[going], logits[going]
            token = draw_tokens(logits, draws[places, step], settings.temperature, settings.top_p)
            found[places, step] = token
            ended |= torch.isin(token, ends)
            if step + 1 < settings.new_tokens:
                logits = model(input_ids=token[:, None], **read).logits[:, -1]
        return [_until_end(row, settings.ends) for row in found.tolist()]


def pad_left(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Put prompts into one tensor (B, T) that ends with their last tokens, and a mask of them."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def row_draws(seed: int, numbers: Sequence[int], steps: int) -> Tensor:
    """Return numbers in [0, 1) for each sample and step, (B, steps) float64, on the host.

    They follow from seed and number alone, on every device and in every batch.
    """
    # One more than the seeds of prompts have: another stream.
    rows = [np.random.default_rng([seed, PURPOSE, number, 1]).random(steps) for number in numbers]
    return torch.from_numpy(np.stack(rows))


def draw_tokens(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token of each row's distribution: logits (B, V), draws (B,) in [0, 1) -> (B,).

    With `top_p` below 1, only the most likely tokens that hold that mass together are drawn.
    """
    # In double precision: sums over 128k tokens in single would lose the rare ones.
    probs = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= top_p, 0))
    mass = probs.cumsum(-1)
    wanted = draws[:, None] * mass[:, -1:]
    # Right of equals: a token without mass has its neighbour's sum and is passed over.
    return torch.searchsorted(mass, wanted, right=True).clamp_max(logits.shape[-1] - 1).squeeze(1)


def _until_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """Cut a continuation after its first end token."""
    for place, token in enumerate(row):
        if token in ends:
            return row[: place + 1]
    return row


@torch.no_grad()
def copy_weights(source: CausalLM, target: CausalLM) -> None:
    """Copy all weights, in the target's format; those that are cut over ranks are gathered.

    A collective where they are cut: all ranks call it. One tensor is whole at a time, and it is
    gathered in the target's format: 16 GB and not 32 for 8B parameters in bf16.
    """
    held = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        value: Any = held[name].detach().to(parameter.dtype)
        parameter.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
