"""Training conversations: the same for a seed, and never about an evaluated problem."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import (
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded import DOMAINS, documents
from xlstm_distill.embedded.tasks import TASKS, held_out_items
from xlstm_distill.embedded.tokenizer import render
from xlstm_distill.errors import UserError

RECALL = tuple(name for name, task in TASKS.items() if task.table)


def questions(document: dict) -> list[tuple[str, str]]:
    """Split a conversation into (question, answer) pairs, each with its table, as evaluated."""
    texts = [message["content"] for message in document["messages"]]
    table = texts[0][: texts[0].rfind("\n") + 1] if document["task"] in RECALL else ""
    return [
        (table + q.removeprefix(table), a) for q, a in zip(texts[::2], texts[1::2], strict=True)
    ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_deterministic_short_and_alternate(
    domain: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, again, other = (list(documents(domain, 300, seed)) for seed in (3, 3, 4))
    assert first == again != other
    for document in first:
        assert document["domain"] == domain
        roles = [message["role"] for message in document["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(tokenizer(render(document))["input_ids"]) <= 256
    assert {len(document["messages"]) for document in first} >= {2, 4, 8}


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_training_conversation_asks_an_evaluated_item(domain: str) -> None:
    evaluated = {item.prompt for task in TASKS.values() for item in held_out_items(task, 100)}
    asked = {
        question for document in documents(domain, 1500, 0) for question, _ in questions(document)
    }
    assert asked
    assert not asked & evaluated


def test_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'mth'.*math, code, stem, chat.*Did you mean 'math'"):
        documents("mth", 1, 0)


def test_import_brings_no_torch() -> None:
    code = (
        "import sys, xlstm_distill.embedded; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
