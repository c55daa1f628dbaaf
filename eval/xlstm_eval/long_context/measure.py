"""Measure one model: needles through lm-eval, length by length, then the loss by position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xlstm_eval.answering.batches import Measured, form_batches, make_questions
from xlstm_eval.answering.coordinator import Coordinator, Progress
from xlstm_eval.answering.journal import Journal
from xlstm_eval.harness import Session, evaluate_model, help_to_evaluate, in_evaluation
from xlstm_eval.long_context.documents import mean_losses
from xlstm_eval.long_context.files import Prepared
from xlstm_eval.long_context.items import range_of
from xlstm_eval.long_context.tasks import METRIC, load_tasks
from xlstm_eval.records import LongContext, PositionLoss, Recall

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFILL = 4096
"""Tokens of a prompt that are read at a time: activations of 64k would need more than the model."""
CPU_TOKENS = 2**15
"""Tokens of a batch on a CPU: more make it no faster."""

Row = dict[str, Any]
Show = Callable[[str], AbstractContextManager[Progress | None]]
"""Give a part of the measurement, by its name, a progress bar."""


@dataclass(frozen=True)
class Measurement:
    """Hold a model's results, each answer without its prompt, and how it was measured."""

    results: LongContext
    answers: list[Row]
    protocol: dict[str, Any]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    session: Session,
    *,
    chat: bool,
    show: Show = lambda _: nullcontext(),
) -> Measurement:
    """Ask a model all items, then read the documents (rank 0).

    The other ranks must call `help_to_measure` meanwhile. Raises EvalError as `evaluate_model`.
    """
    answers: list[Row] = []
    protocol: dict[str, Any] = {"items": prepared.identity, "prefill": PREFILL}
    for length, items in prepared.items.items():
        if not items:
            continue
        with show(f"needles in {length} tokens") as progress:
            own = replace(_session(model, session, length), progress=progress)
            result = evaluate_model(model, tokenizer, load_tasks(items, chat), own)
        protocol[str(length)] = {
            key: result.protocol[key] for key in ("batch", "context", "dtype", "lm_eval", "version")
        }
        for rows in result.samples.values():
            answers += [_answer(row) for row in rows]
    losses: tuple[PositionLoss, ...] = ()
    if prepared.documents:
        with show(f"documents of {prepared.longest} tokens") as progress:
            losses = _losses(model, tokenizer, prepared, replace(session, progress=progress))
    results = LongContext(
        items=prepared.identity,
        recall=_recall(answers, "distance_tokens", lambda row: range_of(row["distance"])),
        recall_by_length=_recall(answers, "length_tokens", lambda row: row["length"]),
        loss_by_position=losses,
        skipped_lengths=tuple(sorted(prepared.skipped)),
    )
    return Measurement(results, answers, protocol)


def help_to_measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    documents: bool,
    session: Session,
) -> None:
    """Answer what rank 0 deals out while it is in `measure` (all other ranks)."""
    for length in lengths:
        help_to_evaluate(model, tokenizer, _session(model, session, length))
    if documents:
        with in_evaluation(model):
            _coordinator(model, tokenizer, session).follow()


def _session(model: PreTrainedModel, session: Session, length: int) -> Session:
    """Return the session of one length: rows that fit 256 tokens do not fit 65,536."""
    rows = session.batch_size
    if rows is None and model.device.type == "cpu":
        rows = max(1, min(32, CPU_TOKENS // length))
    sizes = None if session.sizes is None else session.sizes / str(length)
    return replace(session, batch_size=rows, sizes=sizes, prefill=PREFILL)


def _answer(row: Row) -> Row:
    doc = row["doc"]
    kept = {key: doc[key] for key in ("id", "kind", "length", "tokens", "depth", "distance")}
    return {
        **kept,
        "answers": doc["answers"],
        "given": row["resps"][0][0],
        "right": int(row[METRIC]),
    }


def _recall(rows: Sequence[Row], measure: str, place: Callable[[Row], int]) -> tuple[Recall, ...]:
    """Count right answers for each kind and place."""
    from scipy import stats

    counts: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        counts.setdefault((row["kind"], place(row)), []).append(row["right"])
    found = []
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for (kind, at), right in sorted(counts.items(), key=lambda c: (kinds.index(c[0][0]), c[0][1])):
        interval = stats.binomtest(sum(right), len(right)).proportion_ci(0.95, "wilson")
        found.append(
            Recall.model_validate(
                {
                    "kind": kind,
                    measure: at,
                    "n": len(right),
                    "right": sum(right),
                    "interval": (float(interval.low), float(interval.high)),
                }
            )
        )
    return tuple(found)


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    session: Session,
) -> tuple[PositionLoss, ...]:
    length = prepared.longest
    questions = make_questions("loss_by_position", [(text, length) for text in prepared.documents])
    batches = form_batches([Measured(question, length, 0) for question in questions], rows=1)
    with in_evaluation(model):
        coordinator = _coordinator(model, tokenizer, session, len(questions))
        sums = coordinator.answer(questions, batches)
        coordinator.finish()
    return mean_losses(length, sums)


def _coordinator(
    model: PreTrainedModel, tokenizer: Any, session: Session, count: int = 0
) -> Coordinator:
    from xlstm_eval.long_context.positions import DocumentReader

    journal = Journal(session.journal, session.identity, session.ranks.index)
    reader = DocumentReader(model, tokenizer)
    return Coordinator(reader.compute, journal, session.ranks, session.progress, lambda: count)
