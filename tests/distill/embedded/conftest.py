"""The committed teacher and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The committed tokenizer."""
    return AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)


@pytest.fixture(scope="session")
def teacher() -> LlamaForCausalLM:
    """The committed teacher; tests must not change it."""
    return AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True)
