"""torch.compile and torch.export see a student as one graph."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from xlstm_distill import MixerConfig, compile_decoding, convert
from xlstm_distill.errors import UserError
from xlstm_distill.models import cache

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


@pytest.mark.slow
def test_generate_decodes_in_one_graph_whatever_the_length(student):
    torch.compiler.reset()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = []
    for tokens, padding in ((30, 7), (19, 2), (5, 0), (11, 0)):
        mask = torch.ones(2, tokens, dtype=torch.long)
        mask[0, :padding] = 0
        prompts.append({"inputs": ids(2, tokens), "attention_mask": mask} | settings)
    expected = [student.generate(**prompt) for prompt in prompts]
    counter = CompileCounter()
    compile_decoding(student, backend=counter)
    # Positions are given with padding alone, so that rows without it are another graph.
    for prompt, answer, graphs in zip(prompts, expected, (1, 1, 2, 2), strict=True):
        assert torch.equal(student.generate(**prompt), answer)
        assert counter.frame_count == graphs
    # Training is none of its business.
    rows = ids()
    student.train()(rows, labels=rows).loss.backward()
    assert counter.frame_count == 2
    with pytest.raises(UserError, match="replaced already"):
        compile_decoding(student, backend=counter)


@torch.no_grad()
def test_prompts_of_one_row_share_a_graph_whatever_their_length(student):
    torch.compiler.reset()
    counter = CompileCounter()
    expected, found = [], []
    for answers in (expected, found):
        if answers is found:
            compile_decoding(student, backend=counter)
        cache = student.new_cache()
        # A conversation: further prompts come after compiled steps, and a new cache after them.
        for turn, tokens in enumerate((7, 3, 12, 5)):
            if turn == 2:
                cache = student.new_cache()
            for given in (ids(1, tokens), *ids(1, 3).split(1, dim=1)):
                # As `generate` calls it.
                held = cache.get_seq_length()
                positions = torch.arange(held, held + given.shape[1])[None]
                seen = {"past_key_values": cache, "position_ids": positions}
                answers.append(student(given, logits_to_keep=1, **seen).logits)
    assert all(map(torch.equal, expected, found))
    assert counter.frame_count == 1


@torch.no_grad()
def test_kept_attention_grows_between_compiled_steps(tiny_teacher, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(cache, "LEAST_ROOM", 4)
    kept = MixerConfig(window=8, sinks=2, attention={"heads": {0: [0]}})
    student = convert(tiny_teacher(), kept).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = student.generate(ids(1, 5), **settings)
    counter = CompileCounter()
    compile_decoding(student, backend=counter)
    assert torch.equal(student.generate(ids(1, 5), **settings), expected)
    assert counter.frame_count > 0


# By torch's own means: pytest's would leave the setting deleted, for all later tests.
@torch._dynamo.config.patch(recompile_limit=1)
@torch.no_grad()
def test_each_student_and_each_copy_has_its_own_step(student):
    torch.compiler.reset()
    counters = []
    for factor in (1, 2, 4):
        one = copy.deepcopy(student)
        one.lm_head.weight.mul_(factor)
        compile_decoding(one, backend=(counter := CompileCounter()))
        changed = copy.deepcopy(one)
        changed.model.embed_tokens.weight.neg_()
        read = pickle.loads(pickle.dumps(one))
        for model in (one, read):
            assert torch.equal(model(ids()).logits, factor * student(ids()).logits)
        assert not torch.equal(changed(ids()).logits, one(ids()).logits)
        one.generate(ids(1, 5), max_new_tokens=5, eos_token_id=None, pad_token_id=0)
        counters.append(counter.frame_count)
    assert counters == [1, 1, 1]


def test_a_cpu_without_a_compiler_is_named(student, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"torch\.compile needs a C\+\+ compiler"):
        compile_decoding(student)
