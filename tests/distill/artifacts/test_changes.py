"""What has changed between two sets of settings is said by recipe key, before and after."""

from __future__ import annotations

import json

import pytest

from xlstm_distill.artifacts.changes import changed_inputs, changed_settings, in_a_line


@pytest.mark.parametrize(
    ("before", "after", "keys", "expected"),
    [
        ({"align": {"lr": 0.02}}, {"align": {"lr": 0.01}}, {}, ["align.lr 0.02 -> 0.01"]),
        ({"seed": 0}, {"seed": 0}, {}, []),
        (
            {"mixer": {"window": 32, "sinks": 4}},
            {"mixer": {"window": 64, "sinks": 4}},
            {"mixer": "student.mixer"},
            ["student.mixer.window 32 -> 64"],
        ),
        ({"final_lr": None}, {"final_lr": 1e-5}, {}, ["final_lr null -> 1e-05"]),
        ({}, {"clip": 1.0}, {}, ["clip (not set) -> 1.0"]),
        (
            {"sources": [{"weight": 1.0}]},
            {"sources": [{"weight": 1.0}, {"weight": 2.0}]},
            {"sources": "data.domains.math.sources"},
            ["data.domains.math.sources[1].weight (not set) -> 2.0"],
        ),
        ({"betas": [0.9, 0.95]}, {"betas": (0.9, 0.95)}, {}, []),
        (
            {"report": {"title": "a"}, "recipe": {"report": {"title": "a"}}},
            {"report": {"title": "b"}, "recipe": {"report": {"title": "b"}}},
            {"recipe": ""},
            ["report.title a -> b"],
        ),
        # A newer version of the program has another key for each of many tasks.
        (
            {"protocol": 2, "tasks": [{"name": "a", "shots": 1}, {"name": "b", "shots": 5}]},
            {
                "protocol": 3,
                "tasks": [
                    {"name": "a", "shots": 0, "stop": None},
                    {"name": "b", "shots": 5, "stop": None},
                ],
            },
            {"tasks": "evaluate.tasks"},
            [
                "protocol 2 -> 3",
                "evaluate.tasks[0].shots 1 -> 0",
                "evaluate.tasks[*].stop (not set) -> null (2 times)",
            ],
        ),
    ],
)
def test_settings(before, after, keys, expected):
    stored = json.loads(json.dumps(before))
    assert changed_settings(stored, after, keys) == expected


def test_inputs_are_named():
    before = {"align": "1", "teacher": "1", "data/math": "1", "capture/math": "1"}
    after = {"align": "2", "teacher": "2", "data/math": "1"}
    assert changed_inputs(before, after) == [
        "align changed",
        "the teacher's files or settings changed",
        "capture/math changed",
    ]


def test_many_changes_fit_a_line():
    assert in_a_line(["a", "b"]) == "a; b"
    assert in_a_line(list("abcde")) == "a; b; c; and 2 more"
