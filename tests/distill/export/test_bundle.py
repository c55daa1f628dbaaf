"""Joining modules into one source: only what is needed, and names that stay apart."""

from __future__ import annotations

import ast
import builtins
import sys
from pathlib import Path

import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.export import bundle
from xlstm_distill.export.modeling import REPLACED, auto_map, modeling_source
from xlstm_distill.models.families import FAMILIES


@pytest.fixture
def two_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules that define the same names."""
    (tmp_path / "first_part.py").write_text(
        "import math\n"
        "# Why it is 2.\n"
        "size = 2\n"
        "def step(x, size=size):\n"
        "    return [size for size in x] + [math.floor(size)]\n"
        "def unused():\n"
        "    return step\n"
    )
    (tmp_path / "second_part.py").write_text(
        "from first_part import step as first\n"
        "size = 30\n"
        "class Box:\n"
        "    size: int = 5\n"
        "    def step(self, x):\n"
        "        return step(x), self.size, size\n"
        "def step(x):\n"
        "    first_size = size\n"
        "    return first(x) + [first_size, (lambda size: size)(7)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bundle, "OURS", ("first_part", "second_part"))
    bundle.read_module.cache_clear()


@pytest.mark.usefixtures("two_modules")
def test_a_bundle_computes_what_its_modules_do() -> None:
    made = bundle.Bundle({})
    made.add(("second_part", "Box"))
    text = "\n".join([*made.imports.values(), made.text()])
    namespace: dict = {}
    exec(text, namespace)
    from second_part import Box

    assert namespace["Box"]().step([1, 2]) == Box().step([1, 2]) == ([1, 2, 2, 30, 7], 5, 30)
    assert "# Why it is 2." in text
    assert "unused" not in text
    assert {name for name in namespace if "step" in name} == {"first_part_step", "second_part_step"}


@pytest.mark.usefixtures("two_modules")
def test_a_definition_can_come_from_another_place() -> None:
    made = bundle.Bundle({("first_part", "step"): ("second_part", "size")})
    made.add(("second_part", "step"))
    assert "first_part" not in made.text()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_modeling_file_needs_torch_and_transformers_alone(family: str) -> None:
    source = modeling_source(family, "1.2.3")
    tree = ast.parse(source)
    imported, defined = set(), set(dir(builtins)) | {"__name__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            imported |= {str(name).split(".")[0] for name in names}
            defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    assert imported <= {"torch", "transformers", *sys.stdlib_module_names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used <= defined, used - defined
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {name.rpartition(".")[2] for name in auto_map(family).values()} <= classes


def test_what_stands_in_takes_what_the_operators_take() -> None:
    """A parameter that an operator gains must not be missing in the modeling file."""
    import importlib
    import inspect

    for (module, name), (other, stand_in) in REPLACED.items():
        if module == "xlstm_kernels.api":
            there = inspect.signature(getattr(importlib.import_module(module), name))
            here = inspect.signature(getattr(importlib.import_module(other), stand_in))
            assert list(here.parameters) == list(there.parameters)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match="'gpt2' cannot be converted"):
        modeling_source("gpt2", "1.2.3")
