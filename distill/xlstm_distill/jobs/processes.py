"""What can be known before a job starts: its number of processes, what it needs from the hub."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from xlstm_distill.errors import UserError
from xlstm_distill.jobs.site import Settings
from xlstm_distill.recipe import Recipe


def process_count(settings: Settings) -> int:
    """Processes of a stage's job on all its nodes.

    Raises:
        UserError: its launch configuration cannot be read.
    """
    if settings.launch is None:
        return 1
    # Given there, it overrides all else.
    if given := re.search(r"--num_processes[ =](\d+)", settings.launch_args):
        return int(given[1])
    if settings.processes is not None:
        return settings.nodes * settings.processes
    path = Path(settings.launch)
    try:
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["num_processes"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        raise UserError(
            f"{path}: no launch configuration with a number of processes (num_processes); give "
            "another, or name `processes` in the site file."
        ) from None


def count_text(settings: Settings) -> str:
    """Say which settings of the site file give a stage its number of processes."""
    if found := re.search(r"--num_processes[ =]\d+", settings.launch_args):
        return f"launch_args: {found[0]}"
    if settings.processes is not None:
        return f"nodes: {settings.nodes}, processes: {settings.processes}"
    return f"launch: {settings.launch}"


def from_hub(recipe: Recipe) -> list[str]:
    """Teacher and data sets that are named by their hub ids."""
    named = [recipe.teacher.path]
    for domain in recipe.data.domains.values():
        named += [source.path for source in domain.sources if source.path is not None]
    # A recipe's local paths come back absolute.
    return [name for name in dict.fromkeys(named) if not Path(name).is_absolute()]
