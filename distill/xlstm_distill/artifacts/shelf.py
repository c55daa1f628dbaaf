"""Where artifacts lie, as one process sees them: find, keep, put back and publish."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from xlstm_distill.artifacts.artifact import KEPT_CHARACTERS, Artifact, Request
from xlstm_distill.artifacts.changes import in_a_line
from xlstm_distill.artifacts.files import flush_upwards, replace_directory
from xlstm_distill.artifacts.locks import wait_for
from xlstm_distill.artifacts.manifest import MANIFEST, read_manifest
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.runtime.console import Console, byte_size

KEPT = re.compile(rf"(.+)\.kept-[0-9a-f]{{{KEPT_CHARACTERS}}}")
"""Names of folders with artifacts of other settings; the group is the artifact's own name."""


def folders_of(run: Path) -> list[tuple[str, Path]]:
    """Label and folder of all artifacts of a run, also of those that are kept, by name.

    Raises:
        UserError: it is no run directory.
    """
    artifacts = run / "artifacts"
    if not artifacts.is_dir():
        raise UserError(
            f"RUN: {run} is no run directory (it has no folder 'artifacts'); "
            "give the one that 'run' wrote."
        )
    found: list[tuple[str, Path]] = []
    # `stage` or `stage/name`: deeper folders hold shards and samples by the thousand.
    paths = [*artifacts.glob(f"*/{MANIFEST}"), *artifacts.glob(f"*/*/{MANIFEST}")]
    for path in sorted(paths):
        folder = path.parent.relative_to(artifacts)
        # Drafts and gathered shards lie in hidden folders beside the artifacts.
        if not any(name.startswith(".") for name in folder.parts):
            kept = KEPT.fullmatch(folder.name)
            label = folder.with_name(kept[1]) if kept else folder
            found.append((label.as_posix(), path.parent))
    return found


def lock_file(run: Path, label: str) -> Path:
    """The lock that gives the right to publish an artifact, or to move it."""
    return run / ".locks" / label.replace("/", "-")


class Shelf:
    """The artifacts of a run directory, and those that are kept beside them.

    `drop_replaced` removes an artifact of other settings when a new one takes its place; without
    it the earlier one is kept, and put back when the recipe goes back to its settings. No method
    speaks to other ranks.
    """

    def __init__(self, directory: Path, console: Console, *, drop_replaced: bool = False) -> None:
        self.directory, self.console, self.drop_replaced = directory, console, drop_replaced

    def path(self, label: str) -> Path:
        """Where the artifact of a stage (`stage` or `stage/name`) lies."""
        return self.directory / "artifacts" / label

    def kept_path(self, label: str, fingerprint: str) -> Path:
        """Where an artifact of other settings is kept: beside the one that took its place."""
        # Beside it: a rename cannot cross file systems, and folders of a run may be links.
        final = self.path(label)
        return final.with_name(f"{final.name}.kept-{fingerprint[:KEPT_CHARACTERS]}")

    def find(self, request: Request) -> Artifact | None:
        """Return the published artifact if it was made from exactly this, else None.

        Raises:
            RunError: a file of it is missing or has another size.
        """
        artifact = self.load(request.label)
        if artifact is None or artifact.fingerprint != request.fingerprint:
            return None
        artifact.check_sizes()
        return artifact

    def load(self, label: str) -> Artifact | None:
        """Return the published artifact whatever it was made from, or None.

        Raises:
            UserError: the manifest is damaged.
        """
        return self._load(self.path(label))

    def _load(self, folder: Path) -> Artifact | None:
        content = read_manifest(folder)
        return None if content is None else Artifact(folder, content, reused=True)

    def kept(self, label: str) -> list[Artifact]:
        """Artifacts of this label that were made from other settings and are kept."""
        final = self.path(label)
        found: list[Artifact] = []
        for path in sorted(final.parent.iterdir()) if final.parent.is_dir() else []:
            name = KEPT.fullmatch(path.name)
            if name and name[1] == final.name and (artifact := self._load(path)):
                found.append(artifact)
        return found

    def find_or_restore(self, request: Request) -> Artifact | None:
        """Find an artifact; put one back that was kept when other settings replaced it."""
        found = self.find(request)
        if found is not None:
            return found
        place = self.kept_path(request.label, request.fingerprint)
        kept = self._load(place)
        if kept is None or kept.fingerprint != request.fingerprint:
            return None
        kept.check_sizes()
        ending = ""
        with self.lock(request):
            if place.exists():  # else another process was faster
                earlier, aside = self.load(request.label), None
                if earlier is not None:
                    # Also with --replace, which is for what a command makes: this one is only read.
                    aside = self.kept_path(request.label, earlier.fingerprint)
                    ending = f"; the one of other settings is kept in {aside}"
                replace_directory(place, self.path(request.label), aside)
        self.console.line(
            f"{request.label}: made from these settings before, and put back "
            f"({byte_size(kept.bytes)} from {place.name}){ending}"
        )
        return self.find(request)

    def place_of_earlier(self, request: Request) -> Path | None:
        """Where the artifact goes whose place is about to be taken; None if it is removed."""
        earlier = self.load(request.label)
        return None if earlier is None else self.keep_at(request, earlier)

    def keep_at(self, request: Request, earlier: Artifact) -> Path | None:
        """Where an earlier artifact is kept when this takes its place; None if it is removed."""
        if self.drop_replaced or request.covers(earlier):
            return None
        return self.kept_path(request.label, earlier.fingerprint)

    def publish(self, source: Path, request: Request) -> None:
        """Rename a complete folder into the artifact's place; the lock must be held."""
        final = self.path(request.label)
        final.parent.mkdir(parents=True, exist_ok=True)
        replace_directory(source, final, self.place_of_earlier(request))
        # A stage's first artifact makes the folder that it lies in.
        flush_upwards(final.parent, self.directory)

    @property
    def locks(self) -> Path:
        """Folder of the lock files."""
        return self.directory / ".locks"

    def lock(self, request: Request) -> contextlib.AbstractContextManager[None]:
        """Hold the right to publish this artifact; a process that dies loses it.

        A file system without locks gives it to everyone. Then two runs can only disturb each other
        when they publish at the very same moment.
        """
        return wait_for(lock_file(self.directory, request.label))

    def not_there(self, request: Request) -> RunError:
        """The error for an artifact that is missing, or made from other settings."""
        artifact, path = self.load(request.label), self.path(request.label)
        if artifact is None:
            return RunError(f"{path}: not there yet; run the stage '{request.stage}' first.")
        # An artifact of other settings is never used in silence.
        changes = in_a_line(request.changes_since(artifact))
        return RunError(
            f"{path}: made from other settings than this recipe's ({changes}); run "
            f"'{request.stage}' again."
        )
