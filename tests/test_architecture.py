"""The one-way rule: rooms import from earlier rooms, and no import inside a room is circular."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "xlstm_distill": ROOT / "distill",
    "xlstm_kernels": ROOT / "kernels",
    "xlstm_eval": ROOT / "eval",
}
# In order: a room imports from itself and from those above it.
ROOMS = {
    "xlstm_distill": (
        "errors",
        "runtime",
        "recipe",
        "artifacts",
        "embedded",
        "models",
        "losses",
        "data",
        "targets",
        "merging",
        "training",
        "planning",
        "stages",
        "export",
        "serving",
        "jobs",
        "benchmarks",
        "cli",
        "__main__",
    ),
    "xlstm_kernels": (
        "segments",
        "state",
        "checks",
        "reference",
        "registration",
        "torch",
        "triton",
        "toolchain",
        "verdicts",
        "peers",
        "dispatch",
        "api",
        "testing",
        "selfcheck",
        "doctor",
        "benchmarks",
    ),
    "xlstm_eval": (
        "problems",
        "records",
        "metrics",
        "statistics",
        "score",
        "suites",
        "samples",
        "results",
        "tasks",
        "protocol",
        "stock",
        "terminal",
        "loading",
        "answering",
        "beside",
        "earlier",
        "harness",
        "long_context",
        "report",
    ),
}
# Rooms with a face: names that others import from the room itself.
FACES = {
    "xlstm_distill",
    "xlstm_distill.recipe",
    "xlstm_distill.artifacts",
    "xlstm_distill.embedded",
    "xlstm_kernels",
    "xlstm_eval.suites",
    "xlstm_eval.report",
}
LARGEST_ROOM = 14
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "lm_eval",
    "matplotlib",
    "numpy",
    "scipy",
}
# Files that the command line loads before it knows what to do.
LIGHT = (
    "xlstm_distill/__init__.py",
    "xlstm_distill/__main__.py",
    "xlstm_distill/embedded/__init__.py",
    "xlstm_distill/cli/*.py",
    "xlstm_distill/cli/processes/*.py",
    "xlstm_distill/recipe/*.py",
    "xlstm_distill/runtime/console.py",
    "xlstm_distill/runtime/launcher.py",
    "xlstm_distill/runtime/ranks.py",
    "xlstm_distill/runtime/signals.py",
    "xlstm_distill/runtime/watch.py",
    "xlstm_distill/jobs/*.py",
    "xlstm_distill/stages/choices.py",
    "xlstm_distill/stages/status/*.py",
    "xlstm_distill/stages/upkeep.py",
    "xlstm_eval/metrics.py",
    "xlstm_eval/problems.py",
    "xlstm_eval/records.py",
    "xlstm_eval/score.py",
    "xlstm_eval/suites/*.py",
)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of all absolute imports in a file, without those for type checkers alone."""
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


def dotted(path: Path) -> str:
    """Dotted name of a source file; a package's own file has the package's name."""
    root = next(root for root in PACKAGES.values() if path.is_relative_to(root))
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path): path for package in PACKAGES for path in modules(package)}


def module_of(name: str) -> str | None:
    """The module of ours that an imported name belongs to; None for other packages'."""
    while name and name not in NAMES:
        name = name.rpartition(".")[0]
    return name or None


def room_number(module: str) -> int:
    package, _, rest = module.partition(".")
    room = rest.split(".")[0]
    assert room in ROOMS[package], f"{module} is in no room: add {room!r} to ROOMS"
    return ROOMS[package].index(room)


OURS = sorted(set(NAMES) - set(PACKAGES))


@pytest.mark.parametrize("module", OURS)
def test_rooms_import_from_earlier_rooms_only(module):
    package = module.split(".")[0]
    for name in imports(NAMES[module]):
        target = module_of(name)
        if target in (None, *PACKAGES) or not target.startswith(f"{package}."):
            continue
        assert room_number(target) <= room_number(module), f"{module} imports {name}, a later room"


def test_only_the_command_line_imports_from_the_top_of_the_package():
    """It prints the version. The top knows the rooms, so a room that imports it closes a circle."""
    for module in OURS:
        taken = {name for name in imports(NAMES[module]) if module_of(name) in PACKAGES}
        own = {name for name in taken if name.split(".")[0] == module.split(".")[0]}
        assert own <= (
            {"xlstm_distill.__version__"} if module == "xlstm_distill.cli.app" else set()
        )


def test_inside_a_room_no_import_is_circular():
    edges = {
        module: {target for name in imports(NAMES[module]) if (target := module_of(name))}
        - {module}
        for module in NAMES
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circular: {' -> '.join((*path, module))}"
        if module in done:
            return
        for target in edges[module]:
            visit(target, (*path, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def test_only_faces_export_names():
    for name, path in NAMES.items():
        if path.name == "__init__.py" and name not in FACES:
            body = ast.parse(path.read_text()).body
            one_docstring = len(body) == 1 and isinstance(body[0], ast.Expr)
            assert one_docstring or not body, f"{path}: one docstring says what the room is for"


def test_no_room_is_crowded():
    for package in PACKAGES:
        for folder in {path.parent for path in modules(package)}:
            count = sum(path.name != "__init__.py" for path in folder.glob("*.py"))
            assert count <= LARGEST_ROOM, f"{folder} holds {count} modules"


# Besides these, the recipe uses its rendering of validation errors and its named suites, which need
# pydantic and yaml only.
EVAL_USERS = ("stages", "cli")


def test_xlstm_eval_is_a_leaf_that_only_stages_and_the_cli_use():
    for path in modules("xlstm_eval"):
        assert not any(n.startswith(("xlstm_distill", "xlstm_kernels")) for n in imports(path)), (
            path
        )
    for path in modules("xlstm_distill"):
        used = {module_of(name) for name in imports(path) if name.startswith("xlstm_eval")}
        if path.parent.name == "recipe":
            assert used <= {"xlstm_eval.problems", "xlstm_eval.records", "xlstm_eval.suites"}, path
        else:
            room = path.relative_to(PACKAGES["xlstm_distill"] / "xlstm_distill").parts[0]
            assert not used or room in EVAL_USERS, path


def test_kernels_import_torch_and_the_standard_library_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "xlstm_kernels"}
    for path in modules("xlstm_kernels"):
        assert {n.split(".")[0] for n in imports(path)} <= allowed, path


# The last one loads it at once, so it is itself imported inside functions.
LM_EVAL_USERS = {"harness.py", "loading.py", "language_model.py"}


def test_lm_eval_is_imported_by_the_harness_and_its_parts_alone():
    for package in PACKAGES:
        for path in modules(package):
            if any(n.split(".")[0] == "lm_eval" for n in imports(path)):
                assert path.name in LM_EVAL_USERS, path


@pytest.mark.parametrize("pattern", LIGHT)
def test_light_modules_load_nothing_heavy(pattern):
    found = sorted(PACKAGES[pattern.split("/")[0]].glob(pattern))
    assert found, pattern
    for path in found:
        heavy = {n.split(".")[0] for n in imports(path, top_level_only=True)} & HEAVY
        assert not heavy, f"{path} loads {heavy}"


def test_source_roots_have_no_init_of_their_own():
    for root in PACKAGES.values():
        assert not (root / "__init__.py").exists()
