"""Short names of tasks, and times in words."""

from __future__ import annotations

import pytest

from xlstm_eval.report.names import context_length, duration, short_names


def test_names_lose_what_all_tasks_of_a_domain_share() -> None:
    domains = {
        "qs_math_add": "math",
        "qs_math_story": "math",
        "qs_code": "code",
        "qs_code_run": "code",
        "gpqa_main": "stem",
        "a": None,
        "a_b": None,
    }
    assert list(short_names(domains).values()) == [
        "add",
        "story",
        "code",
        "code_run",
        "gpqa_main",
        "a",
        "a_b",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (42.4, "42 s"),
        (59.7, "1 min 00 s"),
        (200.0, "3 min 20 s"),
        (7500.0, "2 h 05 min"),
    ],
)
def test_durations_are_written_for_readers(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lengths_of_contexts_are_counted_in_doublings() -> None:
    assert [context_length(n) for n in (128, 1024, 1536, 32768)] == ["128", "1k", "1.5k", "32k"]
