"""The objective of on-policy refinement: the teacher's KL divergence on the student's own text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from xlstm_distill.data.rows import Batch, DomainRows, Row, next_token_labels
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.segments import positions_in_documents
from xlstm_distill.runtime.ranks import process_count
from xlstm_distill.targets.providers import OnlineTargets
from xlstm_distill.training.compilation import eagerly
from xlstm_distill.training.objectives import DistillObjective
from xlstm_distill.training.on_policy.prompts import Cutter, Opening
from xlstm_distill.training.on_policy.sampler import Sampler

WIDTH = 64
"""Batches are padded to a multiple of this: kernels then meet few different lengths."""


class RefineObjective(DistillObjective):
    """KL divergence to the teacher on continuations that the student samples (arXiv 2306.13649).

    What is read for a step are prompts with the text's own continuations; `renew` puts the
    student's into their place once the step before has changed the weights. Validation reads
    whole rows, as stage II does. No gradient flows through the choice of tokens.
    """

    shown = "kl"
    renews = True

    def __init__(
        self,
        student: CausalLM,
        targets: OnlineTargets,
        sampler: Sampler,
        cutter: Cutter,
        *,
        kl_tail: bool,
        width: int | None = None,
        saved: Path | None = None,
    ) -> None:
        # The cross-entropy of the student's own choices would only sharpen it.
        super().__init__(student, targets, LossWeights(0.0, 1.0, kl_tail), saved)
        # In a list they are no submodules: a sampler's copy is neither trained nor saved.
        self.sampler = [sampler]
        self.cutter = cutter
        # Of all batches, where compiled graphs want one shape; None: of the longest sample.
        self.width = width

    def read(
        self, domains: Mapping[str, DomainRows], rows: Sequence[Row], numbers: Sequence[int]
    ) -> Batch:
        """Read prompts and the text's own continuations."""
        return self._batch(self._openings(domains, rows, numbers), rows)

    def renew(
        self, domains: Mapping[str, DomainRows], batches: list[Batch], numbers: Sequence[int]
    ) -> tuple[list[Batch], dict[str, float]]:
        """Replace continuations by the student's; returns also tokens, ends and seconds of it.

        Prompts are cut again (0.3 ms a row of 4,096 tokens): a batch holds no place for them, and
        what is read ahead stays a function of the step alone.
        """
        started = time.monotonic()
        rows = [row for batch in batches for row in batch.rows]
        openings = self._openings(domains, rows, numbers)
        asked = [opening for opening in openings if opening.sampled]
        with eagerly():
            found = self.sampler[0](
                [opening.prompt for opening in asked], [opening.number for opening in asked]
            )
        sampled = dict(zip((opening.number for opening in asked), found, strict=True))
        ends = self.sampler[0].settings.ends
        renewed = []
        for opening in openings:
            own = sampled.get(opening.number)
            renewed.append(opening if own is None else replace(opening, continuation=np.array(own)))
        # Samples of like length side by side: padding is computed too.
        order = sorted(range(len(rows)), key=lambda n: len(renewed[n]))
        made, start = [], 0
        for batch in batches:
            part = order[start : start + len(batch.rows)]
            made.append(self._batch([renewed[n] for n in part], [rows[n] for n in part]))
            start += len(batch.rows)
        return made, {
            "sampled": float(len(found)),
            "tokens": float(sum(map(len, found))),
            "ended": float(sum(own[-1] in ends for own in found)),
            "seconds": time.monotonic() - started,
        }

    def figures_of_renewal(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the samples' mean length, the share of them with an end, and their time and rate.

        The time (seconds) is the ranks' mean: they sample side by side. The rate (tokens/s) is of
        all ranks.
        """
        samples, seconds = max(sums["sampled"], 1.0), sums["seconds"] / process_count()
        return {
            "sample_length": sums["tokens"] / samples,
            "samples_ended": sums["ended"] / samples,
            "sampling_seconds": seconds,
            "sampled_tokens_per_second": sums["tokens"] / seconds,
        }

    def computed(self) -> dict[str, str | int]:
        """Return how many rows are decoded at once: products of another size round otherwise."""
        return {"sample_batch": self.sampler[0].settings.rows}

    def _openings(
        self, domains: Mapping[str, DomainRows], rows: Sequence[Row], numbers: Sequence[int]
    ) -> list[Opening]:
        return [
            self.cutter.cut(domains[name].row(index), number)
            for (name, index), number in zip(rows, numbers, strict=True)
        ]

    def _batch(self, openings: Sequence[Opening], rows: Sequence[Row]) -> Batch:
        """Put samples into rows of their own, padded on the right."""
        lengths = torch.tensor([len(opening) for opening in openings])
        width = self.width or -(-int(lengths.max()) // WIDTH) * WIDTH
        ids = torch.zeros(len(openings), width, dtype=torch.int64)
        supervised = torch.zeros(len(openings), width, dtype=torch.bool)
        for row, opening in enumerate(openings):
            text = np.concatenate([opening.prompt, opening.continuation])
            ids[row, : len(text)] = torch.from_numpy(text)
            supervised[row, len(opening.prompt) : len(text)] = True
        real = torch.arange(width) < lengths[:, None]
        segments = (~real).long()
        found = Batch(
            input_ids=ids,
            position_ids=positions_in_documents(segments),
            segment_ids=segments,
            labels=next_token_labels(ids, supervised, segments),
            real=real,
            rows=tuple(rows),
        )
        # No token sees padding on its right, so the teacher needs no mask.
        return replace(found, packed=False)
