"""Prepare: make (or find) the packed rows of domains, which all ranks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xlstm_distill.artifacts import Artifact, Run
from xlstm_distill.data.budget import rows_needed
from xlstm_distill.data.prepare import prepare_domain
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.launcher import parse_share
from xlstm_distill.runtime.ranks import wait_for_everyone
from xlstm_distill.stages.lineage import Lineage


def prepare(
    lineage: Lineage, run: Run, console: Console, shard: str | None = None
) -> list[Artifact]:
    """Make the rows of all domains that the recipe's stages read, or of one share of the domains.

    Needs the teacher's tokenizer and configuration; neither its weights nor a GPU.
    """
    recipe = lineage.recipe
    rows = {name: rows_needed(recipe, name, lineage.captured) for name in recipe.data.domains}
    part, parts = parse_share(shard) if shard is not None else (0, 1)
    mine = deal(rows, parts)[part] if part < len(rows) else []
    if not mine:
        console.line(
            f"prepare: {parts} shares for {len(rows)} domains; share {part}/{parts} has none."
        )
    return list(prepare_rows(lineage, run, mine, console).values())


def deal(rows: Mapping[str, int], parts: int) -> list[list[str]]:
    """Share domains out so that the largest share is small: each goes to the least one so far.

    The largest domains are dealt first. Of equal domains or shares the first counts.
    """
    # More shares than domains would stay empty.
    parts = min(parts, len(rows))
    shares: list[list[str]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for name in sorted(rows, key=lambda name: -rows[name]):
        least = totals.index(min(totals))
        shares[least].append(name)
        totals[least] += rows[name]
    return shares


def prepare_rows(
    lineage: Lineage, run: Run, names: Iterable[str], console: Console
) -> dict[str, Artifact]:
    """Return the packed rows of the named domains, in the recipe's order."""
    # Barrier: below, rank 0 may wait hours for another run's preparation.
    wait_for_everyone()
    wanted = set(names)
    found: dict[str, Artifact] = {}
    for name in lineage.recipe.data.domains:
        # Every rank walks the same names in the same order: each preparation holds barriers.
        if name in wanted:
            found[name] = prepare_domain(
                lineage.recipe, run, name, lineage.tokenizer, lineage.tokenizer_hash, console
            )
    return found
