"""From documents to tokens: which are supervised, and what becomes of a document too long."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import jinja2
import numpy as np

from xlstm_distill.data.documents import Messages, checked_document
from xlstm_distill.errors import UserError
from xlstm_distill.recipe.data import LongDocuments

GENERATION_TAG = re.compile(r"{%-?\s*generation\b")
"""How a chat template marks what the assistant says.

Without this tag, turns are found by rendering every prefix of the chat.
"""
DATE_CALL = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")
TODAY = date(2024, 7, 26)
"""The date that templates get which ask for today's: Llama 3.1's default.

Rows must not depend on the day on which they are made.
"""


class DocumentOutcome(enum.IntEnum):
    """What became of a document."""

    KEPT = 0
    SPLIT = 1
    TRUNCATED = 2
    DROPPED = 3
    EMPTY = 4
    UNSUPERVISED = 5
    REFUSED = 6

    @property
    def label(self) -> str:
        """The name in manifests and checkpoints."""
        return self.name.lower()


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: ids (T,) int32, and supervised (T,) bool.

    The student is trained to predict the supervised tokens. `reason` says why a chat template
    refused the document.
    """

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
        """Make a document of which nothing is kept."""
        return cls(np.empty(0, dtype=np.int32), np.empty(0, dtype=bool), outcome, reason)

    def __len__(self) -> int:
        return len(self.ids)

    def pieces(self, length: int) -> list[Tokens]:
        """Split into pieces of at most `length` tokens."""
        found = []
        for start in range(0, len(self.ids), length):
            own = slice(start, start + length)
            found.append(Tokens(self.ids[own], self.supervised[own]))
        return found


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one source, tokenised together.

    `field` and `origin` name the source in messages; `first` is the record number of the first
    document, from 0.
    """

    documents: Sequence[Mapping[str, Any]]
    field: str
    origin: str
    first: int

    def where(self, index: int) -> str:
        """Name a document, for messages."""
        return f"{self.field}: record {self.first + index + 1} of {self.origin}"


class Chat(NamedTuple):
    """Messages, of which those before `first` are never supervised.

    Of a prompt and its response, the response alone is supervised.
    """

    messages: Messages
    first: int = 0


class DocumentTokenizer:
    """Tokenise documents of three styles: `messages`, `prompt` + `response` (and `system`), `text`.

    Supervised are the assistant's turns, the response, or all of the text; each ends with the
    end-of-text token. A prompt that is a list of messages makes the document a chat that the
    response ends. So does a plain prompt where the tokenizer has a chat template, because such a
    teacher was tuned on chats only.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = _dated(tokenizer.get_chat_template()) if tokenizer.chat_template else None
        self.marks_turns = bool(GENERATION_TAG.search(self.template or ""))
        # A turn may end with any token that is no text. Every text ends with "", so it is left out.
        added = {str(token) for token in tokenizer.get_added_vocab()}
        self.closing = tuple(sorted(added - {""}))

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> list[Tokens]:
        """Tokenise documents of one style, as `checked_document` returns them."""
        if not documents:
            return []
        # The columns of a source are chosen once, so all its documents have the style of the first.
        if "text" in documents[0]:
            return self._texts([document["text"] for document in documents])
        if "messages" in documents[0]:
            return self._chats([Chat(list(document["messages"])) for document in documents])
        if self.template is None and all(_is_plain_pair(document) for document in documents):
            prompts = [document["prompt"] for document in documents]
            responses = [document["response"] for document in documents]
            return self._pairs(prompts, responses)
        return self._chats([_as_chat(document) for document in documents])

    def _texts(self, texts: list[str]) -> list[Tokens]:
        # Tokenizers add a begin token by themselves where the teacher has one, but seldom an end.
        encoded = [self._ended(ids) for ids in self._encode(texts)]
        return [Tokens.of(ids, [True] * len(ids)) for ids in encoded]

    def _pairs(self, prompts: list[str], responses: list[str]) -> list[Tokens]:
        """Put prompts before their responses, encoded apart so that no token spans both."""
        heads = [self._unended(ids) for ids in self._encode(prompts)]
        tails = [self._ended(ids) for ids in self._encode(responses, add_special_tokens=False)]
        found = []
        for head, tail in zip(heads, tails, strict=True):
            supervised = [False] * len(head) + [True] * len(tail)
            found.append(Tokens.of(head + tail, supervised))
        return found

    def _ended(self, ids: list[int]) -> list[int]:
        """Add the end-of-text token, unless there is one already."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _unended(self, ids: list[int]) -> list[int]:
        """Remove the end-of-text token that some tokenizers add to every text."""
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, return_attention_mask=False, return_token_type_ids=False, **options
        )
        return encoded["input_ids"]

    def _chats(self, chats: list[Chat]) -> list[Tokens]:
        if self.template is None:
            raise UserError("teacher.path: its tokenizer has no chat template, which chats need.")
        tokenize = self._marked if self.marks_turns else self._by_prefix
        try:
            return tokenize(chats)
        except (jinja2.TemplateError, TypeError) as error:
            # Templates refuse what they were not written for, such as two user turns in a row or a
            # content of None. One refused chat fails its whole batch: try each chat alone.
            if len(chats) == 1:
                reason = " ".join(str(error).split())
                return [Tokens.without(DocumentOutcome.REFUSED, reason)]
            return [self._chats([chat])[0] for chat in chats]

    def _marked(self, chats: list[Chat]) -> list[Tokens]:
        """Take the assistant's turns from the template's generation tags."""
        encoded = self._encode_marked([chat.messages for chat in chats])
        found = []
        for chat, ids, mask in zip(
            chats, encoded["input_ids"], encoded["assistant_masks"], strict=True
        ):
            tokens = Tokens.of(ids, mask)
            earlier = chat.messages[: chat.first]
            if any(message["role"] == "assistant" for message in earlier):
                self._clear_earlier_turns(tokens, earlier)
            found.append(tokens)
        return found

    def _clear_earlier_turns(self, tokens: Tokens, earlier: Messages) -> None:
        """Mark the assistant's turns in a prompt as not supervised, in place."""
        # The tags mark all turns alike: count those of the prompt alone, and clear as many.
        (mask,) = self._encode_marked([earlier])["assistant_masks"]
        turns = len(_starts(np.array(mask, dtype=bool)))
        starts = _starts(tokens.supervised)
        stop = starts[turns] if turns < len(starts) else None
        tokens.supervised[:stop] = False

    def _encode_marked(self, chats: list[Messages]) -> Any:
        return self.tokenizer.apply_chat_template(
            chats, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=True
        )

    def _by_prefix(self, chats: list[Chat]) -> list[Tokens]:
        """Find the assistant's turns by what each adds to the rendered text before it."""
        if not self.tokenizer.is_fast:
            raise UserError(
                "teacher.path: its tokenizer is a slow one, without the character offsets that "
                "chats need; use its fast version, or a chat template with generation tags."
            )
        texts = [self._render(chat.messages) for chat in chats]
        # Without special tokens: the template has rendered those that a chat begins with.
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        found = []
        for chat, text, ids, offsets in zip(
            chats, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # Characters (start, stop) of each token; both columns ascend.
            spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
            supervised = np.zeros(len(ids), dtype=bool)
            for start, stop in self._turns(chat, text):
                # All tokens that overlap the turn, even where a token spans its edge.
                first = np.searchsorted(spans[:, 1], start, side="right")
                end = np.searchsorted(spans[:, 0], stop, side="left")
                supervised[first:end] = True
            found.append(Tokens(np.array(ids, dtype=np.int32), supervised))
        return found

    def _turns(self, chat: Chat, text: str) -> Iterator[tuple[int, int]]:
        """Yield the characters (start, stop) of each supervised turn of a rendered chat.

        The closing token belongs to the turn. Some templates render a turn otherwise once more
        turns follow (they drop its reasoning); such a turn is left out.
        """
        messages = chat.messages
        # From 1, because a template need not render an empty list of messages.
        for turn in range(max(chat.first, 1), len(messages)):
            if messages[turn]["role"] != "assistant":
                continue
            before = self._render(messages[:turn])
            asked = self._render(messages[:turn], add_generation_prompt=True)
            is_last = turn + 1 == len(messages)
            through = text if is_last else self._render(messages[: turn + 1])
            if not (text.startswith(before) and text.startswith(through)):
                continue
            # A generation prompt may hold more than the turn itself, such as an opening reasoning
            # tag. Only what both have in common comes before the turn.
            start = max(len(before), _common_length(asked, text))
            # White space after the closing token is the template's; the model never writes it.
            closed = through.rstrip()
            yield start, len(closed) if closed.endswith(self.closing) else len(through)

    def _render(self, messages: Messages, **options: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, **options
        )


def _common_length(a: str, b: str) -> int:
    """Length of the beginning that two texts have in common."""
    # Nearly always true, and much faster than the loop.
    if b.startswith(a):
        return len(a)
    for length, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return length
    return min(len(a), len(b))


def _dated(template: str) -> str:
    """Replace a template's calls for today's date by a fixed one."""
    return DATE_CALL.sub(lambda call: repr(TODAY.strftime(call[2])), template)


def _starts(mask: np.ndarray) -> np.ndarray:
    """Find where stretches of True begin."""
    before = np.concatenate([[False], mask[:-1]])
    return np.flatnonzero(mask & ~before)


def _is_plain_pair(document: Mapping[str, Any]) -> bool:
    return isinstance(document["prompt"], str) and "system" not in document


def _as_chat(document: Mapping[str, Any]) -> Chat:
    """Make a chat of a system message if there is one, a prompt, and the response."""
    prompt = document["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if "system" in document:
        turns.insert(0, {"role": "system", "content": document["system"]})
    response = {"role": "assistant", "content": document["response"]}
    return Chat([*turns, response], first=len(turns))


@dataclass(frozen=True)
class ChunkTokenizer:
    """Tokenise chunks, and apply the recipe's policy to documents longer than `context`."""

    tokenize: DocumentTokenizer
    context: int
    long_documents: LongDocuments

    def __call__(self, chunk: Chunk) -> list[Tokens]:
        """Tokenise a chunk's documents, one result each.

        Raises:
            UserError: a document has a wrong type, or is too long and the policy is `error`.
        """
        checked = [
            checked_document(document, chunk.where(index))
            for index, document in enumerate(chunk.documents)
        ]
        sound = [document for document in checked if document is not None]
        tokenized = iter(self.tokenize(sound))
        found = []
        for index, document in enumerate(checked):
            if document is None:
                found.append(Tokens.without(DocumentOutcome.EMPTY))
            else:
                found.append(self._fitted(next(tokenized), chunk.where(index)))
        return found

    def _fitted(self, tokens: Tokens, where: str) -> Tokens:
        """Apply the policy for long documents; drop a document with nothing to train on."""
        if tokens.outcome is not DocumentOutcome.KEPT:
            return tokens
        if len(tokens) > self.context:
            tokens = self._shortened(tokens, where)
        # The first token of a document is never predicted.
        if tokens.outcome is not DocumentOutcome.DROPPED and not tokens.supervised[1:].any():
            return Tokens.without(DocumentOutcome.UNSUPERVISED)
        return tokens

    def _shortened(self, tokens: Tokens, where: str) -> Tokens:
        """Apply the policy to a document that is too long; the packer does the splitting."""
        if self.long_documents == "error":
            raise UserError(
                f"{where} has {len(tokens)} tokens, more than data.context ({self.context}), and "
                "data.long_documents is 'error'; raise the context, or choose split, truncate or "
                "drop."
            )
        if self.long_documents == "drop":
            return Tokens.without(DocumentOutcome.DROPPED)
        if self.long_documents == "split":
            return Tokens(tokens.ids, tokens.supervised, DocumentOutcome.SPLIT)
        kept = slice(self.context)
        return Tokens(tokens.ids[kept], tokens.supervised[kept], DocumentOutcome.TRUNCATED)
