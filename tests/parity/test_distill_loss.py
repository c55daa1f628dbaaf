"""Stage II's loss on a student is the plain formula on its logits, with all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.data.rows import IGNORE_INDEX, NOT_FOUND, Batch, next_token_labels
from xlstm_distill.losses import fused as fused_loss
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.targets.providers import OnlineTargets, kept_logits
from xlstm_distill.training.objectives import DistillObjective
from xlstm_kernels.testing import error_ratio

WEIGHTS = LossWeights(0.9, 0.1)


def packed_batch(vocabulary=97, context=48):
    """Two rows of packed documents, half of their tokens supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (2, context), generator=generator)
    segments = (torch.arange(context) // 20).expand(2, -1).contiguous()
    supervised = torch.rand(2, context, generator=generator) < 0.5
    positions = (torch.arange(context) % 20).expand(2, -1).contiguous()
    labels = next_token_labels(ids, supervised, segments)
    return Batch(
        ids, positions, segments, labels, torch.ones_like(supervised), (("a", 0), ("a", 1))
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "olmo2", "granite", "cohere2", "gemma2", "gemma3_text"]
)
def test_the_task_has_the_plain_formulas_loss_and_gradients(
    family, tied, tiny_teacher, monkeypatch
):
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", 4 * 97 * 10)  # chunks of 10 tokens
    # Two families multiply their logits, and two bound them.
    own = {
        "granite": {"logits_scaling": 5.0},
        "cohere2": {"logit_scale": 0.3},
        "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0},
        "gemma3_text": {"final_logit_softcapping": 3.0},
    }.get(family, {})
    teacher = tiny_teacher(family, tie_word_embeddings=tied, **own)
    batch = packed_batch()
    plain = convert(teacher, MixerConfig(window=8, sinks=2)).double()
    student = convert(teacher, MixerConfig(window=8, sinks=2))
    plain.load_state_dict(student.state_dict())
    keep = batch.labels != IGNORE_INDEX
    with torch.no_grad():
        targets = SparseTargets.from_logits(kept_logits(teacher, batch), 16)
    logits = plain(batch.input_ids, segment_ids=batch.segment_ids).logits[keep]
    log_q = logits.log_softmax(-1)
    p, q = (
        targets.log_probs.double().log_softmax(-1),
        logits.gather(-1, targets.ids).log_softmax(-1),
    )
    cross_entropy = -log_q.gather(1, batch.labels[keep][:, None]).sum()
    (WEIGHTS.cross_entropy * cross_entropy + WEIGHTS.kl * (p.exp() * (p - q)).sum()).backward()

    task = DistillObjective(student, OnlineTargets(teacher, 16), WEIGHTS)
    sums = task(batch)
    sums.loss.backward()
    assert error_ratio(sums.parts["ce"], cross_entropy.detach()) < 1e-6
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    for (name, mine), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith("input_gate.bias"):  # its gradient is zero but for rounding
            assert error_ratio(mine.grad, theirs.grad) < 1e-5, name


def with_silent_rows(batch, *rows):
    """Take the supervision away from some rows."""
    labels = batch.labels.clone()
    labels[list(rows)] = IGNORE_INDEX
    return replace(batch, labels=labels, kept=NOT_FOUND)


def test_tokens_without_supervision_change_nothing(tiny_teacher):
    teacher, batch = tiny_teacher(), packed_batch()
    task = DistillObjective(
        convert(teacher, MixerConfig(window=8, sinks=2)), OnlineTargets(teacher, 16), WEIGHTS
    )
    full = task(batch)
    silent = with_silent_rows(batch, 1)
    first = Batch(*(x[:1] for x in list(vars(batch).values())[:5]), rows=(("a", 0),))
    torch.testing.assert_close(task(silent).loss, task(first).loss, rtol=1e-6, atol=0.0)
    assert task(silent).loss < full.loss
    loss = task(with_silent_rows(batch, 0, 1)).loss
    loss.backward()
    assert loss == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in task.student.parameters())
