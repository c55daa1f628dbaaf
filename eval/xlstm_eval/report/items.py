"""Items for a reader: what was asked, what teacher and student answered, who was right.

A page holds at most MOST_BYTES of them. Items on which the models differ come first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from xlstm_eval.records import Frozen, Name, TaskResult
from xlstm_eval.samples import Row, Rows

MOST_ITEMS = 10_000
MOST_BYTES = 12_000_000
"""Bytes of all texts in one page: browsers open 12 MB within a second or two."""
LONGEST_TEXT = 6_000
"""Characters of a prompt or an answer; a longer one loses its middle."""
HEAD_SHARE = 1 / 3
"""Of a long text this share is kept from its head: a prompt's question is at its end."""
SHORTEST_SHARED = 80
"""Characters that all prompts of a task must begin with to be held once."""

Outcome = Literal["teacher", "student", "neither", "both"]
OUTCOMES: tuple[Outcome, ...] = ("teacher", "student", "neither", "both")
"""Who is right alone, first where the student loses; of real scores, who has the better one."""


class Item(Frozen):
    """Hold one item. ``number`` is lm-eval's ``doc_id``; scores are those of the task's metric."""

    task: Name
    number: int
    prompt: str = Field(repr=False)
    target: str = Field(repr=False)
    teacher: str = Field(repr=False)
    student: str = Field(repr=False)
    teacher_score: float
    student_score: float
    outcome: Outcome


class ItemSet(Frozen):
    """Hold the items that a page shows. ``counts`` are those of all items, shown or not."""

    items: tuple[Item, ...] = Field(repr=False)
    counts: dict[Outcome, Annotated[int, Field(ge=0)]]

    @property
    def total(self) -> int:
        """Return the number of all items."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Place:
    """Say where an item is: its task, its index among the task's items, and its outcome."""

    task: int
    index: int
    outcome: Outcome


def outcome_of(teacher: float, student: float, higher_is_better: bool) -> Outcome:
    """Say who is right alone, or has the better score; equal scores above 0 count as right."""
    gain = student - teacher if higher_is_better else teacher - student
    if gain:
        return "student" if gain > 0 else "teacher"
    return "both" if teacher > 0 else "neither"


def read_item_set(
    teacher: Rows,
    student: Rows,
    pairs: Sequence[tuple[TaskResult, TaskResult]],
    most: int = MOST_ITEMS,
    most_bytes: int = MOST_BYTES,
) -> ItemSet | None:
    """Read the items of two evaluations; None where there are none to show.

    ``pairs`` are the teacher's and the student's results of the same tasks, with their items. Items
    on which they differ come first, then others, as many of each task as of the next.
    """
    pairs = [pair for pair in pairs if pair[0].items and pair[1].items]
    places = _places(pairs)
    if not places or not most:
        return None
    counts = dict.fromkeys(OUTCOMES, 0)
    for place in places:
        counts[place.outcome] += 1
    chosen = _by_priority(places)[:most]
    wanted: list[dict[int, Outcome]] = [{} for _ in pairs]
    for place in chosen:
        wanted[place.task][place.index] = place.outcome
    found: dict[tuple[int, int], Item] = {}
    for task, (own, other) in enumerate(pairs):
        for index, item in _read_task(teacher, student, own, other, wanted[task]):
            found[task, index] = item
    ordered = (found.get((place.task, place.index)) for place in chosen)
    kept = _within([item for item in ordered if item is not None], most_bytes)
    return ItemSet(items=tuple(kept), counts=counts) if kept else None


def _places(pairs: Sequence[tuple[TaskResult, TaskResult]]) -> list[Place]:
    places = []
    for task, (teacher, student) in enumerate(pairs):
        scores = zip(teacher.items or (), student.items or (), strict=True)
        for index, (own, other) in enumerate(scores):
            places.append(Place(task, index, outcome_of(own, other, teacher.higher_is_better)))
    return places


def _by_priority(places: Sequence[Place]) -> list[Place]:
    """Put losses first, then wins, then all others; within each, the tasks take turns."""
    turns: dict[tuple[int, int], int] = {}
    keyed = []
    for place in places:
        rank = {"teacher": 0, "student": 1}.get(place.outcome, 2)
        turn = turns.get((rank, place.task), 0)
        turns[rank, place.task] = turn + 1
        keyed.append(((rank, turn, place.task), place))
    return [place for _, place in sorted(keyed, key=lambda pair: pair[0])]


def _read_task(
    teacher: Rows,
    student: Rows,
    own: TaskResult,
    other: TaskResult,
    wanted: Mapping[int, Outcome],
) -> Iterator[tuple[int, Item]]:
    """Read the wanted items of one task from both evaluations, each with its index."""
    rows = zip(_rows(teacher, own, wanted), _rows(student, other, wanted), strict=False)
    for (index, row), (_, answered) in rows:
        assert own.items is not None
        assert other.items is not None
        yield (
            index,
            Item(
                task=own.task,
                number=int(row.get("doc_id", index)),
                prompt=shortened(prompt_of(row)),
                target=shortened(_text(row.get("target"))),
                teacher=shortened(answer_of(row, own.metric)),
                student=shortened(answer_of(answered, other.metric)),
                teacher_score=own.items[index],
                student_score=other.items[index],
                outcome=wanted[index],
            ),
        )


def _rows(
    source: Rows, task: TaskResult, wanted: Mapping[int, Outcome]
) -> Iterator[tuple[int, Row]]:
    """Read the wanted rows of a task's samples, one at a time."""
    if wanted:
        for index, row in enumerate(source(task)):
            if index in wanted:
                yield index, row


def prompt_of(row: Mapping[str, Any]) -> str:
    """Return what a model was asked; of a multiple-choice item, what its choices have in common."""
    arguments = row.get("arguments") or [[""]]
    prompts = [_text(argument[0]) for argument in arguments]
    # With several contexts (Winogrande) the choices are in the prompts.
    return prompts[0] if len(set(prompts)) == 1 else "\n---\n".join(prompts)


def answer_of(row: Mapping[str, Any], metric: str) -> str:
    """Return an answer as text: what was generated and filtered, or the likeliest choice.

    The text before filters is added where they changed it.
    """
    answers = row.get("filtered_resps") or []
    asked = len(row.get("arguments") or ())
    if 0 < len(answers) <= asked and all(_is_likelihood(answer) for answer in answers):
        return _choice(row, answers, metric)
    answer = _text(answers[0] if len(answers) == 1 else answers)
    whole = (row.get("resps") or [[]])[0]
    first = _text(whole[0]) if isinstance(whole, list) and whole else ""
    if first and first != answer and isinstance(whole[0], str):
        return f"{answer}\n--- all that was generated ---\n{first}"
    return answer


def _is_likelihood(answer: object) -> bool:
    # lm-eval logs a log-likelihood and whether the choice is what greedy decoding gives.
    if not isinstance(answer, list) or len(answer) != 2:
        return False
    return isinstance(answer[0], int | float) and isinstance(answer[1], bool)


def _choice(row: Mapping[str, Any], answers: Sequence[Sequence[Any]], metric: str) -> str:
    """Name the likeliest choice with its log-likelihood; ``acc_norm`` weighs by length."""
    values = [float(answer[0]) for answer in answers]
    choices = [_text(argument[-1]) for argument in row["arguments"]]
    name = metric.partition(",")[0]
    if name == "acc_norm":
        sizes = [len(choice.strip()) for choice in choices]
    elif name == "acc_bytes":
        sizes = [len(choice.strip().encode()) for choice in choices]
    else:
        sizes = [1] * len(choices)
    best = max(range(len(values)), key=lambda index: values[index] / max(1, sizes[index]))
    return f"{choices[best].strip()} (log-likelihood {values[best]:.2f})"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return a text without its middle where it is too long, and say how much is left out."""
    # Half of a surrogate pair, which a model's answer may end with, is no text that can be written.
    text = text.encode("utf-8", "replace").decode("utf-8")
    if len(text) <= longest:
        return text
    head = round(longest * HEAD_SHARE)
    left_out = len(text) - longest
    return f"{text[:head]}\n[... {left_out:,} characters left out ...]\n{text[head - longest :]}"


def _within(items: Sequence[Item], most_bytes: int) -> list[Item]:
    """Return the first items whose texts fit."""
    kept, size = [], 0
    for item in items:
        texts = (item.prompt, item.target, item.teacher, item.student)
        size += sum(len(text.encode()) for text in texts) + 60
        if size > most_bytes:
            break
        kept.append(item)
    return kept


def page_values(found: ItemSet, tasks: Sequence[TaskResult]) -> dict[str, Any]:
    """Return what the page's script reads: tasks with what their prompts share, and items as lists.

    Losses first, then wins, then items that neither and that both have right; each in the tasks'
    order.
    """
    own: dict[str, list[Item]] = {task.task: [] for task in tasks}
    for item in found.items:
        own[item.task].append(item)
    names = [name for name, items in own.items() if items]
    shared = {name: _shared_beginning([item.prompt for item in own[name]]) for name in names}
    place = {name: index for index, name in enumerate(names)}
    rank = {outcome: index for index, outcome in enumerate(OUTCOMES)}
    ordered = sorted(
        found.items, key=lambda item: (rank[item.outcome], place[item.task], item.number)
    )
    return {
        "outcomes": OUTCOMES,
        "tasks": [[name, shared[name]] for name in names],
        "items": [
            [
                place[item.task],
                item.number,
                rank[item.outcome],
                item.prompt[len(shared[item.task]) :],
                item.target,
                item.teacher,
                item.student,
                _short(item.teacher_score),
                _short(item.student_score),
            ]
            for item in ordered
        ],
    }


def _shared_beginning(prompts: Sequence[str]) -> str:
    """Return the lines that all prompts begin with: examples, of which a page needs one copy."""
    if len(prompts) < 2:
        return ""
    # What the first and the last in order share, all between them share too.
    first, last = min(prompts), max(prompts)
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    # Up to a whole line: half a sentence is no beginning.
    shared = first[: first[:same].rfind("\n") + 1]
    return shared if len(shared) >= SHORTEST_SHARED else ""


def _short(value: float) -> float | int:
    return int(value) if float(value).is_integer() else round(value, 4)


def script_json(value: object) -> str:
    """Write JSON that may stand inside a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
