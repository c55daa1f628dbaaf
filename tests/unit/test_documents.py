"""Documents in rows: told apart by ids, positions or padding."""

from __future__ import annotations

import torch

from xlstm_distill.documents import document_segments, positions_in_documents


def row(*values):
    return torch.tensor([values])


def test_one_document_needs_no_segments():
    assert document_segments() is None
    assert document_segments(row(4, 4, 4), row(0, 1, 2), row(1, 1, 1)) is None
    assert document_segments(position_ids=row(7, 8, 9)) is None
    assert document_segments(row(5)) is None


def test_each_of_the_three_ends_a_document():
    assert document_segments(segment_ids=row(3, 3, 9, 9, 3)).tolist() == [[0, 0, 1, 1, 2]]
    assert document_segments(position_ids=row(0, 1, 0, 1, 2)).tolist() == [[0, 0, 1, 1, 1]]
    assert document_segments(attention_mask=row(0, 0, 1, 1)).tolist() == [[0, 0, 1, 1]]
    assert document_segments(row(0, 0, 0, 1), row(0, 1, 0, 1)).tolist() == [[0, 0, 1, 2]]


def test_left_padding_as_generate_gives_it():
    segments = document_segments(position_ids=row(0, 0, 0, 1, 2), attention_mask=row(0, 0, 1, 1, 1))
    assert segments[0, 2:].unique().numel() == 1
    assert segments[0, 1] != segments[0, 2]


def test_positions_restart():
    assert positions_in_documents(row(5, 5, 2, 2, 2, 5)).tolist() == [[0, 1, 0, 1, 2, 0]]
    both = positions_in_documents(torch.tensor([[0, 0, 0], [0, 1, 1]]))
    assert both.tolist() == [[0, 1, 2], [0, 0, 1]]
