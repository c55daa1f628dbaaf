"""Text that is written as it is generated, and conversations that go on from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xlstm_distill.errors import UserError
from xlstm_distill.export.source import find_student
from xlstm_distill.serving.conversation import Conversation, chat_tokens
from xlstm_distill.serving.speaker import Sampling, Speaker

GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture
def speaker(saved_student: Path) -> Speaker:
    return Speaker.load(find_student(saved_student), "cpu", None)


def alone(speaker: Speaker, ids: list[int]) -> list[int]:
    """Greedy tokens after these, without a cache from before."""
    row = torch.tensor([ids])
    whole = speaker.student.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False
    )
    return whole[0, len(ids) :].tolist()


def test_what_is_written_is_what_generate_gives(speaker: Speaker) -> None:
    ids, pieces = speaker.tokenizer("3 + 4 =")["input_ids"], []
    spoken = speaker.say(ids, GREEDY, pieces.append)
    assert spoken.ids == alone(speaker, ids)
    assert "".join(pieces) == spoken.text
    assert speaker.tokenizer.decode(spoken.ids, skip_special_tokens=True) == spoken.text
    assert spoken.prompt_tokens == len(ids)
    assert spoken.new_tokens == len(spoken.ids)
    assert spoken.state_bytes == speaker.cache.nbytes() > 0


def test_a_conversation_reads_new_words_alone_and_answers_as_if_it_read_all(
    speaker: Speaker,
) -> None:
    conversation = Conversation(speaker)
    for turn, words in enumerate(("Add 3 and 4.", "Sort 5 2 9.", "Again.")):
        before = list(conversation.messages)
        ids = chat_tokens(speaker.tokenizer, [*before, {"role": "user", "content": words}])
        cache, held = speaker.cache, list(speaker.held)
        spoken = conversation.answer(words, GREEDY, lambda _: None)
        assert spoken.ids == alone(speaker, ids)
        if turn and held == ids[: len(held)]:
            assert speaker.cache is cache
            assert spoken.prompt_tokens == len(ids) - len(held)
    assert len(conversation.messages) == 6


def test_text_that_does_not_go_on_is_read_anew(speaker: Speaker) -> None:
    ids = speaker.tokenizer("one two three four")["input_ids"]
    speaker.say(ids, GREEDY, lambda _: None)
    shorter = ids[:-2]
    spoken = speaker.say(shorter, GREEDY, lambda _: None)
    assert spoken.prompt_tokens == len(shorter)
    assert spoken.ids == alone(speaker, shorter)


def test_an_interrupted_answer_is_kept_and_read_anew(speaker: Speaker) -> None:
    conversation = Conversation(speaker)

    def interrupt(text: str) -> None:
        if text:
            raise KeyboardInterrupt

    spoken = conversation.answer("Add 3 and 4.", GREEDY, interrupt)
    assert spoken.interrupted
    assert speaker.held == []
    again = conversation.answer("Again.", GREEDY, lambda _: None)
    ids = chat_tokens(speaker.tokenizer, conversation.messages[:-1])
    assert again.ids == alone(speaker, ids)


def test_sampling_settings() -> None:
    assert Sampling(5).settings() == {"max_new_tokens": 5}
    assert Sampling(5, temperature=0).settings()["do_sample"] is False
    assert Sampling(5, temperature=0.7, top_p=0.9).settings() == {
        "max_new_tokens": 5,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }


def test_a_model_without_a_template_cannot_chat(speaker: Speaker) -> None:
    speaker.tokenizer.chat_template = None
    with pytest.raises(UserError, match="MODEL: its tokenizer has no chat template"):
        Conversation(speaker)


def test_a_role_that_the_template_refuses_gives_one_line(speaker: Speaker) -> None:
    conversation = Conversation(speaker, system="Be brief.")
    with pytest.raises(UserError, match="its chat template refuses the messages: Role system"):
        conversation.answer("Hello.", GREEDY, lambda _: None)
    assert [message["role"] for message in conversation.messages] == ["system"]
