"""Attention inside the documents of packed rows, against softmax in float64 with a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xlstm_distill.models.attention import documents
from xlstm_distill.models.attention.documents import Documents, attend_in_documents
from xlstm_kernels.segments import document_runs
from xlstm_kernels.testing import error_ratio

# A document of one token; blocks of 16 and 32 that are full, and one token more; documents that go
# on, by their ids, in the next row, and one that is its whole row; ids below 0, and one that
# returns.
LENGTHS = [[1, 15, 32, 33, 2, 17], [100], [16, 34, 50]]
IDS = [[0, -1, 0, 5, -3, 2], [2], [2, 7, -1]]
SCALE = 0.4


def rows() -> torch.Tensor:
    found = [np.repeat(ids, lengths) for ids, lengths in zip(IDS, LENGTHS, strict=True)]
    return torch.from_numpy(np.stack(found))


def inputs(heads=4, groups=2, D=12, Dv=12, dtype=torch.float32, B=3, T=100):
    generator = torch.Generator().manual_seed(heads * groups * D)
    shapes = (B, heads, T, D), (B, groups, T, D), (B, groups, T, Dv)
    return [torch.randn(shape, generator=generator).to(dtype) * 2 for shape in shapes]


def reference(q, k, v, ids):
    """Attend with a mask of documents in float64, (B, T, H, Dv)."""
    shared = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(shared, dim=1) for x in (k, v))
    runs = document_runs(ids)
    seen = torch.ones(q.shape[2], q.shape[2]).tril().bool() & (runs[:, :, None] == runs[:, None])
    scores = (q @ k.mT * SCALE).masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


@pytest.fixture
def poisoned():
    """Have memory that nobody wrote to hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("shape", "dtype", "bound"),
    [
        *(((4, groups, 12, 12), torch.float32, 1e-6) for groups in (1, 2, 4)),
        ((6, 2, 8, 20), torch.float32, 1e-6),  # R = 3
        ((4, 2, 8, 20), torch.float64, 1e-14),
        ((4, 2, 12, 12), torch.bfloat16, 3e-3),
        ((4, 2, 12, 12), torch.float16, 4e-4),
    ],
)
@pytest.mark.parametrize(("long", "at_once"), [(1024, 1 << 21), (1024, 1), (34, 20_000)])
def test_documents_attend_as_by_a_mask(shape, dtype, bound, long, at_once, monkeypatch, poisoned):
    """All at once, each alone, and long ones by the fused kernel beside parts of short ones."""
    monkeypatch.setattr(documents, "LONG", long)
    monkeypatch.setattr(documents, "NUMBERS_AT_ONCE", at_once)
    q, k, v = inputs(*shape, dtype=dtype)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as most teachers have them
    found = attend_in_documents(q, k, v, SCALE, Documents(rows()))
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert error_ratio(found, reference(q, k, v, rows())) < bound


def test_large_scores_do_not_overflow():
    """Scores of about 10,000 have three digits behind the point; the fused kernel has 2.7e-6."""
    q, k, v = inputs()
    found = attend_in_documents(q * 1000, k, v, SCALE, Documents(rows()))
    assert error_ratio(found, reference(q * 1000, k, v, rows())) < 1e-5


def test_autocast_does_not_reach_inside():
    """Under it rotations and norms leave q and k in fp32, and v is in 16 bits."""
    q, k, v = inputs()
    v = v.bfloat16()
    expected = attend_in_documents(q, k, v, SCALE, Documents(rows()))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend_in_documents(q, k, v, SCALE, Documents(rows()))
    assert error_ratio(found, reference(q, k, v, rows())) < 1e-6
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_nothing_to_attend_to(B, T):
    found = attend_in_documents(*inputs(B=B, T=T), SCALE, Documents(rows()[:B, :T]))
    assert found.shape == (B, T, 4, 12)


def test_what_is_not_finite_stays_in_its_document():
    q, k, v = inputs()
    before = attend_in_documents(q, k, v, SCALE, Documents(rows()))
    hit = document_runs(rows()) == 3
    hit[1:] = False
    for x, value in ((q, torch.nan), (k, torch.inf), (v, torch.nan)):
        x.transpose(1, 2)[hit] = value
    after = attend_in_documents(q, k, v, SCALE, Documents(rows()))
    assert after[hit].isnan().all()
    assert torch.equal(after[~hit], before[~hit])


def test_gradients_are_those_of_the_mask():
    given = [x.requires_grad_() for x in inputs()]
    dout = torch.randn(3, 100, 4, 12, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(attend_in_documents(*given, SCALE, Documents(rows())), given, dout)
    expected = torch.autograd.grad(reference(*given, rows()), given, dout.double())
    assert all(error_ratio(x, y) < 1e-5 for x, y in zip(found, expected, strict=True))


def test_parts_hold_each_token_once_and_few_numbers(monkeypatch):
    """What a part computes with does not grow with the number of documents."""
    monkeypatch.setattr(documents, "NUMBERS_AT_ONCE", 1 << 16)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 90, 200)
    ids = torch.from_numpy(np.repeat(np.arange(200), lengths))[None]
    parts = Documents(ids).parts(2, 2, 24)
    tokens = ids.numel() * 2
    written = torch.cat([part.write for part in parts])
    assert torch.equal(written[written < tokens].sort().values, torch.arange(tokens))
    for part in parts:
        scores = max(count * (block + 1) for block, count in enumerate(part.counts))
        numbers = len(part.read) * 3 * 24 + scores * 2 * part.bias.numel()
        assert numbers <= 1 << 16
    assert len(parts) < 50  # of 200 documents
