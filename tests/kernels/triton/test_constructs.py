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


# `test_resources` reads what was compiled of them for D = 64 and 128; this is for all dims.
def test_kernels_whose_products_would_run_on_have_one_stage() -> None:
    for settings in MLSTM.values():
        _, _, _, output, _, token_grads = settings
        assert output[3] == token_grads[3] == 1
    assert {stage for settings in WINDOW.values() for stage in (settings[2], settings[4])} == {1}


# Strides of rows of features: where 16 divides them, loads are wide. And of what may adjoin.
STRIDES = {"q_t", "k_t", "v_t", "C_row", "n_k", "i_h", "f_h", "gate_h", "m_h"}
FEATURES = ("q", "k", "v", "phi_q", "phi_k", "C", "n", "keys", "values")
STRIDES |= {f"{name}_{axis}" for name in FEATURES for axis in "bh"}


def test_counts_and_limits_are_not_compiled_in() -> None:
    for kernel in kernels():
        if not kernel.name.endswith("_kernel"):
            continue
        (decorator,) = kernel.decorator_list
        hybrid = kernel.name == "hybrid_step_kernel"
        names = "ALL_BUT_R" if hybrid else "UNSPECIALISED"
        assert ast.unparse(decorator) == f"triton.jit(do_not_specialize={names})", kernel.name
        numbers = {
            argument.arg
            for argument in kernel.args.args
            if argument.annotation is None and not argument.arg.endswith("_ptr")
        }
        rest = numbers - STRIDES - {"scale"} - set(common.UNSPECIALISED)
        assert rest == set(), kernel.name
    assert not STRIDES & set(common.UNSPECIALISED)
