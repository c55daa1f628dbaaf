"""Prepare a domain's rows: mix, tokenise, pack and write shard by shard, so that a killed preparation can go on."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_distill.artifacts import Draft
from xlstm_distill.data.mixture import Mixture, SourceProgress
from xlstm_distill.data.packing import OPEN_ROWS, Packer
from xlstm_distill.data.shards import RowShardWriter, check_shard, written_whole
from xlstm_distill.data.tokenization import ChunkTokenizer, DocumentOutcome, DocumentTokenizer
from xlstm_distill.data.workers import tokenizing
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime import console as consoles

CHECKPOINT = "checkpoint.npz"
WORTH_WORKERS = 50_000_000
"""Tokens from which the start of worker processes pays."""
MOST_WORKERS = 16
"""Workers from which the main process, which reads, mixes and packs, is the limit."""
SAID = 0.01
"""Relative difference of a source's share from its weight that is worth a line."""


def clean(folder: Path) -> None:
    """Remove what preparations of the same domain with other settings have left beside a work directory."""
    stem = folder.name.rsplit("-", 1)[0]
    for other in folder.parent.glob(f"{stem}-*"):
        if other.name.rsplit("-", 1)[0] == stem and (other / CHECKPOINT).exists():
            shutil.rmtree(other, ignore_errors=True)


class Preparation:
    """Makes the rows of one domain in a folder that outlives the process, and hands them over when they are complete.

    After every shard the folder holds all that is needed to go on: which shards there are, how far each source has
    been read, and the rows that are still open.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        needed: int,
        tokenizer: Any,
        folder: Path,
        console: consoles.Console,
    ) -> None:
        self.recipe, self.name, self.needed, self.folder, self.console = (
            recipe,
            name,
            needed,
            folder,
            console,
        )
        self.field, self.label = f"data.domains.{name}", f"data/{name}"
        self.domain, self.tokenizer = recipe.data.domains[name], tokenizer
        pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        # A small domain would leave much of its text in open rows.
        self.packer = Packer(recipe.data.context, pad, min(OPEN_ROWS, max(16, needed // 32)))
        vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.writer = RowShardWriter(folder, recipe.data.context, vocabulary)
        self.progress = [SourceProgress() for _ in self.domain.sources]

    def build(self, draft: Draft) -> None:
        """Make the rows, or what is missing of them, and move them into the draft.

        Raises:
            UserError: a source cannot be used, or there are too few documents.
            RunError: hub data stopped coming, or a worker died.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._make()
            draft.results |= self._results()
            self._warn(draft.results)
            draft.path.rmdir()
            self.folder.rename(draft.path)
            (draft.path / CHECKPOINT).unlink(missing_ok=True)
        finally:
            if not (self.folder / CHECKPOINT).exists():  # nothing to go on from
                shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self) -> None:
        self._restore()
        if self.writer.rows < self.needed:
            self._fill()
        self.writer.close()
        validation = self.recipe.data.validation_rows
        if self.writer.rows <= validation:
            losses = [
                f" sources[{n}]: {p.losses()}." for n, p in enumerate(self.progress) if p.lost()
            ]
            raise UserError(
                f"{self.field}: its documents fill {self.writer.rows} rows of {self.recipe.data.context} tokens and "
                f"data.validation_rows holds back {validation} of them; give more documents or hold back fewer."
                + "".join(losses)
            )

    def workers(self) -> int:
        """Processes that tokenise: the recipe's number, or one per core that the main process leaves free."""
        if self.recipe.data.workers is not None:
            return self.recipe.data.workers
        if (self.needed - self.writer.rows) * self.recipe.data.context < WORTH_WORKERS:
            return 0
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        return min(cores - 1, MOST_WORKERS)

    def _fill(self) -> None:
        """Read, pack and write until there are enough rows or the sources are dry."""
        data = self.recipe.data
        tokenizer = ChunkTokenizer(
            DocumentTokenizer(self.tokenizer), data.context, data.long_documents
        )
        total = (self.needed - self.writer.rows) * data.context
        with (
            tokenizing(tokenizer, self.workers()) as (submit, ahead),
            self.console.progress(self.label, total) as progress,
        ):
            mixture = Mixture(
                self.domain, self.field, self.recipe.seed, submit, ahead, self.progress
            )
            for document in mixture:
                before = self.writer.rows
                for piece in document.pieces(data.context):
                    if (row := self.packer.add(piece)) and self.writer.rows < self.needed:
                        self.writer.add(row)
                progress.update((self.writer.rows - before) * data.context)
                if self.writer.rows >= self.needed:
                    return
                if self.writer.is_full:
                    self.writer.end_shard()
                    self._save()
            for row in self.packer.drain():
                if self.writer.rows < self.needed:
                    self.writer.add(row)
                    progress.update(data.context)

    def _save(self) -> None:
        state = {
            "shards": self.writer.shards,
            "totals": self.writer.totals,
            "progress": [asdict(progress) for progress in self.progress],
        }
        arrays: dict[str, Any] = self.packer.state()
        arrays["state"] = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
        content = io.BytesIO()
        np.savez(content, **arrays)
        with written_whole(self.folder / CHECKPOINT) as file:
            file.write(content.getbuffer())

    def _restore(self) -> None:
        """Go on from the checkpoint, if there is one and its shards are whole."""
        if not (self.folder / CHECKPOINT).exists():
            return
        try:
            with np.load(self.folder / CHECKPOINT) as saved:
                state = json.loads(saved["state"].tobytes())
                for shard in state["shards"]:
                    check_shard(self.folder, shard)
                self.packer.restore(saved)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, RunError) as error:
            self.console.line(
                f"{self.label}: {self.folder} cannot be used ({error}); starting over."
            )
            return
        self.writer.shards, self.writer.totals = state["shards"], state["totals"]
        self.progress = [SourceProgress(**progress) for progress in state["progress"]]
        self.console.line(f"{self.label}: going on after {self.writer.rows} of {self.needed} rows.")

    def _results(self) -> dict[str, Any]:
        """The figures of the preparation, for the manifest."""
        totals, rows = self.writer.totals, self.writer.rows
        read = sum(progress.tokens for progress in self.progress)
        weights = sum(source.weight for source in self.domain.sources)
        shares = [
            {
                "source": source.path or source.generator,
                "weight_share": source.weight / weights,
                "share": progress.tokens / max(read, 1),
                "tokens": progress.tokens,
                "documents": sum(progress.outcomes.values()),
                "ran_out": progress.dry,
            }
            for source, progress in zip(self.domain.sources, self.progress, strict=True)
        ]
        return {
            "rows": rows,
            "rows_needed": self.needed,
            "tokens": totals["tokens"],
            "fill": totals["tokens"] / (rows * self.recipe.data.context),
            "supervised_share": totals["supervised"] / totals["tokens"],
            "bytes_per_token": sum(s["bytes"] for s in self.writer.shards) / totals["tokens"],
            "documents_read": {
                o.name.lower(): sum(p.outcomes[o.name.lower()] for p in self.progress)
                for o in DocumentOutcome
            },
            "sources": shares,
        }

    def _warn(self, results: dict[str, Any]) -> None:
        """Say what is other than the recipe asks for."""
        for number, (source, progress) in enumerate(
            zip(results["sources"], self.progress, strict=True)
        ):
            field = f"{self.field}.sources[{number}]"
            if progress.dry and abs(source["share"] / source["weight_share"] - 1) > SAID:
                self.console.line(
                    f"{field}: ran out after {source['documents']} documents and gives {source['share']:.1%} of the "
                    f"tokens, not {source['weight_share']:.1%}."
                )
            if progress.lost():
                self.console.line(f"{field}: {progress.losses()}.")
        if results["rows"] < self.needed:
            self.console.line(
                f"{self.label}: {results['rows']} rows of the {self.needed} that the recipe reads; they will be read "
                "more than once."
            )
