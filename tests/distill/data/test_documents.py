"""What a document may be, and messages that name a wrong one."""

from __future__ import annotations

import pytest

from xlstm_distill.data.documents import checked_document
from xlstm_distill.errors import UserError

WHERE = "data.domains.x.sources[0]: record 42 of d.jsonl"
ASK = {"role": "user", "content": "ask"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"text": 5}, "its text is int; text is needed"),
        ({"prompt": "a", "response": ["b"]}, "its response is list; text is needed"),
        ({"messages": "hi"}, "its messages must be a list of messages with 'role'"),
        (
            {"messages": [{"role": None, "content": "b"}]},
            "its messages must be a list of messages with 'role'",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "content": 5}]},
            "its messages has a content in message 2 that is int; text, or a list of parts of",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image", "text": None}]}],
                "response": "b",
            },
            "its prompt has a content in message 1 that has a part of type 'image'; text, or",
        ),
        (
            {"messages": [{"from": "a", "value": "b"}]},
            "its messages must be a list of messages with 'role'",
        ),
    ],
)
def test_wrong_types_name_the_record(document, message):
    with pytest.raises(UserError) as caught:
        checked_document(document, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: {message}")


@pytest.mark.parametrize("role", ["text", "prompt", "response", "messages"])
@pytest.mark.parametrize("nothing", [None, "", []])
def test_nulls_and_empty_values_are_empty_documents(role, nothing):
    assert checked_document({"prompt": "a", role: nothing}, WHERE) is None


def test_a_system_message_is_optional():
    pair = {"prompt": "a", "response": "b"}
    assert checked_document({"system": None, **pair}, WHERE) == pair
    assert checked_document({"system": "c", **pair}, WHERE) == {"system": "c", **pair}
