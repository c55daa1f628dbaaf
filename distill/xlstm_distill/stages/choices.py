"""What the words of a command choose: experts, models, shares (loads no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


def choose_refined(recipe: Recipe, wanted: str | None) -> Sequence[str]:
    """All experts that the recipe refines, or one of them, like `choose_experts`.

    Raises:
        UserError: the recipe refines none, or has none of this name or index.
    """
    if recipe.refine is None:
        raise UserError(
            "refine: the recipe has no such section; add one (docs/refine.md), or go on with merge."
        )
    names = recipe.refine.refined(recipe.distill)
    return choose(names, wanted, "--expert", "the experts that the recipe refines")


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


def share_of_domains(recipe: Recipe, shard: str | None) -> tuple[int, int]:
    """Share of the domains (`I/N`) that a command takes; all of them without words.

    Raises:
        UserError: it is no share, or there are fewer domains than shares.
    """
    share = parse_share(shard) if shard is not None else (0, 1)
    domains = len(recipe.data.domains)
    if share[1] > domains:
        raise UserError(
            f"--shard: {shard!r} asks for {share[1]} shares. A share is whole domains, and the "
            f"recipe has {domains}: N is at most {domains}. Each domain uses the cores of its "
            "machine (data.workers); book those instead of more tasks."
        )
    return share


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
