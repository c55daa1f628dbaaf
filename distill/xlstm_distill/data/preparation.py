"""Prepare a domain's rows: mix, tokenise, pack and write, shard by shard.

A preparation that was killed goes on after its last finished shard and ends with the same rows.
"""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_distill.artifacts import Draft
from xlstm_distill.artifacts.files import remove_partials, write_text, written_whole
from xlstm_distill.data.mixture import Mixture, SourceProgress
from xlstm_distill.data.packing import Packer
from xlstm_distill.data.shards import RowShardWriter, check_shard
from xlstm_distill.data.tokenization import (
    ChunkTokenizer,
    DocumentOutcome,
    DocumentTokenizer,
    Tokens,
)
from xlstm_distill.data.workers import tokenizing
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console, Progress, byte_size, short
from xlstm_distill.runtime.pool import free_cores

CHECKPOINT = "checkpoint.npz"
PROGRESS = "progress.json"
"""For `status`: rows there and needed, and rows made a second."""
WORTH_WORKERS = 50_000_000
"""Tokens from which worker processes save more time than they take to start."""
MOST_WORKERS = 16
"""Workers from which the main process is the limit: it reads, mixes and packs."""
WORTH_A_LINE = 0.01
"""Relative difference between a source's share and its weight from which a line is printed."""


def clean(folder: Path, console: Console) -> None:
    """Remove unfinished rows of this domain that were for other settings, and say so."""
    stem, _, _ = folder.name.rpartition("-")
    for other in folder.parent.glob(f"{stem}-*"):
        # The pattern also finds the domain `math-long` where `math` is meant.
        own, _, _ = other.name.rpartition("-")
        if own == stem and (other / CHECKPOINT).exists():
            size = sum(path.stat().st_size for path in other.rglob("*") if path.is_file())
            console.line(f"{other}: unfinished rows of other settings, removed ({byte_size(size)})")
            shutil.rmtree(other, ignore_errors=True)


class Preparation:
    """Make the rows of one domain in a folder that outlives the process.

    After every shard the folder holds all that is needed to go on: the finished shards, how far
    each source has been read, and the rows that are still open. At the end it holds all of the
    artifact but its manifest; `Run.make` publishes it with one rename.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        needed: int,
        tokenizer: Any,
        folder: Path,
        console: Console,
    ) -> None:
        self.recipe, self.name, self.needed = recipe, name, needed
        self.tokenizer, self.folder, self.console = tokenizer, folder, console
        self.domain = recipe.data.domains[name]
        self.field, self.label = f"data.domains.{name}", f"data/{name}"
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = tokenizer.eos_token_id
        self.packer = Packer(recipe.data.context, pad)
        # Not `len(tokenizer)`: ids may have gaps.
        vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.writer = RowShardWriter(folder, recipe.data.context, vocabulary)
        self.progress = [SourceProgress() for _ in self.domain.sources]
        # Whether all rows are there; and the time that they took, in all processes (seconds).
        self.complete, self.seconds = False, 0.0
        self._started, self._rows_before = time.monotonic(), 0

    def gather(self) -> None:
        """Make the rows, or those that are missing.

        Raises:
            UserError: a source cannot be used, or there are too few documents.
            RunError: hub data stopped coming, or a worker died.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # The caller holds the lock of this folder: a partial file is of a killed process.
        remove_partials(self.folder)
        try:
            self._make()
        finally:
            # Without a checkpoint there is nothing to go on from.
            if not (self.folder / CHECKPOINT).exists():
                shutil.rmtree(self.folder, ignore_errors=True)

    def describe(self, draft: Draft) -> None:
        """Add the figures of the gathered rows to their artifact, and print them."""
        # The index has the checksum of every shard, and the manifest that of the index.
        draft.self_checked, draft.temporary = ("rows-*.arrow",), (CHECKPOINT, PROGRESS)
        draft.earlier_seconds = self.seconds + time.monotonic() - self._started
        draft.results |= self._results()
        self._warn(draft.results)
        size = sum(shard["bytes"] for shard in self.writer.shards)
        self.console.line(
            f"{self.label}: {draft.results['rows']} rows, {short(draft.results['tokens'])} tokens, "
            f"fill {draft.results['fill']:.2%}, {size / 1e6:,.1f} MB"
        )

    def _make(self) -> None:
        self._started = time.monotonic()
        self._restore()
        self._rows_before = self.writer.rows
        if not self.complete:
            self._note()
            self._fill()
        self.writer.close()
        self._check_enough()
        # What follows is one rename: a process that dies before it redoes no row.
        self.complete = True
        self.save()

    def _check_enough(self) -> None:
        """Refuse a domain with no rows to train on, and say what its sources lost."""
        validation = self.recipe.data.validation_rows
        if self.writer.rows > validation:
            return
        losses = [
            f" sources[{number}]: {progress.losses()}."
            for number, progress in enumerate(self.progress)
            if progress.lost()
        ]
        raise UserError(
            f"{self.field}: its documents fill {self.writer.rows} rows of "
            f"{self.recipe.data.context} tokens and data.validation_rows holds back {validation} "
            f"of them; give more documents or hold back fewer.{''.join(losses)}"
        )

    def workers(self) -> int:
        """Processes that tokenise: the recipe's number, or one per core but one.

        That core is for the main process.
        """
        if self.recipe.data.workers is not None:
            return self.recipe.data.workers
        # Each worker imports transformers, which takes seconds.
        if (self.needed - self.writer.rows) * self.recipe.data.context < WORTH_WORKERS:
            return 0
        return min(free_cores(), MOST_WORKERS)

    def _fill(self) -> None:
        """Read, pack and write until there are enough rows or the sources are dry."""
        data = self.recipe.data
        tokenizer = ChunkTokenizer(
            DocumentTokenizer(self.tokenizer), data.context, data.long_documents
        )
        total = (self.needed - self.writer.rows) * data.context
        with (
            tokenizing(tokenizer, self.workers()) as (submit, ahead),
            self.console.progress(self.label, total) as bar,
        ):
            seed = self.recipe.seed
            mixture = Mixture(self.domain, self.field, seed, submit, ahead, self.progress)
            for document in mixture:
                self._add(document, bar)
                # Whole documents are read, so the last one may fill more than is needed; `_add`
                # drops the rest.
                if self.writer.rows >= self.needed:
                    return
                if self.writer.is_full:
                    self.writer.end_shard()
                    self.save()
            # The sources are dry: the open rows are all that is left.
            for row in self.packer.drain():
                if self.writer.rows < self.needed:
                    self.writer.add(row)
                    bar.update(data.context)

    def _add(self, document: Tokens, bar: Progress) -> None:
        """Pack a document and add the rows that this finishes."""
        before = self.writer.rows
        for piece in document.pieces(self.recipe.data.context):
            row = self.packer.add(piece)
            if row is not None and self.writer.rows < self.needed:
                self.writer.add(row)
        bar.update((self.writer.rows - before) * self.recipe.data.context)

    def save(self) -> None:
        """Write the checkpoint; the shards that it names are on the disk already."""
        state = {
            "complete": self.complete,
            "seconds": self.seconds + time.monotonic() - self._started,
            "shards": self.writer.shards,
            "totals": self.writer.totals,
            "progress": [asdict(progress) for progress in self.progress],
        }
        arrays: dict[str, Any] = self.packer.state()
        arrays["state"] = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
        # In memory first: numpy's zip format seeks back, and the file must appear whole.
        content = io.BytesIO()
        np.savez(content, **arrays)
        with written_whole(self.folder / CHECKPOINT) as file:
            file.write(content.getbuffer())
        self._note()

    def _note(self) -> None:
        """Say for `status` how far the rows are."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        made = (self.writer.rows - self._rows_before) * self.recipe.data.context
        facts = {
            "rows": self.writer.rows,
            "needed": self.needed,
            "tokens_per_second": made / seconds,
        }
        write_text(self.folder / PROGRESS, json.dumps(facts) + "\n")

    def _restore(self) -> None:
        """Go on from the checkpoint, if there is one and its shards are whole."""
        if not (self.folder / CHECKPOINT).exists():
            return
        try:
            # np.load refuses pickles by default: a checkpoint can hold arrays only.
            with np.load(self.folder / CHECKPOINT) as saved:
                state = json.loads(saved["state"].tobytes())
                for shard in state["shards"]:
                    check_shard(self.folder, shard)
                complete, seconds = state["complete"], state["seconds"]
                progress = [SourceProgress.restored(own) for own in state["progress"]]
                # Last: a packer that is half restored could not start over.
                self.packer.restore(saved)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, RunError) as error:
            self.console.line(
                f"{self.label}: {self.folder} cannot be used ({error}); starting over."
            )
            return
        self.complete, self.seconds, self.progress = complete, seconds, progress
        self.writer.shards, self.writer.totals = state["shards"], state["totals"]
        self.console.line(f"{self.label}: going on after {self.writer.rows} of {self.needed} rows.")

    def _results(self) -> dict[str, Any]:
        """Return the figures of the preparation, for the manifest."""
        totals, rows = self.writer.totals, self.writer.rows
        bytes_written = sum(shard["bytes"] for shard in self.writer.shards)
        documents_read = {}
        for outcome in DocumentOutcome:
            counts = [progress.outcomes[outcome.label] for progress in self.progress]
            documents_read[outcome.label] = sum(counts)
        return {
            "rows": rows,
            "rows_needed": self.needed,
            "tokens": totals["tokens"],
            "fill": totals["tokens"] / (rows * self.recipe.data.context),
            "supervised_share": totals["supervised"] / totals["tokens"],
            "bytes_per_token": bytes_written / totals["tokens"],
            "documents_read": documents_read,
            "sources": self._shares(),
        }

    def _shares(self) -> list[dict[str, Any]]:
        """Return what each source gave, beside the share that its weight asks for."""
        read = sum(progress.tokens for progress in self.progress)
        weights = sum(source.weight for source in self.domain.sources)
        return [
            {
                "source": source.path or source.generator,
                "weight_share": source.weight / weights,
                "share": progress.tokens / max(read, 1),
                "tokens": progress.tokens,
                "documents": progress.documents,
                "ran_out": progress.dry,
            }
            for source, progress in zip(self.domain.sources, self.progress, strict=True)
        ]

    def _warn(self, results: dict[str, Any]) -> None:
        """Print where the rows differ from what the recipe asks for."""
        for number, progress in enumerate(self.progress):
            field = f"{self.field}.sources[{number}]"
            source = results["sources"][number]
            difference = abs(source["share"] / source["weight_share"] - 1)
            if progress.dry and difference > WORTH_A_LINE:
                self.console.line(
                    f"{field}: ran out after {source['documents']} documents and gives "
                    f"{source['share']:.1%} of the tokens, not {source['weight_share']:.1%}."
                )
            if progress.lost():
                self.console.line(f"{field}: {progress.losses()}.")
        if results["rows"] < self.needed:
            self.console.line(
                f"{self.label}: {results['rows']} rows of the {self.needed} that the recipe reads; "
                "they will be read more than once."
            )
