"""A student with its tokenizer that writes text as it generates it, and says how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from xlstm_distill.errors import UserError
from xlstm_distill.export.source import FoundStudent
from xlstm_distill.models.cache import StudentCache
from xlstm_distill.models.families import CausalLM
from xlstm_distill.runtime.console import byte_size

Write = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None leaves it to the model's own generation settings.

    A temperature of 0 takes the most likely token.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None

    def settings(self) -> dict[str, Any]:
        """Return what `generate` takes."""
        found: dict[str, Any] = {"max_new_tokens": self.max_tokens}
        if self.temperature == 0:
            # Values that only sampling reads must go too, or transformers warns of them.
            return found | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature is not None:
            found |= {"do_sample": True, "temperature": self.temperature}
        if self.top_p is not None:
            found |= {"do_sample": True, "top_p": self.top_p}
        return found


@dataclass(frozen=True)
class Spoken:
    """What was generated, and what it took.

    prompt_tokens: read now, without those that the cache held. prompt_seconds: until the first new
    token; seconds: after it. state_bytes: what the cache holds; bytes_per_token: by how much each
    further token makes it larger, which kept attention alone does.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    prompt_seconds: float
    new_tokens: int
    seconds: float
    state_bytes: int
    bytes_per_token: int = 0
    interrupted: bool = False

    def line(self) -> str:
        """Say it in a line."""
        parts = [f"{self.prompt_tokens} prompt tokens in {self.prompt_seconds:.2f} s"]
        if self.seconds > 0:
            rate = (self.new_tokens - 1) / self.seconds
            parts.append(f"{self.new_tokens} new ones at {rate:,.0f} tokens/s")
        else:
            parts.append(f"{self.new_tokens} new ones")
        grows = "whatever the length"
        if self.bytes_per_token:
            grows = f"{self.bytes_per_token:,} bytes more for each token"
        parts.append(f"state {byte_size(self.state_bytes)}, {grows}")
        return "; ".join(parts)

    def values(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


class _Streamer(TextStreamer):
    """Hands on text as soon as words are whole, and notes when tokens came."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.text: list[str] = []
        self.ids: list[int] = []
        self.first = self.last = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then token after token."""
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text."""
        self.text.append(text)
        self.write(text)


class Speaker:
    """A student, its tokenizer, and the cache of what it has read and said.

    Text that begins with all that the cache holds goes on from there. Other text is read anew,
    since a student's state cannot give tokens back.
    """

    def __init__(self, student: CausalLM, tokenizer: Any) -> None:
        self.student, self.tokenizer = student, tokenizer
        self.cache: StudentCache = student.new_cache()
        self.held: list[int] = []

    @classmethod
    def load(cls, found: FoundStudent, device: str | None, dtype: str | None) -> Speaker:
        """Load a student; by default on a GPU where there is one, in the format of its weights.

        Raises:
            UserError: the device is not there, or the student has no tokenizer.
        """
        # The students' classes: only now are they needed.
        import xlstm_distill.models.student  # noqa: F401

        try:
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError):  # torch without CUDA asserts
            raise UserError(
                f"--device: {device!r} is not there; leave it out, or use cpu."
            ) from None
        try:
            tokenizer = AutoTokenizer.from_pretrained(found.directory)
        except (OSError, ValueError, KeyError):
            raise UserError(f"{found.directory}: holds no tokenizer; copy its teacher's.") from None
        student = AutoModelForCausalLM.from_pretrained(
            found.directory, dtype=dtype or "auto", device_map={"": place}
        )
        return cls(student.eval(), tokenizer)

    def say(self, ids: Sequence[int], sampling: Sampling, write: Write) -> Spoken:
        """Continue a text that begins with these tokens, and write what follows as it comes."""
        if self.held != list(ids[: len(self.held)]) or len(ids) == len(self.held):
            self.forget()
        read = len(ids) - len(self.held)
        streamer = _Streamer(self.tokenizer, write)
        prompt = torch.tensor([list(ids)], device=self.student.device)
        started, interrupted = time.perf_counter(), False
        try:
            row = self.student.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=self.cache,
                streamer=streamer,
                pad_token_id=self._pad_token(),
                **sampling.settings(),
            )[0].tolist()
            # The last token was chosen and not yet read.
            self.held = row[: self.cache.get_seq_length()]
        except KeyboardInterrupt:
            # Some layers may have read a token that others have not.
            interrupted = True
            streamer.end()
        spoken = Spoken(
            text="".join(streamer.text),
            ids=streamer.ids,
            prompt_tokens=read,
            prompt_seconds=(streamer.first or time.perf_counter()) - started,
            new_tokens=len(streamer.ids),
            seconds=streamer.last - streamer.first,
            state_bytes=self.cache.nbytes(),
            bytes_per_token=self.cache.bytes_per_token(),
            interrupted=interrupted,
        )
        if interrupted:
            self.forget()
        return spoken

    def warm_up(self) -> None:
        """Make a few tokens of no text, so that what is compiled is compiled before an answer."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.student.device)
        # The third token is the first whose step is compiled.
        few = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
        self.student.generate(
            token,
            attention_mask=torch.ones_like(token),
            pad_token_id=self._pad_token(),
            **few,
        )

    def forget(self) -> None:
        """Begin with an empty cache."""
        self.cache, self.held = self.student.new_cache(), []

    def _pad_token(self) -> int | None:
        """Return the token for padding: a single row has none, but `generate` asks for it."""
        given: int | None = self.student.generation_config.pad_token_id
        return self.tokenizer.eos_token_id if given is None else given
