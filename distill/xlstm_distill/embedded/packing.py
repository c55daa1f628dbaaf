"""Pack conversations into rows for the teacher's training; positions and masks keep them apart."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from xlstm_distill.embedded.conversations import documents
from xlstm_distill.embedded.tasks import DOMAINS
from xlstm_distill.embedded.tokenizer import ASSISTANT, END, render

PROMPT_WEIGHT = 0.05  # the loss's weight of a token the user wrote; the answers' is 1
CHUNK = 128  # rounds of conversations encoded at a time
# Conversations of a round. Arithmetic takes the longest to learn.
SHARES = {"math": 4, "code": 4, "stem": 2, "chat": 4}


@dataclass(frozen=True)
class Batch:
    """A packed batch, each tensor (B, T).

    Tokens, document numbers (-1 at padding), positions in the document, and loss weights.
    """

    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    weights: Tensor

    def mask(self) -> Tensor:
        """Make the causal mask within documents, (B, 1, T, T), True where a query sees a key."""
        same = self.segment_ids[:, None, :, None] == self.segment_ids[:, None, None, :]
        return same.tril()


def encoded(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Yield (tokens, loss weights) of conversations of the four domains in turn, without end."""
    vocabulary = tokenizer.get_vocab()
    assistant, end = vocabulary[ASSISTANT], vocabulary[END]
    chunk = 0
    while True:
        streams = {
            # A large prime, so that chunks of one seed are not those of the next one.
            domain: documents(domain, CHUNK * SHARES[domain], seed * 1_000_003 + chunk)
            for domain in DOMAINS
        }
        order = [domain for domain in DOMAINS for _ in range(SHARES[domain])] * CHUNK
        texts = [render(next(streams[domain])) for domain in order]
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
            yield encoding.ids, _weights(encoding.ids, assistant, end)
        chunk += 1


def _weights(ids: list[int], assistant: int, end: int) -> list[float]:
    """Weigh answers and their end tokens 1, the first token 0, and all else PROMPT_WEIGHT.

    Nothing predicts the first token.
    """
    weights, answering = [], False
    for token in ids:
        weights.append(1.0 if answering else PROMPT_WEIGHT)
        answering = token == assistant or (answering and token != end)
    weights[0] = 0.0
    return weights


def batches(
    tokenizer: PreTrainedTokenizerFast, rows: int, length: int, seed: int
) -> Iterator[Batch]:
    """Yield batches of `rows` packed rows, without end.

    A conversation goes into the first row that has room. One that fits nowhere ends the batch and
    is dropped.
    """
    stream = encoded(tokenizer, seed)
    while True:
        packed: list[list[tuple[list[int], list[float]]]] = [[] for _ in range(rows)]
        room = [length] * rows
        for ids, weights in stream:
            at = next((row for row in range(rows) if room[row] >= len(ids)), None)
            if at is None:
                break
            packed[at].append((ids, weights))
            room[at] -= len(ids)
        yield _batch(packed, length, int(tokenizer.pad_token_id))


def _batch(packed: list[list[tuple[list[int], list[float]]]], length: int, pad: int) -> Batch:
    """Write packed rows of (tokens, loss weights) into tensors; the end of a row is padding."""
    shape = (len(packed), length)
    input_ids, segment_ids = torch.full(shape, pad), torch.full(shape, -1)
    position_ids, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    for row, documents_of_row in enumerate(packed):
        start = 0
        for number, (ids, loss) in enumerate(documents_of_row):
            here = slice(start, start + len(ids))
            input_ids[row, here] = torch.tensor(ids)
            segment_ids[row, here] = number
            position_ids[row, here] = torch.arange(len(ids))
            weights[row, here] = torch.tensor(loss)
            start += len(ids)
    return Batch(input_ids, segment_ids, position_ids, weights)
