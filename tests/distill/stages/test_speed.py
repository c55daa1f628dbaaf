"""Memory and speed over the context: what is counted is what the caches hold."""

from __future__ import annotations

import torch

from xlstm_distill.models.student import convert
from xlstm_distill.recipe import MixerConfig, SpeedSettings
from xlstm_distill.stages.measuring.speed import held_bytes, measure_speed
from xlstm_eval.report.speed import TEACHER, Speed, speed_sentence

CPU = torch.device("cpu")


def test_a_teachers_memory_grows_with_the_context_and_a_students_does_not(tiny_teacher) -> None:
    teacher = tiny_teacher().eval()
    student = convert(tiny_teacher(), MixerConfig(window=4, sinks=2)).eval()
    settings = SpeedSettings(seconds=600, longest=512)
    found = {
        TEACHER: measure_speed(teacher, settings, CPU),
        "merged": measure_speed(student, settings, CPU),
    }
    config = teacher.config
    a_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    held = {name: [point.state_bytes for point in own.points] for name, own in found.items()}
    assert held[TEACHER] == [a_token * context for context in (128, 256, 512)]
    # A cache of its own, filled in one piece, holds as much.
    cache = student.new_cache()
    student(torch.ones(1, 9, dtype=torch.long), past_key_values=cache)
    assert held["merged"] == [held_bytes(cache)] * 3
    for own in found.values():
        assert own.stopped == "the limit on contexts"
        assert own.dtype == "float32"
        assert own.threads == torch.get_num_threads()
        assert all(point.tokens_per_second > 1 for point in own.points)
    sentence = speed_sentence(found, "merged")
    assert sentence.startswith("After 512 tokens the teacher's cache holds ")


def test_the_budget_ends_it_and_no_budget_measures_nothing(tiny_teacher) -> None:
    teacher = tiny_teacher().eval()
    assert measure_speed(teacher, SpeedSettings(seconds=0), CPU) is None
    short = measure_speed(teacher, SpeedSettings(seconds=1e-9), CPU)
    assert isinstance(short, Speed)
    assert len(short.points) == 1
    assert short.stopped == "the budget of seconds"
