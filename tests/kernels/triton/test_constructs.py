"""The kernels' sources have nothing that compilers are known to translate wrongly."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator

import pytest

from xlstm_kernels.triton.table import MLSTM, WINDOW

pytest.importorskip("triton")
from xlstm_kernels.triton import common

MODULES = (
    "common", "mlstm_forward", "mlstm_backward", "mlstm_roles", "window_kernels", "window_sinks",
    "step_kernels",
)  # fmt: skip


def kernels() -> Iterator[ast.FunctionDef]:
    for name in MODULES:
        path = importlib.import_module(f"xlstm_kernels.triton.{name}").__file__
        assert path is not None
        with open(path) as file:
            tree = ast.parse(file.read())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and "jit" in ast.dump(
                ast.Module(node.decorator_list)
            ):
                yield node


def calls(node: ast.AST, function: str) -> list[ast.Call]:
    return [
        found
        for found in ast.walk(node)
        if isinstance(found, ast.Call) and ast.unparse(found.func) == f"tl.{function}"
    ]


def transposed_products(kernel: ast.FunctionDef) -> list[str]:
    """The transpositions of what a product had a part in."""
    made: set[str] = set()

    def has_a_part(node: ast.AST) -> bool:
        names = {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}
        return bool(calls(node, "dot")) or "dot_state" in names or bool(names & made)

    before = -1
    while len(made) != before:  # a loop hands values to its next turn
        before = len(made)
        for node in ast.walk(kernel):
            if isinstance(node, ast.Assign | ast.AugAssign) and has_a_part(node.value):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                made |= {
                    found.id
                    for target in targets
                    for found in ast.walk(target)
                    if isinstance(found, ast.Name)
                }
    return [
        f"{kernel.name}: {ast.unparse(found)}"
        for found in calls(kernel, "trans")
        if any(has_a_part(argument) for argument in found.args)
    ]


# Triton 3.4 to 3.7.0 makes wrong code of it on Hopper (flash-linear-attention 640, 826, 983).
def test_no_kernel_transposes_a_product() -> None:
    found = list(kernels())
    assert {"value_role", "key_value_grad_kernel"} <= {kernel.name for kernel in found}
    assert [wrong for kernel in found for wrong in transposed_products(kernel)] == []


def test_the_search_finds_a_transposed_product() -> None:
    source = """
def kernel(q, k, v):
    for step in range(2):
        out = tl.dot(tl.trans(weights.to(q.dtype)), v)
        scores = tl.dot(q, tl.trans(k))
        weights = tl.exp(scores)
"""
    (kernel,) = ast.parse(source).body
    assert isinstance(kernel, ast.FunctionDef)
    assert transposed_products(kernel) == ["kernel: tl.trans(weights.to(q.dtype))"]


def fed_from_registers(kernel: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> bool:
    """Whether a loop has a product whose left operand a product before it had a part in.

    functions: those that a loop may call, whose products are then the loop's.
    """
    loops: list[ast.AST] = [node for node in ast.walk(kernel) if isinstance(node, ast.For)]
    called = {found.id for loop in loops for found in ast.walk(loop) if isinstance(found, ast.Name)}
    loops += [functions[name] for name in called & functions.keys()]
    products = [found for loop in loops for found in calls(loop, "dot")]
    left = {found.args[0].id for found in products if isinstance(found.args[0], ast.Name)}
    left |= {ast.unparse(found.args[0]).split(".")[0] for found in products}
    return bool(left & {"weights", "d_scores", "later"})


# Up to 3.7, Triton's pipeline overwrites operands in registers too early (triton 9433, 9514, 9530).
def test_loops_with_operands_in_registers_are_not_pipelined() -> None:
    functions = {function.name: function for function in kernels()}
    fed = {f.name for f in functions.values() if fed_from_registers(f, functions)}
    assert fed == {
        "output_kernel", "query_role", "key_role", "value_role", "pair_role",
        "window_kernel", "query_grad_kernel", "key_value_grad_kernel",
    }  # fmt: skip
    for settings in MLSTM.values():
        _, _, _, output, _, token_grads = settings
        assert output[3] == token_grads[3] == 1
    assert {stage for settings in WINDOW.values() for stage in (settings[2], settings[4])} == {1}


def test_a_new_length_of_rows_compiles_nothing() -> None:
    for kernel in kernels():
        names = {argument.arg for argument in kernel.args.args}
        if kernel.name.endswith("_kernel") and names & {"T", "chunks", "blocks", "span"}:
            (decorator,) = kernel.decorator_list
            assert ast.unparse(decorator) == "triton.jit(do_not_specialize=LENGTHS)", kernel.name
    assert set(common.LENGTHS) == {"T", "chunks", "blocks", "span"}
