"""Capture: run the teacher once over the rows the experts will read; store its sparse targets.

A domain's rows are cut into shards. Any number of ranks, and of independent runs of the program
(Slurm array tasks), share them. Finished shards gather in one directory. Whoever finds them all
there tests the store and publishes it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.artifacts.files import remove_partials
from xlstm_distill.data.budget import captured_rows
from xlstm_distill.data.rows import IGNORE_INDEX, Batch, DomainRows, load_batch
from xlstm_distill.errors import RunError
from xlstm_distill.losses.plain import sparse_kl
from xlstm_distill.models.teacher import download_teacher, load_teacher
from xlstm_distill.runtime.console import Console, Progress, byte_size, short
from xlstm_distill.runtime.pool import free_cores
from xlstm_distill.runtime.ranks import (
    from_rank_zero,
    is_main_process,
    on_cpu,
    process_count,
    process_index,
    wait_for_everyone,
)
from xlstm_distill.stages.choices import share_of_capture
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.prepare import prepare_rows
from xlstm_distill.stages.workbench import open_domains
from xlstm_distill.targets.coding import Coder, coding
from xlstm_distill.targets.providers import (
    OnlineTargets,
    StoredTargets,
    kept_logits,
    text_checksums,
)
from xlstm_distill.targets.shard import Identity, read_header, shard_name
from xlstm_distill.targets.store import Store, write_index
from xlstm_distill.targets.transfer import HostTargets, to_host
from xlstm_distill.targets.writer import MEASURED_ROWS, write_shard
from xlstm_distill.training.accelerator import make_accelerator

STORE = "store"
"""Folder of a capture's shards inside its artifact."""
SHARDS = 64
SHARD_TOKENS = (2**16, 2**22)
"""A domain is cut into about SHARDS shards, none smaller or larger than this (tokens of text)."""
MOST_WORKERS = 8
"""Workers that code 100,000 tokens a second at the default mass (docs/targets.md)."""
WORTH_WORKERS = 2_000_000
"""Tokens of text from which worker processes save more time than they take to start."""
SELF_TEST_ROWS, SPEED_ROWS = 4, 64
SELF_TEST_LIMIT = 0.02
"""Largest mean KL (nats) of the teacher from a row's targets, and difference of their mass.

It leaves room for other batch sizes and kernels in bf16. Targets of another text or teacher are off
by whole nats.
"""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard."""

    number: int
    first: int
    count: int


def capture(
    lineage: Lineage, run: Run, console: Console, shard: str | None = None
) -> list[Artifact | None]:
    """Store top-k targets of every domain that an expert reads; nothing where they are online.

    `shard` (`I/N`) is the share of this run of the program among N. None in the result stands for a
    domain that is not published yet, because shards of other shares are missing.
    """
    recipe = lineage.recipe
    share = share_of_capture(recipe, shard)
    if recipe.capture.targets == "online":
        return []
    limits = captured_rows(recipe)
    requests = {name: lineage.request(f"capture/{name}") for name in limits}
    # `has` is a collective, and `all` stops at the first no. That is safe, because all ranks get
    # the same answer from each.
    if all(run.has(request) for request in requests.values()):
        return [run.need(request) for request in requests.values()]

    # All ranks come here, and not all of them load the teacher.
    download_teacher(recipe.teacher)

    @functools.cache  # loaded by whoever has a shard to write, once for all domains
    def teacher() -> OnlineTargets:
        loaded = load_teacher(recipe.teacher, make_accelerator(recipe).device)
        return OnlineTargets(loaded, recipe.capture.top_k)

    rows = open_domains(recipe, prepare_rows(lineage, run, limits, console), limits)
    found: list[Artifact | None] = []
    for name, request in requests.items():
        domain = DomainCapture(
            run=run,
            request=request,
            identity=lineage.store_identity(name),
            rows=rows[name],
            batch=recipe.capture.batch,
            workers=recipe.capture.workers,
            teacher=teacher,
            console=console,
        )
        found.append(domain.work(share))
    return found


def plan_shards(rows: int, context: int) -> list[ShardRows]:
    """Cut a domain's rows into shards: always the same, whoever shares them."""
    # At least one row, however long the rows are.
    least, most = (max(tokens // context, 1) for tokens in SHARD_TOKENS)
    size = min(max(-(-rows // SHARDS), least), most)
    return [
        ShardRows(n, first, min(size, rows - first)) for n, first in enumerate(range(0, rows, size))
    ]


@dataclass(frozen=True)
class DomainCapture:
    """The capture of one domain: what is to be made of which rows."""

    run: Run
    request: Request
    identity: Identity
    rows: DomainRows
    batch: int
    workers: int | None
    teacher: Callable[[], OnlineTargets]
    console: Console

    @property
    def directory(self) -> Path:
        """Where finished shards gather until the store is published."""
        return (
            # In the artifacts' own folder, so that publishing is a rename inside one file system.
            # Hidden, so that `status` does not take it for an artifact. With the fingerprint, so
            # that shards for other settings lie elsewhere.
            self.run.path("capture") / f".{self.rows.name}.{self.request.fingerprint[:12]}.shards"
        )

    @property
    def shards(self) -> list[ShardRows]:
        """All shards of the domain."""
        return plan_shards(len(self.rows), self.rows.context)

    def work(self, share: tuple[int, int]) -> Artifact | None:
        """Write the missing shards of this share; publish the store if no shard is missing then."""
        started = time.monotonic()
        # All ranks, or none: where another run publishes at this moment, some ranks may see it and
        # others not, and those would wait at the barrier below for ever.
        if done := self.run.look(self.request):
            return done
        part, parts = share
        # Every rank of every share is one worker of the whole job.
        worker, workers = part * process_count() + process_index(), parts * process_count()
        self.run.say_why(self.request, self.console)
        with self.run.working(self.request.label):
            # No collective in there: ranks have different numbers of shards.
            self._write(self.shards[worker::workers])
        wait_for_everyone()
        # As rank 0 sees it: ranks that see others would part here and wait for each other.
        if missing := from_rank_zero(lambda: self._missing(share)):
            named = ", ".join(map(str, missing[:4])) + (", ..." if len(missing) > 4 else "")
            self.console.line(
                f"{self.request.label}: this share is done; {len(missing)} of {len(self.shards)} "
                f"shards are still to come from others ({named})"
            )
            return None
        publish = functools.partial(self._publish, started=started)
        # `make` asks again under a lock, so that of several shares that end together one publishes.
        artifact = self.run.make(self.request, publish, gathered=self.directory)
        if is_main_process():
            self._clean()
        return artifact

    def _clean(self) -> None:
        """Remove a shard that was written twice; name the shards of other settings, which stay."""
        shutil.rmtree(self.directory, ignore_errors=True)
        pattern = re.compile(rf"\.{re.escape(self.rows.name)}\.[0-9a-f]{{12}}\.shards")
        for path in sorted(self.directory.parent.iterdir()):
            if not pattern.fullmatch(path.name):
                continue
            # Another run may write there at this moment.
            with contextlib.suppress(OSError):
                files = [file.stat() for file in path.rglob("*") if file.is_file()]
                held = byte_size(sum(file.st_size for file in files))
                # They took the teacher's time, and a capture with those settings goes on from them.
                self.console.line(
                    f"{self.request.label}: shards of an unfinished capture with other settings"
                    f" stay in {path} ({held}); delete the folder if you will not go back to them"
                )

    def _missing(self, share: tuple[int, int]) -> list[int]:
        """Shards that are not there; none if the store is published, as then they are gone.

        This share's are all written. On NFS another machine's may show a minute late.
        """
        part, parts = share
        ranks = range(part * process_count(), (part + 1) * process_count())
        end = time.monotonic() + self.run.rank_patience
        while not self._published():
            missing = [shard.number for shard in self.shards if not self._finished(shard)]
            own = [n for n in missing if n % (parts * process_count()) in ranks]
            if not own or time.monotonic() >= end:
                return missing
            time.sleep(1.0)
        return []

    def _published(self) -> bool:
        return self.run.find(self.request) is not None

    def _finished(self, shard: ShardRows) -> bool:
        """Whether the shard is there, whole and made from the same; if not, it is made again."""
        path = self.directory / STORE / shard_name(shard.number)
        if not path.exists():
            return False
        try:
            header = read_header(path)
        except RunError as error:
            self.console.line(f"{error} It is made again.")
            return False
        place = ShardRows(header.shard, header.first_row, header.rows)
        # A header alone: rows are checked by their checksums when they are read.
        return place == shard and header.identity == self.identity

    def _write(self, shards: Sequence[ShardRows]) -> None:
        """Write shards, until all are there or another run has published the store."""
        total = sum(shard.count for shard in shards) * self.rows.context
        with (
            self.console.progress(self.request.label, total) as progress,
            # No process starts before a row is there to code.
            coding(self._workers(total)) as coder,
        ):
            for shard in shards:
                if self._published():
                    return
                if self._finished(shard):
                    progress.update(shard.count * self.rows.context)
                    continue
                (self.directory / STORE).mkdir(parents=True, exist_ok=True)
                try:
                    self._write_shard(shard, progress, coder)
                except FileNotFoundError:
                    # Another run of the program had all shards already and moved the folder away.
                    if not self._finished(shard) and not self._published():
                        raise
                    # Also with this process's draft in it.
                    if (store := self.run.path(self.request.label) / STORE).is_dir():
                        remove_partials(store)

    def _workers(self, tokens: int) -> int:
        """Processes that code: the recipe's number, or one per core that this process leaves."""
        if self.workers is not None:
            return self.workers
        # On the CPU the teacher itself uses all cores.
        if on_cpu() or tokens < WORTH_WORKERS:
            return 0
        return min(free_cores(), MOST_WORKERS)

    def _write_shard(self, shard: ShardRows, progress: Progress, coder: Coder) -> None:
        """Write one shard. Batches start with it, so its bytes do not depend on who writes it."""
        teacher, stop = self.teacher(), shard.first + shard.count
        vocabulary = teacher.teacher.config.vocab_size
        waiting: tuple[list[int], list[int], HostTargets] | None = None
        with write_shard(
            self.directory / STORE, self.identity, vocabulary, shard.number, shard.first, coder
        ) as writer:
            for start in range(shard.first, stop, self.batch):
                batch = self._load(range(start, min(start + self.batch, stop)))
                counts = (batch.labels != IGNORE_INDEX).sum(dim=1).tolist()
                sources = text_checksums(batch)
                if teacher.device.type == "cuda":
                    batch = batch.pinned()
                found = teacher(batch.to(teacher.device))
                targets = to_host(found, self.identity.mass, self.identity.min_k)
                # A GPU is at this batch from here on. Meanwhile the one before it is taken over.
                if waiting is not None:
                    writer.put(*waiting)
                waiting = counts, sources, targets
                progress.update(batch.input_ids.numel())
            if waiting is not None:
                writer.put(*waiting)

    def _load(self, rows: Iterable[int]) -> Batch:
        return load_batch({self.rows.name: self.rows}, [(self.rows.name, row) for row in rows])

    def _publish(self, draft: Draft, started: float) -> None:
        """Complete the gathered shards to a store, test it, and say what it costs."""
        draft.earlier_seconds = time.monotonic() - started
        # Each row has a checksum, the index has that of all shards' headers, the manifest that of
        # the index. So nobody reads 700 GB once more to publish them.
        draft.self_checked = (f"{STORE}/targets-*.bin",)
        figures = write_index(draft.path / STORE, self.identity).means()
        store = Store(draft.path / STORE, self.identity)
        stored = StoredTargets({self.rows.name: store})
        # Drawn from the fingerprint: whoever publishes tests the same rows.
        seed = zlib.crc32(self.request.fingerprint.encode())
        chosen = np.random.default_rng(seed).permutation(len(self.rows))
        self._self_test(stored, sorted(chosen[:SELF_TEST_ROWS].tolist()))
        speed = self._read_speed(stored, sorted(chosen[:SPEED_ROWS].tolist()))
        # Which rows the KL error is of: those whose number is a multiple of this.
        measured = {"kl_error_every_row": MEASURED_ROWS}
        draft.results |= {**figures, **measured, "read_tokens_per_second": speed}
        self.console.line(
            f"{self.request.label}: {short(figures['tokens'])} tokens "
            f"at {figures['bytes_per_token']:.1f} bytes, mean k {figures['mean_k']:.1f}, "
            f"KL error {figures.get('mean_kl_error', math.nan):.1e} nats "
            f"(of {figures['kl_error_rows']} rows) "
            f"(cut by mass: {figures['mean_cut']:.1e}), read at {short(speed)} tokens/s"
        )

    def _self_test(self, stored: StoredTargets, rows: Sequence[int]) -> None:
        """Run the teacher on a few rows again and compare with what is stored.

        Raises:
            RunError: the teacher's distribution is not the stored one.
        """
        teacher = self.teacher()
        for row in rows:
            batch = self._load([row]).to(teacher.device)
            # A row of a masked prompt alone has no targets.
            if not len(batch.kept):
                continue
            targets = stored(batch)
            with torch.no_grad():
                logits = kept_logits(teacher.teacher, batch).float()
            kept = logits.log_softmax(-1).gather(-1, targets.ids).exp()
            # Padding has id 0, a real token with a mass of its own.
            mass = kept.masked_fill(targets.log_probs == -torch.inf, 0)
            error = float(sparse_kl(logits, targets).mean())
            drift = float((1 - mass.sum(-1) - targets.tail).abs().mean())
            # `not ... <=` and not `>`: a comparison with NaN is false, and NaN must fail the test.
            if not max(error, drift) <= SELF_TEST_LIMIT:
                raise RunError(
                    f"{self.directory}: self-test failed: at row {row} the teacher is "
                    f"{error:.2g} nats from the stored targets and their mass is off by "
                    f"{drift:.2g} (allowed: {SELF_TEST_LIMIT}); nothing was published. "
                    "Delete this folder and run capture again."
                )

    def _read_speed(self, stored: StoredTargets, rows: Sequence[int]) -> float:
        """Kept tokens read and decoded per second by this process."""
        seconds, tokens = 0.0, 0
        for start in range(0, len(rows), self.batch):
            batch = self._load(rows[start : start + self.batch])
            started = time.perf_counter()
            # Only this is timed: reading the rows themselves is no part of the store's speed.
            tokens += len(stored(batch).tail)
            seconds += time.perf_counter() - started
        return tokens / seconds
