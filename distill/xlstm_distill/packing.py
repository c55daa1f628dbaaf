"""From documents to rows: tokens, which of them are supervised, and best-fit packing to the context length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xlstm_distill.errors import UserError

GENERATION_TAG = re.compile(r"{%-?\s*generation\b")
"""How a chat template marks what the assistant says; without it, turns are found by rendering every prefix."""
OPEN_ROWS = 64
"""Rows kept open for best-fit packing; more fill better and mix documents over a longer stretch."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: ids, and which of them the student is trained to predict."""

    ids: list[int]
    supervised: list[bool]

    def pieces(self, length: int) -> Iterator[Tokens]:
        """Split into pieces of at most `length` tokens."""
        for start in range(0, len(self.ids), length):
            yield Tokens(self.ids[start : start + length], self.supervised[start : start + length])


class DocumentTokenizer:
    """Tokenise documents of three styles: `messages`, `prompt` + `response`, or `text`.

    Supervised are the assistant's turns, the response, or all of the text; each ends with the end-of-text token. A
    prompt that is a list of messages is a chat that the response ends; so is a plain one where the tokenizer has a
    chat template, since such a teacher was tuned on nothing else.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.marks_turns = bool(GENERATION_TAG.search(tokenizer.chat_template or ""))

    def __call__(self, document: Mapping[str, Any]) -> Tokens:
        """Tokenise one document."""
        if "messages" in document:
            return self._messages(list(document["messages"]))
        if "prompt" in document:
            prompt, response = document["prompt"], document["response"]
            if isinstance(prompt, str) and self.tokenizer.chat_template is None:
                return self._join(self.tokenizer(prompt)["input_ids"], self._ending(response))
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            return self._messages([*turns, {"role": "assistant", "content": response}])
        return self._join([], self.tokenizer(document["text"])["input_ids"] + self._end())

    def _messages(self, messages: list[dict[str, str]]) -> Tokens:
        if self.tokenizer.chat_template is None:
            raise UserError("teacher.path: its tokenizer has no chat template, which data with 'messages' needs.")
        if self.marks_turns:
            encoded = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return Tokens(encoded["input_ids"], [bool(x) for x in encoded["assistant_masks"]])
        return self._messages_by_prefix(messages)

    def _messages_by_prefix(self, messages: list[dict[str, str]]) -> Tokens:
        """Find the assistant's tokens as what each turn adds to the prompt before it."""
        ids = self._render(messages)
        supervised = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(self._render(messages[:turn], add_generation_prompt=True))
                stop = len(self._render(messages[: turn + 1]))
                supervised[start:stop] = [True] * (stop - start)
        return Tokens(ids, supervised)

    def _render(self, messages: list[dict[str, str]], **options: bool) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]

    def _end(self) -> list[int]:
        return [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []

    def _ending(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + self._end()

    @staticmethod
    def _join(prompt: list[int], rest: list[int]) -> Tokens:
        return Tokens(prompt + rest, [False] * len(prompt) + [True] * len(rest))


@dataclass
class _Row:
    """A row that is being filled."""

    ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)

    def add(self, document: Tokens) -> None:
        segment = self.segments[-1] + 1 if self.segments else 0
        self.ids += document.ids
        self.supervised += document.supervised
        self.segments += [segment] * len(document.ids)

    def finish(self, context: int, pad: int) -> dict[str, Any]:
        length, missing = len(self.ids), context - len(self.ids)
        last = self.segments[-1] + 1
        return {
            "input_ids": self.ids + [pad] * missing,
            "supervised": self.supervised + [False] * missing,
            "segment_ids": self.segments + [last] * missing,
            "length": length,
        }


def pack(documents: Iterable[Tokens], context: int, pad: int) -> Iterator[dict[str, Any]]:
    """Pack documents into rows of `context` tokens, each into the fullest open row it fits (online best fit).

    A document longer than the context becomes several, and nothing is cut off. Yields rows with `input_ids`,
    `supervised`, `segment_ids` (one number per document, one more for padding) and `length` (tokens before padding).
    """
    rows: list[_Row] = []
    for document in documents:
        for piece in document.pieces(context):
            fitting = [row for row in rows if len(row.ids) + len(piece.ids) <= context]
            row = max(fitting, key=lambda row: len(row.ids), default=None)
            if row is None:
                if len(rows) == OPEN_ROWS:
                    fullest = max(rows, key=lambda row: len(row.ids))
                    rows.remove(fullest)
                    yield fullest.finish(context, pad)
                row = _Row()
                rows.append(row)
            row.add(piece)
            if len(row.ids) == context:
                rows.remove(row)
                yield row.finish(context, pad)
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        yield row.finish(context, pad)
