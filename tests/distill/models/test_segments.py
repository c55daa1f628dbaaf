"""Documents in rows: told apart by ids, positions or padding."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill.models.segments import chunk_documents, positions_in_documents


def row(*values):
    return torch.tensor([values])


def documents(segment_ids=None, position_ids=None, attention_mask=None, past=None):
    given = next(ids for ids in (segment_ids, position_ids, attention_mask) if ids is not None)
    return chunk_documents(
        tuple(given.shape), given.device, segment_ids, position_ids, attention_mask, past
    )


def document_segments(*args, **kwargs):
    return documents(*args, **kwargs).segments


def test_one_document_needs_no_segments():
    assert chunk_documents((2, 3), torch.device("cpu"))[:2] == (None, None)
    assert document_segments(row(4, 4, 4), row(0, 1, 2), row(1, 1, 1)) is None
    assert document_segments(position_ids=row(7, 8, 9)) is None
    assert document_segments(row(5)) is None
    # Whoever must not wait for the device gets the same documents, as numbers.
    same = chunk_documents((1, 3), torch.device("cpu"), row(4, 4, 4), wait=False)
    assert same.segments.tolist() == [[0, 0, 0]]


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


@pytest.mark.parametrize("mask", [[0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 1, 0]], ids=str)
def test_padding_inside_a_row_is_refused(mask):
    with pytest.raises(
        ValueError, match=r"attention_mask: a row has padding between .* segment_ids"
    ):
        documents(attention_mask=torch.tensor([[1, 1, 1, 1], mask]))


@pytest.mark.parametrize("mask", [[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], ids=str)
def test_padding_at_the_sides_is_a_document_of_its_own(mask):
    found = documents(attention_mask=row(*mask))
    real = [n for n, m in enumerate(mask) if m]
    positions = found.positions if found.positions is not None else torch.arange(4)[None]
    assert positions[0, real].tolist() == list(range(len(real)))


def test_padding_between_chunks_is_seen_with_masks_of_either_length():
    past = documents(attention_mask=row(0, 1, 1)).ends
    for mask in (row(0, 1), row(0, 1, 1, 0, 1)):
        with pytest.raises(ValueError, match="padding between"):
            chunk_documents((1, 2), mask.device, attention_mask=mask, past=past)
    for mask in (row(1, 1), row(0, 1, 1, 1, 1)):
        found = chunk_documents((1, 2), mask.device, attention_mask=mask, past=past)
        assert found.segments is None
        assert found.positions.tolist() == [[2, 3]]


def test_a_chunk_continues_a_document_or_begins_one():
    past = documents(torch.tensor([[0, 0, 4], [0, 0, 0]])).ends
    found = documents(torch.tensor([[4, 4, 5], [1, 1, 1]]), past=past)
    assert found.segments.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert found.positions.tolist() == [[1, 2, 0], [0, 1, 2]]
    past = documents(position_ids=torch.tensor([[5, 6, 7], [0, 1, 0]])).ends
    found = documents(position_ids=torch.tensor([[8, 9], [0, 1]]), past=past)
    assert found.segments.tolist() == [[0, 0], [1, 1]]
    token = documents(position_ids=torch.tensor([[10], [2]]), past=found.ends)
    assert token.segments.tolist() == [[0], [0]]


def test_segment_ids_that_say_nothing_about_a_chunks_start_are_refused():
    past = chunk_documents((1, 3), torch.device("cpu")).ends
    with pytest.raises(ValueError, match="segment_ids: given after cached tokens that had none"):
        documents(row(0, 0), past=past)
    with pytest.raises(ValueError, match=r"segment_ids: shape \(1, 3\), allowed \(1, 2\)"):
        chunk_documents((1, 2), torch.device("cpu"), row(0, 0, 0))
