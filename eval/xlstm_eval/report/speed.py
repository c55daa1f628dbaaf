"""What decoding costs over the length of the context: memory of a sequence, and tokens a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from xlstm_eval.records import Frozen, Name
from xlstm_eval.report.names import byte_size

SPEED_FILE = "speed.json"
TEACHER = "teacher"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SpeedPoint(Frozen):
    """Hold what was measured after ``context`` tokens.

    ``state_bytes`` is what the cache holds for the sequence, counted from its tensors.
    ``tokens_per_second`` is that of decoding one token after the other. ``peak_bytes`` is the most
    memory of the device, on CUDA alone, weights included.
    """

    context: Annotated[int, Field(ge=1)]
    state_bytes: Annotated[int, Field(ge=0)]
    tokens_per_second: Positive
    peak_bytes: int | None = None


class Speed(Frozen):
    """Hold one model's measurement, and on what it was made.

    ``steps`` is the most decoded tokens of which a rate is the median. ``stopped`` says why
    there is no longer context: the limit, the budget of seconds, or memory.
    """

    device: Name
    dtype: Name
    threads: Annotated[int, Field(ge=1)]
    backend: str = ""
    steps: Annotated[int, Field(ge=1)]
    stopped: str = ""
    points: Annotated[tuple[SpeedPoint, ...], Field(min_length=1)]

    def at(self, context: int) -> SpeedPoint | None:
        """Return what was measured after so many tokens."""
        return next((point for point in self.points if point.context == context), None)


def speed_sentence(speeds: Mapping[str, Speed], student: str) -> str:
    """Compare student and teacher at the longest context that both were measured at."""
    teacher, own = speeds.get(TEACHER), speeds.get(student)
    if teacher is None or own is None:
        return ""
    shared = {point.context for point in teacher.points} & {p.context for p in own.points}
    if not shared:
        return ""
    longest = max(shared)
    of_teacher, of_student = teacher.at(longest), own.at(longest)
    assert of_teacher is not None
    assert of_student is not None
    rate = of_student.tokens_per_second / of_teacher.tokens_per_second
    return (
        f"After {longest:,} tokens the teacher's cache holds {byte_size(of_teacher.state_bytes)} "
        f"and the student's state {byte_size(of_student.state_bytes)}; the student decodes "
        f"{of_student.tokens_per_second:,.0f} tokens/s, {rate:.2f} times the teacher's rate."
    )
