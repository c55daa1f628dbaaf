"""Students that stand side by side: what is known of each, and which may be compared."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from xlstm_eval.records import Comparison, Frozen, Name


class Entry(Frozen):
    """Hold one student of a page: its comparison with its own teacher, and what it costs.

    ``state_bytes`` is what decoding holds for a sequence of any length; ``tokens`` what alignment
    and distillation read. ``asked`` is the hash of all requests: rows with equal ones answered the
    same. ``source`` says where printed scores come from, ``printed_tolerance`` is the critical
    tolerance that the source prints.
    """

    name: Name
    role: Name
    teacher: Name
    comparison: Comparison
    state_bytes: int | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)
    asked: str = ""
    source: str = ""
    printed_tolerance: float | None = None


def groups_of(entries: Sequence[Entry]) -> dict[str, str]:
    """Name the tasks that each entry answered: A, B, ...; equal letters were asked the same.

    Published rows are on the tasks of their own tables.
    """
    letters: dict[tuple[str, str], str] = {}
    found = {}
    for entry in entries:
        if not entry.asked:
            found[entry.name] = "own tables"
            continue
        # Without its teacher's items two students were not compared with the same scores.
        key = (entry.asked, entry.teacher)
        letters.setdefault(key, f"set {len(letters) + 1}")
        found[entry.name] = letters[key]
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points that no other beats in both coordinates, by the first one.

    Less is better in both. Of equal points the first counts.
    """
    front: list[int] = []
    lowest = float("inf")
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < lowest:
            front.append(index)
            lowest = points[index][1]
    return front
