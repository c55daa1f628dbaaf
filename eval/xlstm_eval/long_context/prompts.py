"""Prompts of needle items: the text, the question, and how a tokenizer counts them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from xlstm_eval.long_context import words
from xlstm_eval.long_context.settings import NeedleKind
from xlstm_eval.records import EvalError

HEAD = "Remember the codes in this text.\n\n"
CODES = range(100_000, 1_000_000)
NEEDLES = 4
"""Keys of `multi-key` and `multi-query`, codes of `multi-value` (as in RULER)."""
SPARE_TOKENS = 8
"""Room of an answer beyond the longest right one: for a comma more, or another way to write it."""


@dataclass(frozen=True)
class Needle:
    """A sentence to be found, its code, and whether the question asks for it."""

    sentence: str
    code: str
    asked: bool


@dataclass(frozen=True)
class Riddle:
    """Needles, the question about them, and how the answer begins."""

    needles: tuple[Needle, ...]
    question: str
    prefix: str

    @property
    def answers(self) -> list[str]:
        """Codes in the order in which the question asks for them."""
        return [needle.code for needle in self.needles if needle.asked]


def make_riddle(kind: NeedleKind, source: random.Random) -> Riddle:
    """Draw keys and codes; no two keys or codes of an item are equal."""
    keys = source.sample(words.KEYS, NEEDLES)
    codes = [str(code) for code in source.sample(CODES, NEEDLES)]
    if kind == "multi-value":
        needles = [Needle(f"A code of the {keys[0]} is {code}.", code, True) for code in codes]
        return Riddle(
            tuple(needles),
            f"What are the {NEEDLES} codes of the {keys[0]}? Give all of them.",
            f"The {NEEDLES} codes of the {keys[0]} are",
        )
    asked = NEEDLES if kind == "multi-query" else 1
    count = 1 if kind == "single" else NEEDLES
    needles = [
        Needle(f"The code of the {key} is {code}.", code, index < asked)
        for index, (key, code) in enumerate(zip(keys[:count], codes, strict=False))
    ]
    if asked == 1:
        return Riddle(
            tuple(needles),
            f"What is the code of the {keys[0]}?",
            f"The code of the {keys[0]} is",
        )
    listed = ", ".join(f"the {key}" for key in keys)
    return Riddle(
        tuple(needles),
        f"What are the codes of {listed}? Give them in this order.",
        f"The codes of {listed}, in this order, are",
    )


def is_right(kind: NeedleKind, answers: Sequence[str], given: str) -> bool:
    """Tell whether an answer's first codes are the right ones: of `multi-value` in any order."""
    found = re.findall(r"\d+", given)[: len(answers)]
    if kind == "multi-value":
        return sorted(found) == sorted(answers)
    return found == list(answers)


class Prompter:
    """Writes prompts as lm-eval does, and counts their tokens as the evaluation does."""

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        self.tokenizer, self.chat = tokenizer, chat

    def content(self, text: str, riddle: Riddle) -> str:
        """Return the user's message; without a template a line's end parts it from the answer."""
        return f"{HEAD}{text}\n\n{riddle.question}" + ("" if self.chat else "\n")

    def prompt(self, content: str, prefix: str) -> str:
        """Return all that the model reads; raises EvalError: no chat template for begun answers."""
        if not self.chat:
            return content + prefix
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": prefix},
        ]
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=False, continue_final_message=True
            )
        except (ValueError, TemplateError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise EvalError(
                f"kinds: the chat template cannot write an answer that is begun ({reason}). Ask "
                "without the template, or for no kinds."
            ) from None
        return rendered

    def count(self, prompt: str) -> int:
        """Return the prompt's tokens, special ones included."""
        start = getattr(self.tokenizer, "bos_token", None)
        options: dict[str, Any] = {}
        if start and prompt.startswith(start):
            # lm-eval adds no second one.
            options["add_special_tokens"] = False
        return self._length(prompt, **options)

    def count_part(self, text: str) -> int:
        """Return the tokens of a part of a text, without special ones."""
        return self._length(text, add_special_tokens=False)

    def budget(self, kind: NeedleKind) -> int:
        """Return the most tokens to generate for a kind: one number for all of its items."""
        # Codes have the same number of digits, but not always of tokens.
        source = random.Random(0)
        answers = (", ".join(make_riddle(kind, source).answers) for _ in range(20))
        return max(self.count_part(f" {answer}.") for answer in answers) + SPARE_TOKENS

    def _length(self, text: str, **options: Any) -> int:
        # Not verbose: the tokenizer would warn of texts that are longer than its model's context.
        return len(self.tokenizer(text, verbose=False, **options)["input_ids"])
