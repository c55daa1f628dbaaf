"""An artifact, what it is made from, and an artifact that is being written."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from xlstm_distill.artifacts.changes import CHANGED_INPUTS, changed_inputs, changed_settings
from xlstm_distill.artifacts.hashing import digest, state_of
from xlstm_distill.artifacts.manifest import FORMAT, changed, check_sizes, content_problems

KEPT_CHARACTERS = 12
"""Characters of the fingerprint in the name of an artifact that was kept."""


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
        """What the inputs of later artifacts name.

        It is the fingerprint, except where a later artifact may read a part of this one: rows and
        targets keep their identity however many of them there are.
        """
        return self.manifest["identity"]

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Size and SHA-256 of each file, by its path in the artifact.

        Shards of rows and targets have no SHA-256: they carry checksums of their own.
        """
        return self.manifest.get("files", {})

    @property
    def bytes(self) -> int:
        """Size of all files on the disk."""
        if "files" in self.manifest:
            return sum(fact["size"] for fact in self.files.values())
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def check_sizes(self) -> None:
        """Compare the sizes of the files with the manifest; raises RunError, reads none of them."""
        check_sizes(self.path, self.files)

    def check_content(self, folder: str = "") -> None:
        """Compare the checksums of the files in a folder of the artifact with the manifest.

        A process reads a file once, for as long as its size, times and inode stay. Several ranks
        need one that asks.

        Raises:
            RunError: a file is missing or changed.
        """
        inside = {}
        for name, fact in self.files.items():
            if PurePosixPath(name).is_relative_to(folder):
                inside[name] = fact
        # A file of the wrong size or none at all is an error here, and has no state to remember.
        check_sizes(self.path, inside)
        states = tuple(tuple(state_of(self.path / name)) for name in inside)
        _check_content(self.path, json.dumps(inside), states)

    @property
    def model_path(self) -> Path:
        """Hugging Face directory of the model inside the artifact."""
        return self.path / "model"

    def read_json(self, name: str) -> Any:
        """Read one of the artifact's JSON files."""
        return json.loads((self.path / name).read_text())


@functools.cache
def _check_content(path: Path, files: str, states: tuple[tuple[int, ...], ...]) -> None:
    # Cached on values: a merge and an evaluation in one process load the same expert. The states
    # are there for the cache alone: a file that changed since is read again.
    for name, problem in content_problems(path, json.loads(files)).items():
        raise changed(path, name, problem)


@dataclass
class Draft:
    """An artifact that is being written.

    `path` is a temporary directory that becomes the artifact when all went well.
    `earlier_seconds` is time spent before: gathering the files, or a training that was cut short.
    `self_checked` are patterns (`rows-*.arrow`) of files with checksums of their own: the manifest
    holds their sizes only, and `xlstm-distill verify` lets their readers check them. `temporary`
    are files that go once the artifact is published.
    """

    path: Path
    earlier_seconds: float = 0.0
    results: dict[str, Any] = field(default_factory=dict)
    self_checked: tuple[str, ...] = ()
    temporary: tuple[str, ...] = ()

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the artifact."""
        # Without NaN: JSON has none, and other readers than Python's refuse it.
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        (self.path / name).write_text(text + "\n")


@dataclass(frozen=True)
class Request:
    """What an artifact is to be made from: parts of the recipe, and the artifacts it is built on.

    `identity` stands for it in the inputs of later artifacts; None means the fingerprint.

    Two fields are for messages only and no part of the fingerprint: `keys` are the recipe keys of
    parts that have another name in the recipe; `notes` are settings behind the inputs' hashes, kept
    in the manifest so that a change can be named without hashing files.
    """

    stage: str
    parts: Mapping[str, Any]
    inputs: Mapping[str, str]
    name: str | None = None
    identity: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`stage` or `stage/name`."""
        return self.stage if self.name is None else f"{self.stage}/{self.name}"

    @property
    def fingerprint(self) -> str:
        """Hash of stage, recipe parts and inputs."""
        return digest(
            # `keys` and `notes` are left out: they word messages, and a better wording must make
            # nothing anew.
            {"format": FORMAT, "stage": self.label, "parts": self.parts, "inputs": self.inputs}
        )

    def covers(self, earlier: Artifact) -> bool:
        """Whether what is made now holds all that an earlier artifact held.

        So it is with rows and targets of which there will be more: the first ones are the same.
        """
        rows, earlier_rows = self.parts.get("rows"), earlier.manifest["recipe"].get("rows")
        same = self.identity is not None and self.identity == earlier.identity
        return same and rows is not None and earlier_rows is not None and rows >= earlier_rows

    def changes_since(self, earlier: Artifact) -> list[str]:
        """Say what has changed since an artifact of this label was made; empty if nothing has."""
        manifest = earlier.manifest
        # The fingerprint decides. What follows only puts the difference into words.
        if earlier.fingerprint == self.fingerprint:
            return []
        found = changed_settings(manifest.get("recipe", {}), self.parts, self.keys)
        named = changed_settings(manifest.get("notes", {}), self.notes, {}) if self.notes else []
        inputs = changed_inputs(manifest.get("inputs", {}), self.inputs)
        if named and manifest.get("notes"):
            # The settings say more than that the teacher, which is their hash, changed.
            inputs = [change for change in inputs if change != CHANGED_INPUTS["teacher"]]
            found += named
        found += inputs
        if manifest.get("format") != FORMAT:
            made, now = manifest.get("format"), FORMAT
            found.append(f"another version of the program made it (format {made}, now {now})")
        # Never empty here: callers take an empty list for `nothing has changed`.
        return found or ["made from something else"]
