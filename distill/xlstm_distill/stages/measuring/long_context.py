"""Long context: a part of the stage evaluate, and a measurement of a model outside a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from xlstm_distill.artifacts import Draft, Run
from xlstm_distill.artifacts.files import write_text
from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.data.prepare import tokenizer_hash
from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.workbench import bar
from xlstm_eval.harness import Session, context_of
from xlstm_eval.long_context import files
from xlstm_eval.long_context.measure import Measurement, help_to_measure, measure
from xlstm_eval.long_context.settings import LongContextSettings
from xlstm_eval.records import LongContext
from xlstm_eval.results import ANSWERS_FILE, LONG_CONTEXT_FILE

ITEMS_FOLDER = "long-context"


def score_long_context(
    model: CausalLM,
    lineage: Lineage,
    run: Run,
    name: str,
    session: Session,
    draft: Draft,
    console: Console,
) -> None:
    """Write a model's recall over distance and loss by position (rank 0)."""
    settings = recipe_settings(lineage.recipe)
    if settings is None:
        return
    label = f"evaluate/{name}"
    source = _source(model.config, lineage.tokenizer, lineage.tokenizer_hash, lineage.recipe)
    console.line(f"{label}: long context, {', '.join(settings.kinds)}")
    # One folder for all models of the run: they are asked the same.
    folder = run.directory / "evaluation" / ITEMS_FOLDER
    found = measure(
        model,
        lineage.tokenizer,
        files.prepare(settings, source, folder),
        _session(session),
        chat=source.chat,
        show=lambda part: bar(console, f"{label}: {part}"),
    )
    draft.write_json(LONG_CONTEXT_FILE, found.results.model_dump(mode="json"))
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in found.answers)
    (draft.path / ANSWERS_FILE).write_text("".join(lines), encoding="utf-8")
    draft.results["protocol"]["long_context"] = found.protocol


def help_to_score(model: CausalLM, lineage: Lineage, session: Session) -> None:
    """Answer what rank 0 deals out while it is in `score_long_context` (all other ranks)."""
    settings = recipe_settings(lineage.recipe)
    if settings is None:
        return
    lengths = files.usable_lengths(settings, context_of(model.config, lineage.tokenizer))
    help_to_measure(
        model,
        lineage.tokenizer,
        lengths if settings.kinds else (),
        settings.documents > 0,
        _session(session),
    )


def check_long_context(lineage: Lineage, config: Any) -> None:
    """Refuse settings of which no items can be made for the teacher; raises EvalError."""
    settings = recipe_settings(lineage.recipe)
    if settings is not None:
        source = _source(config, lineage.tokenizer, lineage.tokenizer_hash, lineage.recipe)
        files.check(settings, source)


def recipe_settings(recipe: Recipe) -> LongContextSettings | None:
    """Return the recipe's section `evaluate.long_context`: the fields have the same names."""
    section = recipe.evaluate.long_context
    return None if section is None else LongContextSettings(**section.model_dump())


def _source(config: Any, tokenizer: Any, its_hash: str, recipe: Recipe) -> files.Source:
    context = context_of(config, tokenizer)
    return files.Source(tokenizer, its_hash, recipe.evaluate.apply_chat_template, context)


def _session(session: Session) -> Session:
    # The recipe's batch is for its tasks: as many rows of 64k tokens would fit no device.
    return replace(session, batch_size=None)


@dataclass(frozen=True)
class Place:
    """A model on the disk or on the hub, and how it is loaded."""

    path: str
    dtype: str | None = None
    device: str | None = None


def measure_place(
    place: Place,
    settings: LongContextSettings,
    chat: bool,
    items: Path,
    out: Path,
    console: Console,
) -> LongContext:
    """Measure a model that needs no run, and write the results as JSON.

    ``items`` is the folder in which the items stay, for other models too. Answers are kept beside
    ``out`` until it is written, so that the same call goes on.

    Raises:
        UserError: no model, or a device that is not there.
        EvalError: settings that do not fit the model.
    """
    config = _load(AutoConfig, place.path, "model")
    tokenizer = _load(AutoTokenizer, place.path, "tokenizer")
    its_hash = tokenizer_hash(tokenizer)
    source = files.Source(tokenizer, its_hash, chat, context_of(config, tokenizer))
    if chat and not tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer of {place.path} has no template; leave it out.")
    # Before the weights: what cannot be asked is refused in seconds.
    files.check(settings, source)
    work = out.with_name(f".{out.name}.work")
    prepared = files.prepare(settings, source, items)
    model = _load_model(place)
    session = Session(
        sizes=work / "batch",
        journal=work / "answers",
        identity=digest([_content(place), prepared.identity, str(model.dtype)]),
    )
    found = measure(
        model.eval(),
        tokenizer,
        prepared,
        session,
        chat=chat,
        show=lambda part: bar(console, part),
    )
    write_text(out, json.dumps(_values(place, found), indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    return found.results


def _values(place: Place, found: Measurement) -> dict[str, Any]:
    return {
        "model": place.path,
        "long_context": found.results.model_dump(mode="json"),
        "protocol": found.protocol,
        "answers": found.answers,
    }


def _load(auto: Any, path: str, what: str, **options: Any) -> Any:
    # The students' classes: transformers finds them once they are registered.
    import xlstm_distill.models.student  # noqa: F401

    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"MODEL: {path!r} holds no {what} that can be loaded: {reason}") from error


def _load_model(place: Place) -> CausalLM:
    try:
        device = torch.device(place.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise UserError(
            f"--device: {place.device!r} is not there; leave it out, or use cpu."
        ) from None
    options = {"dtype": place.dtype or "auto", "device_map": {"": device}}
    model: CausalLM = _load(
        AutoModelForCausalLM, place.path, "model", use_safetensors=True, **options
    )
    return model


def _content(place: Place) -> list[Any]:
    """Say which weights a place holds, without reading them."""
    folder = Path(place.path)
    found: list[Any] = [place.path]
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        state = path.stat()
        found.append([path.name, state.st_size, state.st_mtime_ns])
    return found
