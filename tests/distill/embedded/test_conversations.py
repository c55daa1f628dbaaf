"""Training conversations: the same for a seed, and never about an evaluated problem."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from xlstm_distill.embedded import DOMAINS, documents
from xlstm_distill.embedded.tasks import TASKS, held_out_items
from xlstm_distill.embedded.tokenizer import CONTEXT, render
from xlstm_distill.errors import UserError

RECALL = tuple(name for name, task in TASKS.items() if task.passage)


def questions(document: dict[str, Any]) -> list[str]:
    """List a conversation's questions, each with its text, as evaluated."""
    asked = [message["content"] for message in document["messages"][::2]]
    text = asked[0][: asked[0].rfind("\n") + 1] if document["task"] in RECALL else ""
    return [text + question.removeprefix(text) for question in asked]


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_deterministic_fit_and_alternate(
    domain: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, again, other = (list(documents(domain, 300, seed)) for seed in (3, 3, 4))
    assert first == again != other
    for document in first:
        assert document["domain"] == domain
        roles = [message["role"] for message in document["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(tokenizer(render(document))["input_ids"]) <= CONTEXT
    assert {len(document["messages"]) for document in first} >= {2, 4, 8}


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_training_conversation_asks_an_evaluated_item(domain: str) -> None:
    tasks = [task for task in TASKS.values() if task.domain == domain]
    evaluated = {item.prompt for task in tasks for item in held_out_items(task, 500)}
    asked = {
        question for document in documents(domain, 1500, 0) for question in questions(document)
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
