"""torch.compile and torch.export see a student as one graph."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert

HYBRID = MixerConfig(window=8, sinks=2)


def ids(batch: int = 2, tokens: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def student(tiny_teacher):
    return convert(tiny_teacher(), HYBRID).eval()


@pytest.mark.slow
def test_forward_and_decoding_compile_without_a_break(student):
    # The tracer alone is asked: what a backend makes of the graphs is not the student's.
    torch.compiler.reset()
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    with torch.no_grad():
        whole = student(ids(), use_cache=False).logits
        assert torch.equal(compiled(ids(), use_cache=False).logits, whole)
        cache = student(ids()[:, :40], use_cache=True).past_key_values
        for t in range(40, 44):
            step = compiled(ids()[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(step[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_export_with_a_free_number_of_tokens(gradients, student):
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(
            student, (ids(),), dynamic_shapes={"input_ids": {1: tokens}}, strict=False
        )
    for length in (2, 9, 31, 33, 100):
        row = ids(2, length)
        expected = student(row, use_cache=False).logits
        logits = program.module()(row).logits
        assert torch.equal(logits, expected), length
    if gradients:
        with pytest.raises(NotImplementedError, match="an exported program has no gradients"):
            logits.sum().backward()
