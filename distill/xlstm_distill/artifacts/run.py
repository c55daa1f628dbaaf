"""The run directory: artifacts are published by rename and found by what they were made from."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts.artifact import FORMAT, Artifact, Draft, Request
from xlstm_distill.artifacts.changes import in_a_line
from xlstm_distill.artifacts.files import replace_directory, write_text
from xlstm_distill.artifacts.locks import (
    busy,
    exclusive,
    marked,
    remove_leftovers,
    training_lock,
    wait_for,
    working,
)
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe.load import recipe_to_yaml
from xlstm_distill.runtime.console import Console, QuietConsole
from xlstm_distill.runtime.ranks import all_agree, is_main_process, wait_for_everyone

MANIFEST = "manifest.json"
RECIPE_FILE = "recipe.yaml"
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


class Run:
    """A run directory and the recipe it carries out."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory, self.recipe = directory, recipe

    @classmethod
    def open(cls, directory: Path | str, recipe: Recipe) -> Run:
        """Create or reopen a run directory.

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
        return cls(directory, recipe)

    def keep_recipe(self) -> None:
        """Write the recipe into the run directory, defaults included; `status` compares with it."""
        if is_main_process():
            write_text(self.directory / RECIPE_FILE, recipe_to_yaml(self.recipe))

    def path(self, label: str) -> Path:
        """Where the artifact of a stage (`stage` or `stage/name`) lies."""
        return self.directory / "artifacts" / label

    def work_directory(self, request: Request) -> Path:
        """Where checkpoints, the log and prepared rows lie until an artifact is published."""
        # With the fingerprint: a training with other settings must never find these checkpoints.
        name = f"{request.label.replace('/', '-')}-{request.fingerprint[:12]}"
        return self.directory / "training" / name

    def find(self, request: Request) -> Artifact | None:
        """Return the published artifact if it was made from exactly this, else None."""
        artifact = self.load(request.label)
        if artifact is None or artifact.fingerprint != request.fingerprint:
            return None
        return artifact

    def has(self, request: Request) -> bool:
        """Whether the artifact made from exactly this is published.

        All ranks ask, and all get the same answer.
        """
        # All ranks must agree before a stage goes on: a rank that skips its work would leave the
        # others waiting in their next collective.
        return all_agree(self.find(request) is not None)

    def load(self, label: str) -> Artifact | None:
        """Return the published artifact whatever it was made from, or None.

        Raises:
            UserError: the manifest is damaged.
        """
        manifest = self.path(label) / MANIFEST
        if not manifest.is_file():
            return None
        try:
            content = json.loads(manifest.read_text())
            if not content["fingerprint"]:
                return None
            return Artifact(self.path(label), content, reused=True)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{manifest}: not a manifest; delete {self.path(label)} to make it again."
            ) from None

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
        console = console or QuietConsole()
        wait_for_everyone()  # so that all ranks see the same answer
        if done := self._find_everywhere(request):
            return done
        self.say_why(request, console)
        # Before the build: two trainings in one work directory would write the same checkpoints.
        with self._training(request, console) if together else contextlib.nullcontext():
            # Another run may have published it, and removed the work directory, a moment ago.
            if together and (done := self._find_everywhere(request)):
                return done
            if is_main_process() or together:
                if gathered is None:
                    self._build(request, build, mark=not together)
                else:
                    self._complete(request, build, gathered)
            wait_for_everyone()
            artifact = self.need(request)
            if is_main_process():
                shutil.rmtree(self.work_directory(request), ignore_errors=True)
        return replace(artifact, reused=False)

    def say_why(self, request: Request, console: Console) -> None:
        """Say in one line why a published artifact is made again; nothing if there is none."""
        earlier = self.load(request.label)
        if earlier is None:
            return
        if changes := request.changes_since(earlier):
            console.line(f"{request.label} is made again: {in_a_line(changes)}")

    def _find_everywhere(self, request: Request) -> Artifact | None:
        """Find an artifact that all ranks see; all of them must ask."""
        done = self.find(request)
        return done if all_agree(done is not None) else None

    @contextlib.contextmanager
    def _training(self, request: Request, console: Console) -> Iterator[None]:
        """Hold a training on rank 0; no rank goes on without."""
        work, refused = self.work_directory(request), None
        with contextlib.ExitStack() as stack:
            if is_main_process():
                try:
                    stack.enter_context(
                        exclusive(training_lock(self.directory, work), work, console.line)
                    )
                except RunError as error:
                    refused = error
            # The other ranks cannot know: rank 0 alone asks for the lock. They must refuse too, and
            # not wait.
            if not all_agree(refused is None):
                raise refused or busy(work)
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
            with self._lock(request):
                remove_leftovers(final, self._locks)
                stack.enter_context(marked(self._locks / draft.path.name))
                draft.path.mkdir()
            try:
                self._fill(request, build, draft)
                if is_main_process():
                    with self._lock(request):
                        if self.find(request) is None:  # else another run of the program was first
                            replace_directory(draft.path, final)
            finally:
                shutil.rmtree(draft.path, ignore_errors=True)

    def working(self, label: str) -> contextlib.AbstractContextManager[None]:
        """Show other shells that this process is at an artifact; trainings have their lock."""
        if not is_main_process():  # one mark speaks for all ranks
            return contextlib.nullcontext()
        return working(self._locks, label)

    def _complete(self, request: Request, build: Callable[[Draft], None], gathered: Path) -> None:
        """Complete and publish a gathered directory, unless another run has done so meanwhile."""
        final = self.path(request.label)
        with self.working(request.label), self._lock(request):
            # Asked again under the lock: several shares of a capture can end together.
            if self.find(request) is None:
                self._fill(request, build, Draft(gathered))
                final.parent.mkdir(parents=True, exist_ok=True)
                replace_directory(gathered, final)
        shutil.rmtree(gathered, ignore_errors=True)

    def _fill(self, request: Request, build: Callable[[Draft], None], draft: Draft) -> None:
        started = time.monotonic()
        build(draft)
        # Not the wall clock: the system may set it while a stage runs.
        seconds = draft.earlier_seconds + time.monotonic() - started
        # Last: a directory without a manifest is no artifact.
        draft.write_json(MANIFEST, self._manifest(request, draft, seconds))

    @property
    def _locks(self) -> Path:
        return self.directory / ".locks"

    def _lock(self, request: Request) -> contextlib.AbstractContextManager[None]:
        """Hold the right to publish this artifact; a process that dies loses it.

        A file system without locks gives it to everyone. Then two runs can only disturb each other
        when they publish at the very same moment.
        """
        return wait_for(self._locks / request.label.replace("/", "-"))

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
        """Return an artifact that a stage builds on.

        Raises:
            RunError: it is missing, or was made from other settings than the recipe now names.
        """
        artifact = self.load(request.label)
        path = self.path(request.label)
        if artifact is None:
            raise RunError(f"{path}: not there yet; run the stage '{request.stage}' first.")
        # An artifact of other settings is never used in silence.
        if changes := request.changes_since(artifact):
            raise RunError(
                f"{path}: made from other settings than this recipe's ({in_a_line(changes)}); "
                f"run '{request.stage}' again."
            )
        return artifact


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
