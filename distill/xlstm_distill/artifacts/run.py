"""The run directory: artifacts are published by rename and found by what they were made from."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts.artifact import Artifact, Draft, Request
from xlstm_distill.artifacts.changes import in_a_line
from xlstm_distill.artifacts.files import flush_tree, write_text
from xlstm_distill.artifacts.hashing import remember_hashes
from xlstm_distill.artifacts.locks import (
    busy,
    exclusive,
    marked,
    remove_leftovers,
    training_lock,
    working,
)
from xlstm_distill.artifacts.manifest import FORMAT, MANIFEST, facts_of_files
from xlstm_distill.artifacts.shared import is_shared
from xlstm_distill.artifacts.shelf import Shelf
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe.load import recipe_to_yaml
from xlstm_distill.runtime.console import Console, QuietConsole, byte_size
from xlstm_distill.runtime.ranks import (
    all_agree,
    from_rank_zero,
    is_main_process,
    wait_for_everyone,
)

RECIPE_FILE = "recipe.yaml"
HASHES_FILE = ".hashes.json"
SHARED_SECONDS = 60.0
"""How long to look again for what another machine published: caches of NFS are that old at most."""
LOOK_SECONDS = 1.0
PACKAGES = (
    "xlstm-distill",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "lm_eval",
    "tokenizers",
    "safetensors",
)


class Run(Shelf):
    """A run directory and the recipe it carries out.

    `patience` is how long `need` looks again for what is missing:
    seconds, by default a minute on a file system that machines share and 0 on others.
    `rank_patience` is how long the other ranks look for what rank 0 sees.
    """

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        console: Console | None = None,
        *,
        drop_replaced: bool = False,
        patience: float | None = None,
        rank_patience: float = SHARED_SECONDS,
    ) -> None:
        super().__init__(directory, console or QuietConsole(), drop_replaced=drop_replaced)
        self.recipe = recipe
        if patience is None:
            patience = SHARED_SECONDS if is_shared(directory) else 0.0
        self.patience, self.rank_patience = patience, rank_patience

    @classmethod
    def open(
        cls, directory: Path | str, recipe: Recipe, console: Console | None = None, **options: Any
    ) -> Run:
        """Create or reopen a run directory; `options` are those of the class.

        Raises:
            UserError: the path is a file or cannot be written.
        """
        directory = Path(directory)
        try:
            (directory / "artifacts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a failure, not a wrong name
                raise
            raise UserError(
                f"--run: {directory} cannot be used as a run directory ({error.strerror})."
            ) from None
        # A teacher of 16 GB is read once for its hash, and not by every command.
        remember_hashes(directory / HASHES_FILE)
        return cls(directory, recipe, console, **options)

    def keep_recipe(self) -> None:
        """Write the recipe into the run directory, defaults included; `status` compares with it."""
        if is_main_process():
            write_text(self.directory / RECIPE_FILE, recipe_to_yaml(self.recipe))

    def work_directory(self, request: Request) -> Path:
        """Where checkpoints, the log and prepared rows lie until an artifact is published."""
        # With the fingerprint: a training with other settings must never find these checkpoints.
        name = f"{request.label.replace('/', '-')}-{request.fingerprint[:12]}"
        return self.directory / "training" / name

    def look(self, request: Request) -> Artifact | None:
        """Return the artifact made from exactly this, on all ranks, as rank 0 sees it.

        All ranks must ask. One that was kept when other settings replaced it is put back.

        Raises:
            RunError: a rank does not see what rank 0 sees; a file is missing or has another size.
        """
        mine: list[Artifact] = []

        def find() -> bool:
            mine.extend(found for found in [self.find_or_restore(request)] if found)
            return bool(mine)

        return self._agreed(request, mine) if from_rank_zero(find) else None

    def has(self, request: Request) -> bool:
        """Whether the artifact made from exactly this is published.

        All ranks ask, and all get rank 0's answer: a rank that skips its work would leave the
        others waiting in their next collective.
        """
        return from_rank_zero(lambda: self.find_or_restore(request) is not None)

    def make(
        self,
        request: Request,
        build: Callable[[Draft], None],
        *,
        together: bool = False,
        gathered: Path | None = None,
        console: Console | None = None,
    ) -> Artifact:
        """Return the artifact made from exactly this; build it if it is not there.

        `build` writes into a temporary directory, which is renamed into place when it returns. An
        earlier artifact of the same label stays until then, and for good when `build` raises.
        Rank 0 builds; the other ranks wait. With `together` all ranks build (training), only
        rank 0's files are kept, and the work directory belongs to this run of the program until
        the artifact is there. `gathered` is a directory in which several runs of the program have
        collected the artifact's files; it becomes the artifact once `build` has completed it, and
        it stays when `build` raises.

        Raises:
            RunError: another run of the program is at the same training (`together`).
        """
        console = console or self.console
        if done := self.look(request):
            return done
        if gathered is None:  # else whoever gathered the files has said it
            self.say_why(request, console)
        # Before the build: two trainings in one work directory would write the same checkpoints.
        with self._training(request, console) if together else contextlib.nullcontext():
            # Another run may have published it, and removed the work directory, a moment ago.
            if together and (done := self.look(request)):
                return done
            if is_main_process() or together:
                if gathered is None:
                    self._build(request, build, mark=not together)
                else:
                    self._complete(request, build, gathered)
            wait_for_everyone()
            # Found, and on the disk: the work directory with its checkpoints goes last, in here.
            artifact = self.need(request)
        return replace(artifact, reused=False)

    def say_why(self, request: Request, console: Console) -> None:
        """Say in one line why a published artifact is made again, and what becomes of the earlier.

        Nothing is said if there is none.
        """
        earlier = self.load(request.label) if is_main_process() else None
        if earlier is None:
            return
        changes = request.changes_since(earlier)
        if not changes:
            return
        kept = self.keep_at(request, earlier)
        ending = f"the earlier one ({byte_size(earlier.bytes)}) will be kept in {kept}"
        if request.covers(earlier):
            ending = "it will hold the earlier one"
        elif kept is None:
            ending = f"the earlier one ({byte_size(earlier.bytes)}) will be removed (--replace)"
        console.line(f"{request.label} is made again: {in_a_line(changes)}; {ending}")

    def _agreed(self, request: Request, mine: list[Artifact]) -> Artifact:
        """Wait until all ranks see what rank 0, which has `mine`, sees; all of them come here."""
        found = mine[0] if mine else self._follow(request)
        if not all_agree(found is not None) or found is None:
            raise RunError(
                f"{self.path(request.label)}: rank 0 sees it, and another rank does not after "
                f"{self.rank_patience:.0f} s; the run directory must lie on a file system that all "
                "machines share."
            )
        work = self.work_directory(request)
        if is_main_process() and work.exists():
            # Checkpoints go last; a process that died before that leaves them: hundreds of GB.
            shutil.rmtree(work, ignore_errors=True)
        return found

    def _follow(self, request: Request) -> Artifact | None:
        """Find what rank 0 has found; on NFS that may take a minute."""
        end = time.monotonic() + self.rank_patience
        while True:
            # Sizes are rank 0's to compare: 64 ranks would ask the server 64 times.
            found = self.load(request.label)
            if found is not None and found.fingerprint == request.fingerprint:
                return found
            if time.monotonic() >= end:
                return None
            self._look_anew(request, end)

    def _look_anew(self, request: Request, end: float) -> None:
        """Wait a moment, and make the file system ask its server again."""
        time.sleep(max(0.0, min(LOOK_SECONDS, end - time.monotonic())))
        # NFS remembers for a while that a name is missing; opening its folder makes it look.
        with contextlib.suppress(OSError):
            next(self.path(request.label).parent.iterdir(), None)

    @contextlib.contextmanager
    def _training(self, request: Request, console: Console) -> Iterator[None]:
        """Hold a training or an evaluation on rank 0; no rank goes on without."""
        refused = None
        lock = training_lock(self.directory, self.work_directory(request))
        with contextlib.ExitStack() as stack:
            if is_main_process():
                try:
                    stack.enter_context(exclusive(lock, request.label, console.line))
                except RunError as error:
                    refused = error
            # The other ranks cannot know: rank 0 alone asks for the lock. They must refuse too, and
            # not wait.
            if not all_agree(refused is None):
                raise refused or busy(request.label, lock)
            yield

    def _build(self, request: Request, build: Callable[[Draft], None], *, mark: bool) -> None:
        """Build and publish; `mark` shows others that this run of the program is at it."""
        final = self.path(request.label)
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = Draft(final.parent / f".{final.name}.{uuid.uuid4().hex[:12]}.partial")
        with contextlib.ExitStack() as stack:
            if mark:
                stack.enter_context(self.working(request.label))
            # Under the lock: a draft whose mark is not held yet looks like one of a dead process.
            with self.lock(request):
                remove_leftovers(final, self.locks)
                stack.enter_context(marked(self.locks / draft.path.name))
                draft.path.mkdir()
            try:
                self._fill(request, build, draft)
                if is_main_process():
                    # Before the lock: 16 GB take a while to reach the disk.
                    flush_tree(draft.path)
                    with self.lock(request):
                        if self.find(request) is None:  # else another run of the program was first
                            self.publish(draft.path, request)
            finally:
                shutil.rmtree(draft.path, ignore_errors=True)

    def working(self, label: str) -> contextlib.AbstractContextManager[None]:
        """Show other shells that this process is at an artifact; trainings have their lock."""
        if not is_main_process():  # one mark speaks for all ranks
            return contextlib.nullcontext()
        return working(self.locks, label)

    def _complete(self, request: Request, build: Callable[[Draft], None], gathered: Path) -> None:
        """Complete and publish a gathered directory, unless another run has done so meanwhile."""
        with self.working(request.label), self.lock(request):
            # Asked again under the lock: several shares of a capture can end together.
            if self.find(request) is None:
                self._fill(request, build, Draft(gathered))
                self.publish(gathered, request)
        shutil.rmtree(gathered, ignore_errors=True)

    def _fill(self, request: Request, build: Callable[[Draft], None], draft: Draft) -> None:
        started = time.monotonic()
        build(draft)
        if not is_main_process():  # its files are dropped
            return
        # Not the wall clock: the system may set it while a stage runs.
        seconds = draft.earlier_seconds + time.monotonic() - started
        files = facts_of_files(draft.path, draft.self_checked, draft.temporary)
        # Last: a directory without a manifest is no artifact.
        draft.write_json(MANIFEST, {**self._manifest(request, draft, seconds), "files": files})

    def _manifest(self, request: Request, draft: Draft, seconds: float) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "stage": request.stage,
            "name": request.name,
            "fingerprint": request.fingerprint,
            "identity": request.identity or request.fingerprint,
            "recipe": request.parts,
            "inputs": request.inputs,
            "notes": request.notes,
            "seed": self.recipe.seed,
            "versions": versions(),
            "arithmetic": _arithmetic(),
            "wall_seconds": round(seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "results": draft.results,
        }

    def need(self, request: Request) -> Artifact:
        """Return an artifact that a stage builds on; all ranks must ask.

        On a shared file system it is looked for again for `patience` seconds: another machine may
        just have published it.

        Raises:
            RunError: it is missing, or was made from other settings than the recipe now names.
        """
        mine: list[Artifact] = []
        from_rank_zero(lambda: mine.append(self._wait_for(request)))
        return self._agreed(request, mine)

    def _wait_for(self, request: Request) -> Artifact:
        found = self.find_or_restore(request)
        if found is None and self.patience > 0:
            self.console.line(
                f"{self.path(request.label)}: not there yet; looking again for "
                f"{self.patience:.0f} s, as another machine may have just published it"
            )
            end = time.monotonic() + self.patience
            while found is None and time.monotonic() < end:
                self._look_anew(request, end)
                found = self.find_or_restore(request)
        if found is None:
            raise self.not_there(request)
        return found


def _arithmetic() -> dict[str, str | int]:
    """What this process computes with: the last bits of a result depend on it."""
    # torch takes seconds to load. An artifact made without it holds no sums of floats.
    if "torch" not in sys.modules:
        return {}
    from xlstm_distill.runtime.arithmetic import arithmetic

    return arithmetic()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
