"""Look after a run's artifacts: verify their checksums, list and remove what is kept."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from xlstm_distill.artifacts import Artifact
from xlstm_distill.artifacts.files import remove_directory
from xlstm_distill.artifacts.hashing import HASH_THREADS
from xlstm_distill.artifacts.locks import wait_for
from xlstm_distill.artifacts.manifest import content_problems, read_manifest, unlisted
from xlstm_distill.artifacts.shelf import KEPT, folders_of, lock_file
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.runtime.console import Console, byte_size

NO_CHECKSUMS = "an earlier version made it, without checksums"


@dataclass
class Verified:
    """What `verify` found of an artifact; `path` is from the run directory on.

    `note` says what could not be checked, `unlisted` which files somebody added where no program
    reads them, and `problems` what is wrong.
    """

    label: str
    path: str
    files: int = 0
    bytes: int = 0
    note: str | None = None
    unlisted: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kept:
    """An artifact of other settings; `path` is from the run directory on."""

    label: str
    path: str
    bytes: int
    finished: str


def verify(run: Path, console: Console) -> list[Verified]:
    """Read every file of every artifact, also of those that are kept, and compare checksums.

    Raises:
        UserError: it is no run directory.
    """
    found: list[Verified] = []
    artifacts: list[tuple[Verified, Artifact]] = []
    for label, folder in folders_of(run):
        result = Verified(label, folder.relative_to(run).as_posix())
        found.append(result)
        try:
            content = read_manifest(folder)
        except UserError as error:
            result.problems.append(str(error))
            continue
        if content is None:
            continue
        artifact = Artifact(folder, content)
        result.files, result.bytes = len(artifact.files), artifact.bytes
        if not artifact.files:
            result.note = NO_CHECKSUMS
        else:
            _note_unlisted(result, artifact)
        artifacts.append((result, artifact))
    total = sum(result.bytes for result, artifact in artifacts if artifact.files)
    # In millions: the console writes a thousand million as B, which reads like bytes.
    with console.progress("verify", total / 1e6, unit="MB") as progress:
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                progress.update(count / 1e6)

        for result, artifact in artifacts:
            result.problems += _problems(artifact, advance)
    return found


def _note_unlisted(result: Verified, artifact: Artifact) -> None:
    """Note files that were added since an artifact was published; in its model they are wrong."""
    for name in unlisted(artifact.path, artifact.files):
        path = artifact.path / name
        if PurePosixPath(name).is_relative_to("model"):
            # Whoever loads the model loads whatever lies there: more weights, other settings.
            result.problems.append(f"{path}: the manifest does not list it; move it elsewhere.")
        else:
            result.unlisted.append(str(path))


def _problems(artifact: Artifact, advance: Callable[[int], None]) -> list[str]:
    """What is wrong with an artifact's files."""
    wrong = content_problems(artifact.path, artifact.files, advance)
    found = [f"{artifact.path / name}: {problem}" for name, problem in wrong.items()]
    # Shards of the wrong size, and those whose index is damaged, need no reading.
    shards = {}
    for name, fact in artifact.files.items():
        if "sha256" not in fact and name not in wrong:
            shards[name] = fact["size"]
    if not shards:
        return found
    try:
        checks = _own_checks(artifact)
    except (RunError, OSError, ValueError, KeyError, TypeError) as error:
        return [*found, f"{artifact.path}: its shards cannot be checked ({error})"]

    def check(name: str) -> str | None:
        problem = None
        if name not in checks:
            problem = f"{artifact.path / name}: the index does not name it"
        else:
            try:
                checks[name]()
            except (RunError, OSError) as error:
                problem = str(error)
        advance(shards[name])
        return problem

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        found += [problem for problem in pool.map(check, shards) if problem]
    return found


def _own_checks(artifact: Artifact) -> Mapping[str, Callable[[], None]]:
    """By file, the check of a shard that carries checksums of its own; it raises RunError."""
    if artifact.manifest["stage"] == "data":
        from xlstm_distill.data.shards import INDEX_FILE, check_shard

        checks: dict[str, Callable[[], None]] = {}
        for shard in artifact.read_json(INDEX_FILE)["shards"]:
            checks[shard["file"]] = functools.partial(check_shard, artifact.path, shard)
        return checks
    from xlstm_distill.targets.store import shard_checks

    # It loads torch, so only where there are targets.
    folder = artifact.path / "store"
    return {f"store/{name}": check for name, check in shard_checks(folder).items()}


def read_kept(run: Path) -> list[Kept]:
    """Artifacts of other settings that are kept; damaged ones are left out."""
    found: list[Kept] = []
    for label, folder in folders_of(run):
        if not KEPT.fullmatch(folder.name):
            continue
        try:
            content = read_manifest(folder)
        except UserError:
            continue
        if content is not None:
            size = Artifact(folder, content).bytes
            path = folder.relative_to(run).as_posix()
            found.append(Kept(label, path, size, str(content.get("finished", ""))))
    return found


def clean(run: Path) -> list[Kept]:
    """Remove the artifacts of other settings that are kept; returns them."""
    removed = read_kept(run)
    for kept in removed:
        # No run puts it back at this moment.
        with wait_for(lock_file(run, kept.label)):
            remove_directory(run / kept.path, Path(kept.label).name)
    return removed


def kept_lines(kept: Iterable[Kept]) -> list[str]:
    """Say what is kept, for reading."""
    listed = list(kept)
    if not listed:
        return []
    size = byte_size(sum(one.bytes for one in listed))
    lines = [f"kept from earlier settings, {size} ('xlstm-distill clean RUN' removes them):"]
    for one in listed:
        lines.append(f"  {one.path}  {byte_size(one.bytes)}  {one.finished}".rstrip())
    return lines


def to_json(results: Iterable[Verified]) -> str:
    """Write what was verified as JSON; facts that do not apply are left out."""
    found: list[dict[str, Any]] = []
    for result in results:
        found.append({key: value for key, value in asdict(result).items() if value is not None})
    ok = not any(entry["problems"] for entry in found)
    return json.dumps({"ok": ok, "artifacts": found}, indent=1)
