"""Manifests: what an artifact was made from, and its files with sizes and checksums."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts.hashing import sha256_of_all
from xlstm_distill.errors import RunError, UserError

FORMAT = 3
"""Raised when a stage's output changes meaning, so that older artifacts are made anew."""
MANIFEST = "manifest.json"
REQUIRED = ("format", "stage", "fingerprint", "identity", "recipe", "inputs", "wall_seconds")
"""Keys that every version has written."""
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "format": ((int,), "a whole number"),
    "stage": ((str,), "a text"),
    "name": ((str, type(None)), "a text or null"),
    "fingerprint": ((str,), "a text"),
    "identity": ((str,), "a text"),
    "recipe": ((dict,), "an object"),
    "inputs": ((dict,), "an object"),
    "notes": ((dict,), "an object"),
    "results": ((dict,), "an object"),
    "versions": ((dict,), "an object"),
    "arithmetic": ((dict,), "an object"),
    "wall_seconds": ((int, float), "a number"),
    "finished": ((str,), "a text"),
}
"""What the values are that this program reads, and how a message says it."""
FILES_SINCE = 3
"""The first format whose manifests list files."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read an artifact's manifest; None if there is none.

    Raises:
        UserError: it is damaged, lacks a key, or a value has the wrong type.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a manifest; delete {folder} to make it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a manifest; delete {folder} to make it again.")
    needed: tuple[str, ...] = REQUIRED
    if isinstance(content.get("format"), int) and content["format"] >= FILES_SINCE:
        needed = (*REQUIRED, "files", "results")
    for key in needed:
        if key not in content:
            raise UserError(
                f"{path}: lacks the key {key!r}, which every manifest has; put the file back from a"
                f" copy, or delete {folder} to make it again."
            )
    for key, (types, words) in TYPES.items():
        # By exact type: to Python, true is a whole number.
        if key in content and type(content[key]) not in types:
            raise UserError(
                f"{path}: its key {key!r} must be {words}; put the file back from a copy, or "
                f"delete {folder} to make it again."
            )
    if not _are_facts(content.get("files", {})):
        raise UserError(
            f"{path}: its key 'files' must hold a size for each file, and its SHA-256 as text; put "
            f"the file back from a copy, or delete {folder} to make it again."
        )
    return content


def _are_facts(files: Any) -> bool:
    if not isinstance(files, dict):
        return False
    for fact in files.values():
        if not isinstance(fact, dict) or type(fact.get("size")) is not int:
            return False
        if not isinstance(fact.get("sha256", ""), str):
            return False
    return True


def facts_of_files(
    folder: Path, self_checked: Iterable[str] = (), temporary: Iterable[str] = ()
) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by its path from there on.

    Files that fit a pattern of `self_checked` get a size only: their readers compare checksums of
    their own, and hashing them would read up to hundreds of GB once more. `temporary` files are
    left out.
    """
    patterns, gone = tuple(self_checked), set(temporary)
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    names = [name for name in names if name not in gone]
    own = {name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    # Just written, so mostly still in memory: a few seconds for 16 GB in several files.
    hashes = sha256_of_all(folder / name for name in names if name not in own)
    facts: dict[str, dict[str, Any]] = {}
    for name in names:
        facts[name] = {"size": (folder / name).stat().st_size}
        if name not in own:
            facts[name]["sha256"] = hashes[folder / name]
    return facts


def _files(folder: Path) -> list[Path]:
    """All files below a folder but its manifest and drafts of files, sorted."""
    # Another process may be at a draft in a shared folder, and removes it at any moment.
    whole = (p for p in folder.rglob("*") if not fnmatch.fnmatchcase(p.name, ".*.partial"))
    return sorted(p for p in whole if p.is_file() and p != folder / MANIFEST)


def unlisted(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Files below a published folder that its manifest does not list, by name."""
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    return [name for name in names if name not in files]


def size_problem(folder: Path, name: str, fact: Mapping[str, Any]) -> str | None:
    """Say if a published file is missing or has another size; None if neither."""
    try:
        size = (folder / name).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"missing; it was published with {fact['size']} bytes"
    if size != fact["size"]:
        return f"{size} bytes; it was published with {fact['size']}"
    return None


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the sizes of published files; reads none of them.

    Raises:
        RunError: a file is missing or has another size.
    """
    for name, fact in files.items():
        if problem := size_problem(folder, name, fact):
            raise changed(folder, name, problem)


def content_problems(
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    advance: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Say what is wrong with published files, by name; reads all that have a checksum."""
    found = {}
    for name, fact in files.items():
        if problem := size_problem(folder, name, fact):
            found[name] = problem
    # A file of the wrong size needs no reading.
    hashed = {
        folder / name: name for name in files if name not in found and "sha256" in files[name]
    }
    for path, sha256 in sha256_of_all(hashed, advance).items():
        expected = files[hashed[path]]["sha256"]
        if sha256 != expected:
            found[hashed[path]] = (
                f"its content changed: SHA-256 {sha256[:12]}..., it was published with "
                f"{expected[:12]}..."
            )
    return found


def changed(folder: Path, name: str, problem: str) -> RunError:
    """The error for a published file that is not what it was."""
    return RunError(
        f"{folder / name}: {problem}. Put the file back from a copy, or delete {folder} to make it "
        "again."
    )
