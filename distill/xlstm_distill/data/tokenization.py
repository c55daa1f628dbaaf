"""From documents to tokens: which of them are supervised, and what happens to a document that does not fit a row."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import jinja2
import numpy as np

from xlstm_distill.errors import UserError
from xlstm_distill.recipe.data import LongDocuments

GENERATION_TAG = re.compile(r"{%-?\s*generation\b")
"""How a chat template marks what the assistant says; without it, turns are found by rendering every prefix."""
DATE_CALL = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")
TODAY = date(2024, 7, 26)
"""What a template gets that asks for the date: rows must not depend on the day they were made. Llama 3.1's default."""
Messages = list[dict[str, Any]]


class DocumentOutcome(enum.IntEnum):
    """What became of a document."""

    KEPT = 0
    SPLIT = 1
    TRUNCATED = 2
    DROPPED = 3
    EMPTY = 4
    UNSUPERVISED = 5
    REFUSED = 6


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: ids (T,) int32, and which of them the student is trained to predict (T,) bool."""

    ids: np.ndarray
    supervised: np.ndarray
    outcome: DocumentOutcome = DocumentOutcome.KEPT
    reason: str | None = None

    @classmethod
    def of(cls, ids: Sequence[int], supervised: Sequence[bool] | Sequence[int]) -> Tokens:
        """Make a document from lists."""
        return cls(np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool))

    @classmethod
    def without(cls, outcome: DocumentOutcome, reason: str | None = None) -> Tokens:
        """A document of which nothing is kept, and why."""
        return cls(np.empty(0, dtype=np.int32), np.empty(0, dtype=bool), outcome, reason)

    def __len__(self) -> int:
        return len(self.ids)

    def pieces(self, length: int) -> list[Tokens]:
        """Split into pieces of at most `length` tokens."""
        starts = range(0, len(self.ids), length)
        return [Tokens(self.ids[s : s + length], self.supervised[s : s + length]) for s in starts]


@dataclass(frozen=True)
class Chunk:
    """Documents of one source in a row, to be tokenised together; `first` is the record number of the first one."""

    documents: Sequence[Mapping[str, Any]]
    field: str
    origin: str
    first: int

    def where(self, index: int) -> str:
        """Name a document, for messages."""
        return f"{self.field}: record {self.first + index + 1} of {self.origin}"


class Chat(NamedTuple):
    """Messages, and the first of them that may be supervised: of a prompt and its response, the response."""

    messages: Messages
    first: int = 0


class DocumentTokenizer:
    """Tokenise documents of three styles: `messages`, `prompt` + `response` (and `system`), or `text`.

    Supervised are the assistant's turns, the response, or all of the text; each ends with the end-of-text token. A
    prompt that is a list of messages is a chat that the response ends; so is a plain one where the tokenizer has a
    chat template, since such a teacher was tuned on nothing else.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = _dated(tokenizer.get_chat_template()) if tokenizer.chat_template else None
        self.marks_turns = bool(GENERATION_TAG.search(self.template or ""))
        self.closing = tuple(sorted({str(token) for token in tokenizer.get_added_vocab()} - {""}))

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> list[Tokens]:
        """Tokenise documents, all of one style; their texts are text and their messages have role and content."""
        if not documents:
            return []
        if "text" in documents[0]:
            return self._texts([document["text"] for document in documents])
        if "messages" in documents[0]:
            return self._chats([Chat(list(document["messages"])) for document in documents])
        if self.template is None and all(
            isinstance(d["prompt"], str) and "system" not in d for d in documents
        ):
            return self._pairs([d["prompt"] for d in documents], [d["response"] for d in documents])
        return self._chats([_as_chat(document) for document in documents])

    def _texts(self, texts: list[str]) -> list[Tokens]:
        encoded = [self._ended(ids) for ids in self._encode(texts)]
        return [Tokens.of(ids, [True] * len(ids)) for ids in encoded]

    def _pairs(self, prompts: list[str], responses: list[str]) -> list[Tokens]:
        end = self.tokenizer.eos_token_id
        heads = [ids[:-1] if ids[-1:] == [end] else ids for ids in self._encode(prompts)]
        tails = [self._ended(ids) for ids in self._encode(responses, add_special_tokens=False)]
        return [
            Tokens.of(h + t, [False] * len(h) + [True] * len(t))
            for h, t in zip(heads, tails, strict=True)
        ]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        return self.tokenizer(
            texts, return_attention_mask=False, return_token_type_ids=False, **options
        )["input_ids"]

    def _chats(self, chats: list[Chat]) -> list[Tokens]:
        if self.template is None:
            raise UserError("teacher.path: its tokenizer has no chat template, which chats need.")
        whole = self._marked if self.marks_turns else self._by_prefix
        try:
            return whole(chats)
        except (jinja2.TemplateError, TypeError) as error:
            # Templates refuse what they were not written for, such as two user turns in a row, or a content of None.
            if len(chats) == 1:
                return [Tokens.without(DocumentOutcome.REFUSED, " ".join(str(error).split()))]
            return [self._chats([chat])[0] for chat in chats]

    def _marked(self, chats: list[Chat]) -> list[Tokens]:
        encoded = self._encode_marked([chat.messages for chat in chats])
        found = [
            Tokens.of(*pair)
            for pair in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        ]
        for chat, tokens in zip(chats, found, strict=True):
            if any(message["role"] == "assistant" for message in chat.messages[: chat.first]):
                (before,) = self._encode_marked([chat.messages[: chat.first]])["assistant_masks"]
                turns = len(_starts(np.array(before, dtype=bool)))
                starts = _starts(tokens.supervised)
                tokens.supervised[: starts[turns] if turns < len(starts) else None] = False
        return found

    def _encode_marked(self, chats: list[Messages]) -> Any:
        return self.tokenizer.apply_chat_template(
            chats, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=True
        )

    def _by_prefix(self, chats: list[Chat]) -> list[Tokens]:
        """Find the assistant's turns as what each adds to the rendered text before it."""
        if not self.tokenizer.is_fast:
            raise UserError(
                "teacher.path: its tokenizer is a slow one, without the character offsets that chats need; use its "
                "fast version, or a chat template with generation tags."
            )
        texts = [self._render(chat.messages) for chat in chats]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
            return_token_type_ids=False,
        )  # fmt: skip
        found = []
        for chat, text, ids, offsets in zip(
            chats, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
            supervised = np.zeros(len(ids), dtype=bool)
            for start, stop in self._turns(chat, text):
                first = int(np.searchsorted(spans[:, 1], start, side="right"))
                supervised[first : int(np.searchsorted(spans[:, 0], stop, side="left"))] = True
            found.append(Tokens(np.array(ids, dtype=np.int32), supervised))
        return found

    def _turns(self, chat: Chat, text: str) -> list[tuple[int, int]]:
        """Characters of every assistant turn to supervise of a rendered chat, its closing token included.

        A turn that the template renders otherwise once more turns follow (some drop the reasoning) is left out.
        """
        spans, messages = [], chat.messages
        for turn in range(max(chat.first, 1), len(messages)):
            if messages[turn]["role"] != "assistant":
                continue
            before = self._render(messages[:turn])
            asked = self._render(messages[:turn], add_generation_prompt=True)
            through = self._render(messages[: turn + 1]) if turn + 1 < len(messages) else text
            if not (text.startswith(before) and text.startswith(through)):
                continue
            # A generation prompt may hold more than the turn itself, such as an opening reasoning tag.
            start = max(len(before), _common(asked, text))
            closed = through.rstrip()
            # White space after the closing token is the template's, and the model never has to write it.
            spans.append((start, len(closed) if closed.endswith(self.closing) else len(through)))
        return spans

    def _render(self, chat: Messages, **options: bool) -> str:
        return self.tokenizer.apply_chat_template(
            chat, chat_template=self.template, tokenize=False, **options
        )


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    if b.startswith(a):
        return len(a)
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _dated(template: str) -> str:
    """Put a fixed date where a template asks for today's."""
    return DATE_CALL.sub(lambda call: repr(TODAY.strftime(call[2])), template)


def _starts(mask: np.ndarray) -> np.ndarray:
    """Where stretches of True begin."""
    return np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))


def _as_chat(document: Mapping[str, Any]) -> Chat:
    """A prompt, after the system message if there is one, and the response, which alone is supervised."""
    prompt = document["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if "system" in document:
        turns.insert(0, {"role": "system", "content": document["system"]})
    return Chat([*turns, {"role": "assistant", "content": document["response"]}], first=len(turns))


@dataclass(frozen=True)
class ChunkTokenizer:
    """Tokenises chunks: checks the documents, and applies the recipe's policy to those longer than `context`."""

    tokenize: DocumentTokenizer
    context: int
    long_documents: LongDocuments

    def __call__(self, chunk: Chunk) -> list[Tokens]:
        """Tokenise a chunk's documents, one result each.

        Raises:
            UserError: a document has a wrong type, or is too long and the policy is `error`.
        """
        documents = [
            _checked(document, chunk.where(index)) for index, document in enumerate(chunk.documents)
        ]
        tokenized = iter(
            self.tokenize([document for document in documents if document is not None])
        )
        return [
            Tokens.without(DocumentOutcome.EMPTY)
            if document is None
            else self._fit(next(tokenized), chunk, index)
            for index, document in enumerate(documents)
        ]

    def _fit(self, tokens: Tokens, chunk: Chunk, index: int) -> Tokens:
        if tokens.outcome is not DocumentOutcome.KEPT:
            return tokens
        if len(tokens) > self.context:
            if self.long_documents == "error":
                raise UserError(
                    f"{chunk.where(index)} has {len(tokens)} tokens, more than data.context ({self.context}), and "
                    "data.long_documents is 'error'; raise the context, or choose split, truncate or drop."
                )
            if self.long_documents == "drop":
                return Tokens.without(DocumentOutcome.DROPPED)
            if self.long_documents == "truncate":
                kept = slice(self.context)
                tokens = Tokens(
                    tokens.ids[kept], tokens.supervised[kept], DocumentOutcome.TRUNCATED
                )
            else:
                tokens = Tokens(tokens.ids, tokens.supervised, DocumentOutcome.SPLIT)
        # The first token of a document is never predicted.
        return (
            tokens if tokens.supervised[1:].any() else Tokens.without(DocumentOutcome.UNSUPERVISED)
        )


def _checked(document: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """A document as it is tokenised, or None if there is nothing to read or to learn; nulls count as empty.

    Raises:
        UserError: a column holds something else than its style needs.
    """
    found: dict[str, Any] = {}
    for role, value in document.items():
        if value is None or (isinstance(value, str | list) and not value):
            if role == "system":
                continue
            return None
        if isinstance(value, str) and role != "messages":
            found[role] = value
            continue
        if role not in ("messages", "prompt"):
            raise UserError(f"{where}: its {role} is {type(value).__name__}; text is needed.")
        if (messages := _checked_messages(value, f"{where}: its {role}")) is None:
            return None
        found[role] = messages
    if (
        "system" in found
        and isinstance(found["prompt"], list)
        and found["prompt"][0]["role"] == "system"
    ):
        raise UserError(
            f"{where}: its prompt begins with a system message; leave out the source's 'system' column."
        )
    return found


def _checked_messages(value: Any, where: str) -> Messages | None:
    """Messages whose contents are text; None if one has no content, or an assistant's an empty one, and no tool call.

    Keys without a value are left out: a schema adds them to all messages, and templates ask whether they are there.
    """
    found: Messages = []
    for message in value if isinstance(value, list) else [None]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{where} must be a list of messages with 'role' and 'content'.")
        calls = bool(message.get("tool_calls"))
        if "content" not in message and not calls:
            raise UserError(f"{where} must be a list of messages with 'role' and 'content'.")
        content = _text_of(
            message.get("content"), f"{where} has a content in message {len(found) + 1} that"
        )
        if not calls and (content is None or (not content and message["role"] == "assistant")):
            return None
        whole = {**message, "content": content}
        found.append({key: part for key, part in whole.items() if part is not None and part != []})
    return found


def _text_of(content: Any, where: str) -> str | None:
    """A content's text, which may lie in parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(
            f"{where} is {type(content).__name__}; text, or a list of parts of type 'text', is needed."
        )
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            kind = repr(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            raise UserError(
                f"{where} has a part of type {kind}; text, or a list of parts of type 'text', is needed."
            )
    return "".join(part["text"] for part in content)
