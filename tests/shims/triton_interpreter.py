"""Give Triton's interpreter a GPU's arithmetic in bfloat16 and in TF32 products.

The interpreter keeps the bits of a bfloat16 in uint16, and differs from a GPU in three ways:
it multiplies those integers; it cuts float32 to bfloat16 instead of rounding to the nearest even;
and it takes the bits of an integer that is converted to bfloat16 as they are.
It also ignores `input_precision`: tensor cores read 10 bits of a float32's mantissa in TF32 and
drop the others. The package does not contain this module.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest


def use_gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Patch the interpreter; returns the set that collects the precisions of its products."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    bfloat16 = importlib.import_module("triton.language").bfloat16
    handle, seen = interpreter.TensorHandle, set[str]()

    def numbers(x: Any) -> np.ndarray:
        if x.dtype.scalar != bfloat16:
            return x.data
        return np.left_shift(x.data, 16, dtype=np.uint32).view(np.float32)

    def cast(_: Any, x: Any, dtype: Any) -> Any:
        target = dtype.scalar
        if x.dtype.scalar == target:
            return handle(x.data, target)
        data = numbers(x)
        converted = (
            to_bfloat16(data)
            if target == bfloat16
            else data.astype(interpreter._get_np_dtype(dtype))
        )
        return handle(converted, target)

    def dot(_: Any, a: Any, b: Any, total: Any, precision: Any, __: Any) -> Any:
        name = str(precision).rpartition(".")[2].lower()
        seen.add(name)
        left, right = numbers(a), numbers(b)
        return handle(product(left, right, name) + total.data, total.dtype.scalar)

    # The builder's methods are what the interpreter calls for every cast and every tl.dot.
    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(builder, "create_fp_to_fp", lambda self, x, dtype, _: cast(self, x, dtype))
    monkeypatch.setattr(builder, "create_dot", dot)
    return seen


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, to the even one of two; returns its bits as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    # Adding half of the last kept bit rounds to the nearest; the kept bit itself decides a tie.
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return (np.where(np.isnan(x), bits, rounded) >> 16).astype(np.uint16)


def product(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    """Multiply float32 as tensor cores do: in TF32, or as three such products of both parts.

    `precision` is tf32, tf32x3 or ieee.
    """
    if precision == "tf32":
        return np.matmul(cut(a), cut(b), dtype=np.float32)
    if precision == "tf32x3":
        # Triton leaves out the product of both low parts, which is too small to matter.
        high_a, high_b = cut(a), cut(b)
        low = np.matmul(cut(a - high_a), high_b) + np.matmul(high_a, cut(b - high_b))
        return low + np.matmul(high_a, high_b, dtype=np.float32)
    return np.matmul(a, b, dtype=np.float32)


def cut(x: np.ndarray) -> np.ndarray:
    """Drop the bits of a float32 that TF32 lacks."""
    return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(
        np.float32
    )
