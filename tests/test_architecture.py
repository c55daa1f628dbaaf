"""The one-way rule: who may import whom (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"xlstm_distill": ROOT / "distill", "xlstm_kernels": ROOT / "kernels", "xlstm_eval": ROOT / "eval"}

# Lowest first; a module imports only from its own layer and those before it.
LAYERS = (
    {
        "errors",
        "stopping",
        "_registration",
        "distributed",
        "recipe_fields",
        "recipe_training",
        "flops",
        "device",
        "checksums",
    },
    {"families", "_stand_ins", "feature_maps", "documents", "embedded", "console", "summary", "locks", "status"},
    {
        "batches",
        "recipe",
        "recipe_io",
        "recipe_docs",
        "artifacts",
        "losses",
        "fused_loss",
        "cache",
        "mixer",
        "merging",
        "packing",
        "tokenization",
        "shards",
        "optim",
        "store_codec",
        "store",
        "gates",
        "checkpoints",
        "launch",
        "planning_model",
        "planning_flops",
        "planning_activations",
        "planning_memory",
        "planning_machine",
        "planning_fit",
        "stopping",
        "tracking",
    },
    {
        "student",
        "teacher",
        "readers",
        "sources",
        "mixing",
        "preparation",
        "data",
        "targets",
        "tasks",
        "training_state",
        "diagnosis",
        "validation",
        "accelerator",
        "lora",
        "trainer",
        "planning",
        "planning_text",
    },
    {"stages", "loss_bench", "throughput", "store_bench", "data_bench"},
    {"cli", "failures", "__main__"},
)
HEAVY = {"torch", "transformers", "accelerate", "datasets", "lm_eval", "matplotlib", "numpy"}
LIGHT = ("xlstm_distill/cli.py", "xlstm_distill/failures.py", "xlstm_distill/launch.py", "xlstm_distill/distributed.py",
         "xlstm_distill/recipe.py", "xlstm_distill/recipe_io.py", "xlstm_distill/console.py",
         "xlstm_distill/__init__.py", "xlstm_distill/__main__.py", "xlstm_distill/embedded/__init__.py",
         "xlstm_eval/metrics.py", "xlstm_eval/schema.py", "xlstm_eval/score.py")  # fmt: skip


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of all absolute imports in a file; those that only type checkers read are left out."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        stack.extend(ast.iter_child_nodes(node))
    return found


def modules(package: str) -> list[Path]:
    return sorted((PACKAGES[package] / package).rglob("*.py"))


def layer_of(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if module in names:
            return number
    raise AssertionError(f"xlstm_distill.{module} has no layer: add it to LAYERS")


@pytest.mark.parametrize("path", modules("xlstm_distill"), ids=lambda p: p.stem)
def test_layers_import_downwards_only(path):
    parts = path.relative_to(PACKAGES["xlstm_distill"] / "xlstm_distill").with_suffix("").parts
    if parts == ("__init__",):
        return  # the package's lazy exports
    own = layer_of(parts[0])
    for name in imports(path):
        if name.startswith("xlstm_distill.") and (target := name.split(".")[1]) not in ("__version__", parts[0]):
            assert layer_of(target) <= own, f"{path.name} imports {name}, a higher layer"


def test_xlstm_eval_is_a_leaf_that_only_stages_and_the_cli_use():
    for path in modules("xlstm_eval"):
        assert not any(n.startswith(("xlstm_distill", "xlstm_kernels")) for n in imports(path)), path
    for path in modules("xlstm_distill"):
        if any(n.startswith("xlstm_eval") for n in imports(path)):
            assert path.parent.name == "stages" or path.stem == "cli", path


def test_kernels_import_torch_and_the_standard_library_only():
    import sys

    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "xlstm_kernels"}
    for path in modules("xlstm_kernels"):
        assert {n.split(".")[0] for n in imports(path)} <= allowed, path


def test_lm_eval_is_imported_by_the_harness_alone():
    for package in PACKAGES:
        for path in modules(package):
            if any(n.split(".")[0] == "lm_eval" for n in imports(path)):
                assert path.name == "harness.py", path


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_nothing_heavy(name):
    path = PACKAGES[name.split("/")[0]] / name
    assert not {n.split(".")[0] for n in imports(path, top_level_only=True)} & HEAVY


def test_source_roots_have_no_init_of_their_own():
    for root in PACKAGES.values():
        assert not (root / "__init__.py").exists()
