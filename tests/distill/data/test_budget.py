"""How many rows of each domain a recipe needs."""

from __future__ import annotations

from pathlib import Path

from xlstm_distill.data.budget import rows_needed
from xlstm_distill.recipe import load_recipe

ROOT = Path(__file__).parents[3]


def needed(domain, *overrides):
    settings = [
        "data.context=256",
        "data.validation_rows=5",
        "align.batch=16",
        "distill.batch=16",
        "distill.warmup_steps=0",
        *overrides,
    ]
    return rows_needed(load_recipe(ROOT / "recipes" / "quickstart.yaml", settings), domain)


def test_rows_are_needed_for_the_longest_use_in_whole_steps():
    math = "distill.experts={e: {phases: [{domain: math, tokens: 600_000}]}}"
    # 600,000 tokens are 146.5 steps of 16 x 256.
    assert needed("math", "align.tokens=60_000", math) == 147 * 16 + 5
    phases = "{domain: math, tokens: 600_000}, {domain: math, tokens: 4096}"
    both = f"distill.experts={{e: {{phases: [{phases}]}}}}"
    assert needed("math", "align.tokens=60_000", both) == 148 * 16 + 5
    chat = ["align.tokens=409_600", "align.domains={math: 3.0, chat: 1.0}"]
    chat.append("distill.experts={e: {phases: [{domain: chat, tokens: 8192}]}}")
    assert [needed(domain, *chat) for domain in ("math", "chat", "stem")] == [1205, 405, 5]
