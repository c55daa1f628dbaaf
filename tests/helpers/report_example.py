"""A report with everything in it: items of hostile texts, speed, long context, a recipe."""

from __future__ import annotations

import math
from pathlib import Path

from xlstm_eval.records import LongContext, PositionLoss, Recall, TaskResult
from xlstm_eval.report.data import ReportData
from xlstm_eval.report.items import OUTCOMES, Item, ItemSet
from xlstm_eval.report.speed import TEACHER, Speed, SpeedPoint

DATA_FILE = Path(__file__).parents[1] / "eval" / "report" / "report_data.json"
HOSTILE = "</script><script>document.title='taken over'</script><!-- <img src=x onerror=nothing()>"
"""What a model may answer, or a data set ask."""
RARE = "zebrafish"
RECIPE = "name: example\n" + "".join(f"key_{n}: {'value ' * 30}end_{n}\n" for n in range(60))


def read_data() -> ReportData:
    """Return the report of an earlier quickstart, without items."""
    return ReportData.model_validate_json(DATA_FILE.read_text(encoding="utf-8"))


def with_items(data: ReportData, worst: str = "kvfar") -> ReportData:
    """Give every result items that fit its score; on one task the student loses by far."""

    def items(result: TaskResult, right: int) -> TaskResult:
        scores = (1.0,) * right + (0.0,) * (result.samples - right)
        values = {"items": scores, "correct": right, "score": right / result.samples}
        return result.model_copy(update=values)

    models = []
    for model in data.models:
        results = [
            items(own, own.correct // 2 if own.task == worst else own.correct)
            for own in model.results
        ]
        models.append(model.model_copy(update={"results": tuple(results)}))
    teacher = tuple(items(own, own.correct) for own in data.teacher_results)
    return data.model_copy(update={"teacher_results": teacher, "models": tuple(models)})


def full_report(items: int, left_out: int = 0) -> ReportData:
    """Return a report of all sections, with so many items to look through, and some left out."""
    data = with_items(read_data())
    return data.model_copy(
        update={
            "items": made_items(data, items, left_out),
            "speed": {TEACHER: made_speed(True), "merged": made_speed(False)},
            "long_context": {TEACHER: made_long_context(0.99), "merged": made_long_context(0.8)},
            "finished": "2026-11-21T23:50:09Z",
            "recipe": RECIPE,
        }
    )


def made_items(data: ReportData, count: int, left_out: int) -> ItemSet:
    """Make items of all outcomes, a fifth of them losses; one holds RARE."""
    tasks = [result.task for result in data.teacher_results]
    cycle = ("teacher", "student", "neither", "both", "both")
    counts = dict.fromkeys(OUTCOMES, 0) | {"both": left_out}
    items = []
    for number in range(count):
        outcome = cycle[number % len(cycle)]
        counts[outcome] += 1
        word = RARE if number == count - 7 else "ordinary"
        items.append(
            Item(
                task=tasks[number % len(tasks)],
                number=number,
                prompt=f"{HOSTILE} {word} question {number} " + "of some length " * 30,
                target=str(number),
                teacher=f"{HOSTILE} {number}",
                student="w" * 200,  # nothing to break the line at
                teacher_score=float(outcome in ("teacher", "both")),
                student_score=float(outcome in ("student", "both")),
                outcome=outcome,
            )
        )
    return ItemSet(items=tuple(items), counts=counts)


def made_speed(is_teacher: bool) -> Speed:
    points = [
        SpeedPoint(
            context=context,
            state_bytes=1536 * context if is_teacher else 258_984,
            tokens_per_second=300 / (1 + context / 2000) if is_teacher else 150.0,
        )
        for context in (128, 256, 512, 1024, 2048, 4096)
    ]
    return Speed(
        device="cpu",
        dtype="float32",
        threads=2,
        steps=16,
        stopped="the limit on contexts",
        points=tuple(points),
    )


def made_long_context(share: float) -> LongContext:
    recall = []
    for kind in ("single", "multi-key", "multi-query"):
        for distance in (256, 512, 1024, 2048):
            right = round(100 * share ** math.log2(distance / 128))
            ends = (max(0.0, right / 100 - 0.08), min(1.0, right / 100 + 0.08))
            point = {"kind": kind, "n": 100, "right": right, "interval": ends}
            recall.append(Recall(distance_tokens=distance, **point))
    losses = [
        PositionLoss(start=start, to=2 * start, nll=2.0 - share + 1 / start, tokens=1000)
        for start in (128, 256, 512, 1024)
    ]
    return LongContext(
        items="i", recall=tuple(recall), recall_by_length=(), loss_by_position=tuple(losses)
    )
