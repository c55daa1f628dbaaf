"""Make a domain's packed rows, once; they are the artifact `data/<domain>`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from xlstm_distill.artifacts import Artifact, Request, Run
from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.artifacts.locks import wait_for
from xlstm_distill.data import sources
from xlstm_distill.data.budget import held_out_span, keys_of_rows, notes_of_rows, rows_needed
from xlstm_distill.data.preparation import CHECKPOINT, PROGRESS, Preparation, clean
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import from_rank_zero, is_main_process

ROWS_FORMAT = 5
"""Raised when rows change meaning, so that those made before are made anew."""


def prepare_domain(
    recipe: Recipe, run: Run, name: str, tokenizer: Any, tokenizer_hash: str, console: Console
) -> Artifact:
    """Tokenise and pack a domain's documents into rows, once; the artifact is `data/<domain>`.

    A preparation that was killed goes on from its last finished shard and ends with the same rows,
    also one that was killed while it published them. Of several runs of the command on one run
    directory the first prepares; the others wait.
    """
    needed = rows_needed(recipe, name)
    # Rows that are there stay, also where this recipe needs fewer of them.
    # As rank 0 sees them: ranks that ask for other rows would wait for each other.
    there = from_rank_zero(lambda: rows_there(recipe, run, name, tokenizer_hash))
    needed = max(needed, there)
    request = replace(
        data_request(recipe, name, tokenizer_hash, rows=needed),
        identity=data_identity(recipe, name, tokenizer_hash),
        keys=keys_of_rows(name),
        notes=notes_of_rows(recipe, name),
    )
    folder = run.work_directory(request)
    preparation = Preparation(recipe, name, needed, tokenizer, folder, console)

    def publish() -> Artifact:
        return run.make(request, preparation.describe, gathered=folder)

    # Only rank 0 prepares, so only it asks for the lock; the others wait at the barrier in `make`.
    if not is_main_process():
        return publish()
    # Rows that are kept are put back: to tokenise them again may take days.
    if run.find_or_restore(request):
        return _tidied(publish())

    def say_waiting() -> None:
        console.line(f"{request.label}: another process prepares it; waiting.")

    # Outside of `make`: its lock is held for the moment of publishing, this one for hours.
    with wait_for(folder.with_name(f"data-{name}.lock"), say_waiting):
        if not run.find_or_restore(request):
            run.say_why(request, console)
            with run.working(request.label):
                preparation.gather()
        artifact = _tidied(publish())
        clean(folder, console)
    return artifact


def _tidied(artifact: Artifact) -> Artifact:
    """Remove what the rows were gathered with.

    After they are published: a process that dies before that still finds its checkpoint.
    """
    for name in (CHECKPOINT, PROGRESS):
        (artifact.path / name).unlink(missing_ok=True)
    return artifact


def data_identity(recipe: Recipe, name: str, tokenizer_hash: str) -> str:
    """Hash of what a domain's rows are, however many there are: the first are always the same.

    A stage's result depends on this, and on the number of rows that its own settings make it read.
    """
    span = held_out_span(recipe, name)
    return data_request(
        recipe,
        name,
        tokenizer_hash,
        held_out_span=span,
        validation_rows=recipe.data.validation_rows,
    ).fingerprint


def data_request(recipe: Recipe, name: str, tokenizer_hash: str, **counts: int) -> Request:
    """What a domain's rows are made from; `counts` says which part of them is meant."""
    parts = {
        "format": ROWS_FORMAT,
        "sources": [sources.identity(s) for s in recipe.data.domains[name].sources],
        "context": recipe.data.context,
        "long_documents": recipe.data.long_documents,
        "seed": recipe.seed,
        **counts,
    }
    return Request("data", name=name, parts=parts, inputs={"tokenizer": tokenizer_hash})


def rows_there(recipe: Recipe, run: Run, name: str, tokenizer_hash: str) -> int:
    """Return the rows asked for when the published artifact, or one that is kept, was made.

    It is 0 if there is none, or if none holds this recipe's rows.
    """
    label = f"data/{name}"
    published = [artifact for artifact in (run.load(label), *run.kept(label)) if artifact]
    most = 0
    for artifact in published:
        rows = artifact.manifest["recipe"].get("rows", 0)
        same = data_request(recipe, name, tokenizer_hash, rows=rows)
        if same.fingerprint == artifact.fingerprint:
            most = max(most, rows)
    return most


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what a tokenizer does: its vocabulary and rules, chat template and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:
        # Padding and truncation are set by the last call, not by the tokenizer's files.
        state = json.loads(backend.to_str())
        rules = [part for part in state.items() if part[0] not in ("padding", "truncation")]
    # Templates render some of the special tokens by name.
    special = json.loads(json.dumps(tokenizer.special_tokens_map, default=str))
    splits = getattr(tokenizer, "split_special_tokens", False)
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return digest([rules, tokenizer.chat_template, *ids, special, splits])
