"""What the words of a command choose: experts, models, shares of a capture (loads no torch)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.launcher import parse_share

if TYPE_CHECKING:
    from xlstm_distill.recipe import Recipe
    from xlstm_distill.stages.lineage import Lineage


def choose(names: Sequence[str], wanted: str | None, option: str, what: str) -> Sequence[str]:
    """All names, or the one that is wanted, else that of this index (of a task in a job array).

    `option` and `what` word the message: the option that was given, and what the names are.

    Raises:
        UserError: there is none of this name or index.
    """
    if wanted is None:
        return names
    # By name first: one may be called `0`.
    if wanted in names:
        return [wanted]
    if re.fullmatch(r"[0-9]{1,9}", wanted) and int(wanted) < len(names):
        return [names[int(wanted)]]
    raise UserError(
        f"{option}: {wanted!r} is not in {what}; it has {', '.join(names)} "
        f"(or by index: 0 to {len(names) - 1})."
    )


def choose_experts(names: Sequence[str], wanted: str | None) -> Sequence[str]:
    """All experts, or the one of this name, else of this index (that of a task in a job array).

    Raises:
        UserError: there is none of this name or index.
    """
    return choose(names, wanted, "--expert", "the recipe's distill.experts")


def choose_models(lineage: Lineage, wanted: str | None) -> Sequence[str]:
    """All models that the recipe evaluates, or one, like `choose_experts`."""
    return choose(lineage.evaluated_models(), wanted, "--model", "the recipe's models")


def share_of_capture(recipe: Recipe, shard: str | None) -> tuple[int, int]:
    """Share of a capture (`I/N`) that a command takes; all of it without words.

    Raises:
        UserError: it is no share, or there is nothing to share.
    """
    share = parse_share(shard) if shard is not None else (0, 1)
    if shard is not None and recipe.capture.targets == "online":
        raise UserError(
            "--shard: capture.targets is 'online', so there is nothing to share; leave it out."
        )
    return share
