"""The run directory: artifacts with manifests, published by atomic rename, found again by what they were made from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts.files import replace_directory
from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.artifacts.locks import (
    busy,
    exclusive,
    marked,
    remove_leftovers,
    training_lock,
    wait_for,
)
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console, QuietConsole
from xlstm_distill.runtime.ranks import all_agree, is_main_process, wait_for_everyone

MANIFEST = "manifest.json"

FORMAT = 2
"""Raised when a stage's output changes meaning, so that older artifacts are made anew."""

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


@dataclass(frozen=True)
class Artifact:
    """A published result of a stage."""

    path: Path
    manifest: Mapping[str, Any]
    reused: bool = False

    @property
    def fingerprint(self) -> str:
        """Hash of everything the artifact was made from."""
        return self.manifest["fingerprint"]

    @property
    def identity(self) -> str:
        """What the inputs of those who read it name: the fingerprint, but for artifacts of which a part may be read."""
        return self.manifest["identity"]

    @property
    def model_path(self) -> Path:
        """Hugging Face directory of the model inside the artifact."""
        return self.path / "model"

    def read_json(self, name: str) -> Any:
        """Read one of the artifact's JSON files."""
        return json.loads((self.path / name).read_text())


@dataclass
class Draft:
    """An artifact being written; `path` is a temporary directory that becomes the artifact when all went well.

    `earlier_seconds` is what went into it before this: into gathering its files, or into a training that was cut short.
    """

    path: Path
    earlier_seconds: float = 0.0
    results: dict[str, Any] = field(default_factory=dict)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the artifact."""
        (self.path / name).write_text(
            json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
        )


@dataclass(frozen=True)
class Request:
    """What an artifact is to be made from: the parts of the recipe it reads and the artifacts it is built on.

    `identity` stands for it in the inputs of others where they depend on less than the whole, else the fingerprint.
    """

    stage: str
    parts: Mapping[str, Any]
    inputs: Mapping[str, str]
    name: str | None = None
    identity: str | None = None

    @property
    def label(self) -> str:
        """`stage` or `stage/name`."""
        return self.stage if self.name is None else f"{self.stage}/{self.name}"

    @property
    def fingerprint(self) -> str:
        """Hash of stage, recipe parts and inputs."""
        return digest(
            {"format": FORMAT, "stage": self.label, "parts": self.parts, "inputs": self.inputs}
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
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"--run: {directory} cannot be used as a run directory ({error.strerror})."
            ) from None
        return cls(directory, recipe)

    def path(self, label: str) -> Path:
        """Where the artifact of a stage (`stage` or `stage/name`) lies."""
        return self.directory / "artifacts" / label

    def work_directory(self, request: Request) -> Path:
        """Where what an artifact is made of lies until it is published: checkpoints and the log of a training."""
        return (
            self.directory
            / "training"
            / f"{request.label.replace('/', '-')}-{request.fingerprint[:12]}"
        )

    def find(self, request: Request) -> Artifact | None:
        """Return the published artifact if it was made from exactly this, else None."""
        artifact = self.load(request.label)
        return (
            artifact
            if artifact is not None and artifact.fingerprint == request.fingerprint
            else None
        )

    def has(self, request: Request) -> bool:
        """Whether the artifact made from exactly this is published. All processes ask, and get one answer."""
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
            return (
                Artifact(self.path(label), content, reused=True) if content["fingerprint"] else None
            )
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
        """Return the artifact made from exactly this, building it if it is not there.

        `build` writes into a temporary directory, which is renamed into place when it returns; an earlier artifact of
        the same stage stays until then, and for good when `build` raises. Of several processes the first builds and
        the others wait; with `together` all build (training), what the others wrote is dropped, and the work directory
        belongs to this run of the program until the artifact is there. `gathered` is a directory in which independent
        runs of the program have gathered the artifact's files; it becomes the artifact once, after `build` has
        completed it, and it stays when `build` raises.

        Raises:
            RunError: another run of the program is at the same training (`together`).
        """
        wait_for_everyone()  # so that all see the same answer
        if done := self._find_everywhere(request):
            return done
        with (
            self._training(request, console or QuietConsole())
            if together
            else contextlib.nullcontext()
        ):
            # Another run of the program may have published it, and removed the work directory, a moment ago.
            if together and (done := self._find_everywhere(request)):
                return done
            if is_main_process() or together:
                if gathered is None:
                    self._build(request, build)
                else:
                    self._complete(request, build, gathered)
            wait_for_everyone()
            artifact = self.need(request.label, request.fingerprint)
            if is_main_process():
                shutil.rmtree(self.work_directory(request), ignore_errors=True)
        return replace(artifact, reused=False)

    def _find_everywhere(self, request: Request) -> Artifact | None:
        """Find an artifact that all processes see; all of them must ask."""
        done = self.find(request)
        return done if all_agree(done is not None) else None

    @contextlib.contextmanager
    def _training(self, request: Request, console: Console) -> Iterator[None]:
        """Hold a training on the main process; no process goes on without."""
        work, refused = self.work_directory(request), None
        with contextlib.ExitStack() as stack:
            if is_main_process():
                try:
                    stack.enter_context(
                        exclusive(training_lock(self.directory, work), work, console.line)
                    )
                except RunError as error:
                    refused = error
            if not all_agree(refused is None):
                raise refused or busy(work)
            yield

    def _build(self, request: Request, build: Callable[[Draft], None]) -> None:
        final = self.path(request.label)
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = Draft(final.parent / f".{final.name}.{uuid.uuid4().hex[:12]}.partial")
        with contextlib.ExitStack() as stack:
            with self._lock(
                request
            ):  # a draft whose mark is not held yet would look like one of a dead process
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

    def _complete(self, request: Request, build: Callable[[Draft], None], gathered: Path) -> None:
        """Complete and publish a gathered directory, unless another run of the program has done so meanwhile."""
        final = self.path(request.label)
        with self._lock(request):
            if self.find(request) is None:
                self._fill(request, build, Draft(gathered))
                replace_directory(gathered, final)
        shutil.rmtree(gathered, ignore_errors=True)

    def _fill(self, request: Request, build: Callable[[Draft], None], draft: Draft) -> None:
        started = time.monotonic()
        build(draft)
        seconds = draft.earlier_seconds + time.monotonic() - started
        draft.write_json(MANIFEST, self._manifest(request, draft, seconds))

    @property
    def _locks(self) -> Path:
        return self.directory / ".locks"

    def _lock(self, request: Request) -> contextlib.AbstractContextManager[None]:
        """Hold the right to publish this artifact; the system takes it back from a process that dies.

        A file system without locks gives it to everyone: then only runs at the very same moment can disturb each other.
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
            "seed": self.recipe.seed,
            "versions": versions(),
            "wall_seconds": round(seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "results": draft.results,
        }

    def need(self, label: str, fingerprint: str | None = None) -> Artifact:
        """Return an artifact an asked-for stage builds on.

        Raises:
            RunError: it is missing, or was made from other settings than the recipe now names.
        """
        artifact = self.load(label)
        stage = label.split("/")[0]
        if artifact is None:
            raise RunError(f"{self.path(label)}: not there yet; run the stage '{stage}' first.")
        if fingerprint is not None and artifact.fingerprint != fingerprint:
            raise RunError(
                f"{self.path(label)}: made from other settings than this recipe's; run '{stage}' again."
            )
        return artifact


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
