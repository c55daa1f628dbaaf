"""Validation rows are shared out evenly, each once."""

from __future__ import annotations

import pytest

from xlstm_distill.training.validation import rank_batches


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_ranks_share_validation_rows_evenly(processes, domains):
    shares = [
        list(rank_batches(domains, 3, processes=processes, rank=rank)) for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1  # as many batches on every rank
    for together in zip(*shares, strict=True):
        sizes = [len(rows) if counts else 0 for rows, counts in together]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= 3
    counted = []
    for share in shares:
        for rows, counts in share:
            counted += rows if counts else []
    every = {(name, index) for name in domains for index in range(4)}
    assert (len(counted), set(counted)) == (8, every)
