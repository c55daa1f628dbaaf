"""The model as lm-eval sees it: it plans batches, has them answered, and returns the answers."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM, eval_logger
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xlstm_eval.answering.batches import (
    Batch,
    Kind,
    Measured,
    Question,
    draws,
    form_batches,
    halves,
    make_questions,
)
from xlstm_eval.answering.coordinator import Coordinator
from xlstm_eval.answering.decoding import Prompts, generate_rows, row_draws
from xlstm_eval.answering.journal import Answered
from xlstm_eval.answering.scoring import Pair, score_pairs
from xlstm_eval.answering.sizes import CPU_ROWS, BatchSizes, largest_that_fits
from xlstm_eval.records import EvalError

NO_MEMORY = ("out of memory", "can't allocate memory")
"""Words of errors that a smaller batch may avoid."""


class BatchModel(HFLM):
    """Computes a batch's answers with lm-eval's own tokenisation, truncation and stop sequences."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        warnings: Sequence[str],
        prefill: int | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.prefill = prefill
        # lm-eval's messages on truncated prompts, as they come.
        self.messages = warnings
        self.tokens = 0

    def compute(self, batch: Batch) -> Answered:
        """Answer a batch, in halves where the device's memory is too small for all of it."""
        started, said, before = time.perf_counter(), len(self.messages), self.tokens
        answers, pieces = self._compute(batch)
        return Answered(
            batch=batch.key,
            answers=answers,
            tokens=self.tokens - before,
            seconds=round(time.perf_counter() - started, 3),
            pieces=pieces,
            warnings=list(dict.fromkeys(self.messages[said:])),
        )

    def _compute(self, batch: Batch) -> tuple[list[Any], int]:
        try:
            return self.answer_at_once(batch), 1
        except RuntimeError as error:
            if not _is_memory(error):
                raise
            full = str(error).splitlines()[0]
        # Outside the handler: the exception would keep the tensors of the pass that failed.
        free_memory()
        if len(batch.questions) == 1:
            raise EvalError(
                f"evaluate.batch: one request of {batch.width} tokens does not fit the device's "
                f"memory ({full}). Lower max_gen_tokens, or take a larger device."
            )
        first, second = (self._compute(half) for half in halves(batch))
        return first[0] + second[0], first[1] + second[1]

    def answer_at_once(self, batch: Batch) -> list[Any]:
        """Answer a batch without halving it."""
        if batch.kind == "generate_until":
            return self._generate(batch.questions)
        if batch.kind == "loglikelihood":
            return [list(score) for score in self._score(batch.questions)]
        # lm-eval cuts the texts into windows and sends them to `_loglikelihood_tokens` below.
        self.batch_size_per_gpu = max(1, len(batch.questions))
        requests: Any = [_Request(question.arguments) for question in batch.questions]
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        self.tokens += sum(len(pair.context) + len(pair.continuation) for pair in pairs)
        return score_pairs(self.model, pairs, self.tokenizer.pad_token_id)

    def _score(self, questions: Sequence[Question]) -> list[tuple[float, bool]]:
        requests: Any = [_Request(question.arguments) for question in questions]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """Keep the end of a pair that is longer than the model's context, as lm-eval does."""
        total = len(context) + len(continuation)
        if len(continuation) > self.max_length:
            raise EvalError(
                f"an answer of {len(continuation)} tokens is longer than the model's context of "
                f"{self.max_length}; leave its task out."
            )
        if total > self.max_length + 1:
            eval_logger.warning(
                f"Combined length of context ({len(context)}) and continuation "
                f"({len(continuation)}) exceeds the model's maximum length ({self.max_length}). "
                f"Truncating {total - self.max_length - 1} tokens from the left."
            )
        kept = context[-(self.max_length + 1 - len(continuation)) :]
        return Pair(tuple(kept), tuple(continuation))

    @torch.no_grad()
    def _generate(self, questions: Sequence[Question]) -> list[str]:
        """Generate for prompts of equal settings, as lm-eval's `generate_until` does."""
        prompts = [question.arguments[0] for question in questions]
        given: dict[str, Any] = questions[0].arguments[1]
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(settings.pop("until", None), eos=eos)
        budget = settings.pop("max_gen_toks")
        ids, mask = self.tok_batch_encode(
            prompts, left_truncate_len=self.max_length - budget, truncation=self.truncation
        )
        ids, mask = ids.to(self.device), mask.to(self.device)
        random = None
        if draws(given):
            random = row_draws([question.seed for question in questions], budget, self.device)
        elif not settings.get("temperature"):
            # Greedy: transformers would warn of a temperature that it does not use.
            settings |= {"do_sample": False}
            settings.pop("temperature", None)
        settings.pop("max_length", None)
        asked = Prompts(ids, mask, budget, stops, random, self.prefill)
        found = generate_rows(self.model, self.tokenizer, asked, settings)
        padding = self.tokenizer.pad_token_id
        self.tokens += int(mask.sum()) + sum(len(row) - row.count(padding) for row in found)
        return [self._text(row, stops) for row in found]

    def _text(self, tokens: Any, stops: list[str]) -> str:
        return postprocess_generated_text(self.tok_decode(tokens), stop=stops, think_end_token=None)

    def try_batch(self, batch: Batch) -> bool:
        """Tell whether the device's memory holds a batch as large as it can become."""
        try:
            with torch.no_grad():
                if batch.kind == "generate_until":
                    # One pass over prompts and answers fills the cache as the last token does.
                    self._fill_cache(batch.rows, batch.width)
                else:
                    self.answer_at_once(batch)
            return True
        except RuntimeError as error:
            if not _is_memory(error):
                raise
            return False
        finally:
            free_memory()

    def _fill_cache(self, rows: int, width: int) -> None:
        ids = torch.full((rows, width), self.eot_token_id).to(self.device)
        cache = None
        for chunk in ids.split(self.prefill or width, dim=1):
            cache = self.model(
                input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).past_key_values


class AskedModel(BatchModel):
    """What lm-eval asks on rank 0: it answers through the coordinator."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        warnings: Sequence[str],
        sizes: BatchSizes,
        seed: int,
        prefill: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, warnings, prefill)
        self.sizes, self.seed = sizes, seed
        self.multiturn = False  # which of lm-eval's calls it is
        self.coordinator: Coordinator | None = None
        # Tokens of prompts and answers by their questions' keys; models may share them.
        self.lengths: dict[str, tuple[int, int]] = {}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations."""
        return [(value, bool(greedy)) for value, greedy in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts."""
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generate answers."""
        return self._ask("generate_until", requests)

    def _ask(self, kind: Kind, requests: Sequence[Any]) -> list[Any]:
        assert self.coordinator is not None
        questions = make_questions(kind, (request.args for request in requests), self.seed)
        unique = list({question.key: question for question in questions}.values())
        measured = self._measure(kind, unique)
        rows = self.sizes.rows(kind, self.multiturn, lambda: self._search(measured))
        return self.coordinator.answer(questions, form_batches(measured, rows))

    def _search(self, measured: Sequence[Measured]) -> int:
        """Find the most rows that fit the memory, by trial of the batch that would need most."""
        if self.device.type == "cpu":
            return CPU_ROWS

        def fits(rows: int) -> bool:
            largest = max(form_batches(measured, rows), key=lambda batch: batch.cost)
            return self.try_batch(largest)

        widest = max((entry.tokens for entry in measured), default=1)
        return largest_that_fits(fits, widest)

    def _measure(self, kind: Kind, questions: Sequence[Question]) -> list[Measured]:
        """Count tokens; a continuation's are those of its text alone, which is near enough."""
        context = self.max_length  # lm-eval looks for it each time
        missing = [question for question in questions if question.key not in self.lengths]
        self.lengths |= self._lengths(kind, missing)
        found = []
        for question in questions:
            prompt, answer = self.lengths[question.key]
            # A prompt is cut where the model's context ends.
            prompt = max(1, min(prompt, context - answer))
            found.append(Measured(question, prompt, answer))
        return found

    def _lengths(self, kind: Kind, questions: Sequence[Question]) -> dict[str, tuple[int, int]]:
        """Count the tokens of questions' prompts and answers, by their keys."""
        prompts = self._count_tokens([question.arguments[0] for question in questions])
        if kind == "loglikelihood_rolling":
            answers = [0] * len(questions)
        elif kind == "loglikelihood":
            answers = self._count_tokens([question.arguments[1] for question in questions])
        else:
            answers = [
                normalize_gen_kwargs(question.arguments[1], self.max_gen_toks)["max_gen_toks"]
                for question in questions
            ]
        keys = [question.key for question in questions]
        return dict(zip(keys, zip(prompts, answers, strict=True), strict=True))

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of texts, of equal ones once: contexts come with every continuation."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        encoded = self.tokenizer(unique, add_special_tokens=False)["input_ids"]
        counts = dict(zip(unique, map(len, encoded), strict=True))
        return [counts[text] for text in texts]


class _Request:
    """As much of a request as lm-eval's own methods read."""

    task_name = None

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args


def free_memory() -> None:
    """Give back what a failed pass held, and what `settled_objects` has kept from being freed."""
    settled = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if settled:
        gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(word in text for word in NO_MEMORY)
