"""Prepare: make (or find) the packed rows of domains, which all ranks share."""

from __future__ import annotations

from collections.abc import Iterable

from xlstm_distill.artifacts import Artifact, Run
from xlstm_distill.data.budget import rows_needed
from xlstm_distill.data.prepare import prepare_domain, rows_there
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import is_main_process, on_cpu, process_count, wait_for_everyone
from xlstm_distill.stages.choices import deal, share_of_domains
from xlstm_distill.stages.lineage import Lineage

MUCH = 50_000_000
"""Missing tokens from which GPUs should not wait: many minutes on one machine's CPU."""


def prepare(
    lineage: Lineage, run: Run, console: Console, shard: str | None = None
) -> list[Artifact]:
    """Make the rows of all domains that the recipe's stages read, or of one share of the domains.

    Needs the teacher's tokenizer and configuration; neither its weights nor a GPU.

    Raises:
        UserError: there are fewer domains than shares.
    """
    recipe = lineage.recipe
    rows = {name: rows_needed(recipe, name, lineage.captured) for name in recipe.data.domains}
    part, parts = share_of_domains(recipe, shard)
    mine = deal(rows, parts)[part]
    if shard is not None:
        console.line(
            f"prepare: share {part}/{parts} is {', '.join(mine)} of {len(rows)} domains. A share "
            "is whole domains; each uses the cores of its machine (data.workers)."
        )
    # A single process that prepares keeps nobody waiting.
    asked_for = process_count() == 1
    return list(prepare_rows(lineage, run, mine, console, asked_for=asked_for).values())


def prepare_rows(
    lineage: Lineage, run: Run, names: Iterable[str], console: Console, *, asked_for: bool = False
) -> dict[str, Artifact]:
    """Return the packed rows of the named domains, in the recipe's order.

    Says who waits where much of them is missing, unless this preparation was `asked_for`.
    """
    # Barrier: below, rank 0 may wait hours for another run's preparation.
    wait_for_everyone()
    wanted = set(names)
    waiting = 0 if asked_for else _waiting()
    if waiting and is_main_process() and _missing_tokens(lineage, run, wanted) > MUCH:
        console.line(
            f"data: {waiting} {'processes' if on_cpu() else 'GPUs'} wait for the preparation; "
            "stop, and run `xlstm-distill prepare RECIPE` on a CPU machine."
        )
    found: dict[str, Artifact] = {}
    for name in lineage.recipe.data.domains:
        # Every rank walks the same names in the same order: each preparation holds barriers.
        if name in wanted:
            found[name] = prepare_domain(
                lineage.recipe, run, name, lineage.tokenizer, lineage.tokenizer_hash, console
            )
    return found


def _waiting() -> int:
    """Return how many GPUs, or processes on CPUs, would wait for rank 0; 0 for one on a CPU."""
    return 0 if process_count() == 1 and on_cpu() else process_count()


def _missing_tokens(lineage: Lineage, run: Run, names: Iterable[str]) -> int:
    """Count the tokens of the rows that are still to be made."""
    recipe, rows = lineage.recipe, 0
    for name in names:
        there = rows_there(recipe, run, name, lineage.tokenizer_hash)
        rows += max(0, rows_needed(recipe, name, lineage.captured) - there)
    return rows * recipe.data.context
