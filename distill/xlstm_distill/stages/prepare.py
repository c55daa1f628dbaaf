"""Prepare: make (or find) the packed rows of domains, which all ranks share."""

from __future__ import annotations

from collections.abc import Iterable

from xlstm_distill.artifacts import Artifact, Run
from xlstm_distill.data.prepare import prepare_domain
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import wait_for_everyone
from xlstm_distill.stages.lineage import Lineage


def prepare(
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
