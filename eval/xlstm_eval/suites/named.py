"""The suites that come with the package: one YAML table each, in the folder `tables`.

A recipe names one (`evaluate.suite: instruct`) and may change single tasks of it.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import yaml

from xlstm_eval.problems import did_you_mean
from xlstm_eval.records import EvalError
from xlstm_eval.suites.suite import Suite

TABLES = Path(__file__).parent / "tables"


@functools.cache
def suite_names() -> tuple[str, ...]:
    """Return the names of the suites, sorted."""
    return tuple(sorted(path.stem for path in TABLES.glob("*.yaml")))


def suite_settings(name: str) -> dict[str, Any]:
    """Return a suite as plain values, with the keys of a recipe's section `evaluate`.

    Raises EvalError: unknown name.
    """
    if name not in suite_names():
        raise EvalError(f"suite: {name!r} is unknown. {did_you_mean(name, suite_names())}")
    # A copy: what the caller changes must not change the next caller's suite.
    return copy.deepcopy(_read(name))


def named_suite(name: str) -> Suite:
    """Return a suite by its name. Raises EvalError: unknown name."""
    return Suite.model_validate({"name": name, **suite_settings(name)})


@functools.cache
def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8"))
    return values
