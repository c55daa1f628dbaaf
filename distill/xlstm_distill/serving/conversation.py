"""Conversations with a student, turn by turn."""

from __future__ import annotations

from typing import Any

from xlstm_distill.errors import UserError
from xlstm_distill.serving.speaker import Sampling, Speaker, Spoken, Write

Message = dict[str, str]


class Conversation:
    """Messages so far, and the speaker that answers them.

    The cache holds what was said, so each turn reads the new words alone.
    """

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        if not getattr(speaker.tokenizer, "chat_template", None):
            raise UserError(
                "MODEL: its tokenizer has no chat template, so it cannot chat; use 'xlstm-distill "
                "generate', which continues a text."
            )
        self.speaker = speaker
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self.system)

    def answer(self, words: str, sampling: Sampling, write: Write) -> Spoken:
        """Answer a message, and note both; an answer that was interrupted is kept as far as it is.

        Raises:
            UserError: the template refuses the message.
        """
        self.messages.append({"role": "user", "content": words})
        try:
            spoken = self.speaker.say(self.tokens(), sampling, write)
        except UserError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": spoken.text})
        return spoken

    def tokens(self) -> list[int]:
        """Return the tokens of the messages and of what begins an answer."""
        return chat_tokens(self.speaker.tokenizer, self.messages)

    def restart(self) -> None:
        """Forget all but the system's message."""
        self.messages = list(self.system)
        self.speaker.forget()


def chat_tokens(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Put messages into the chat template.

    Raises:
        UserError: the template refuses them.
    """
    import jinja2

    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except jinja2.TemplateError as error:
        raise UserError(f"MODEL: its chat template refuses the messages: {error}") from None
    return list(ids)
