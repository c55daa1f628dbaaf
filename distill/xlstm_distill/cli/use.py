"""Commands for a finished student: export, generate, chat, and its long context."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.cli.options import AsJson, Debug
from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.signals import INTERRUPTED

if TYPE_CHECKING:
    from xlstm_distill.serving.speaker import Sampling, Speaker

StudentPlace = Annotated[
    Path,
    typer.Argument(metavar="RUN_OR_MODEL", help="Run directory, or a student's own directory."),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Of a run: the expert of this name.",
        show_default="the merged student",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Device, for example cuda:1.", show_default="cuda where there is one"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Number format of the weights: float32, bfloat16 or float16.",
        show_default="that of the files",
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Temperature of sampling; 0 takes the most likely token.",
        show_default="the model's own settings",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Sample from the most likely tokens with this much mass.",
        show_default="the model's own settings",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile decoding with torch.compile: about a minute at first, then faster.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of sampling.", show_default="a random one")]
DTYPES = ("float32", "bfloat16", "float16")
HELP = "Type a message. /new begins again, /quit or Ctrl-D ends, Ctrl-C stops an answer."


def export(
    place: StudentPlace,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must be new.")],
    model: ModelName = None,
    dtype: Dtype = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes of a file of weights.")
    ] = "5GB",
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence",
            "--license",
            metavar="NAME",
            help="Licence in the model card, as the hub names it.",
            show_default="the teacher's, where its folder names one",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the directory to this repository."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    debug: Debug = False,
) -> None:
    """Write a student as a directory that plain transformers loads, without this package."""
    with one_line_errors(debug):
        check_dtype(dtype)
        from xlstm_distill.artifacts.run import versions
        from xlstm_distill.export import directory
        from xlstm_distill.export.source import find_student

        quiet_transformers()
        console = Console()
        # Before anything is read: the target may be a typing error away from a finished export.
        directory.check_target(out)
        exported = directory.export(
            find_student(place, model),
            out,
            console,
            version=versions().get("xlstm-distill", "unknown"),
            dtype=dtype,
            licence=licence,
            shard_size=shard_size,
        )
        for line in directory.describe(exported):
            console.line(line)
        if push_to_hub is not None:
            address = directory.upload(out, push_to_hub, private=private)
            console.line(f"Uploaded: {address}")


def generate(
    place: StudentPlace,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Text to continue.", show_default="standard input"),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat", help="Give the text as a message, in the chat template.")
    ] = False,
    model: ModelName = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    compile_steps: Compile = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Continue a text with a student; its speed goes to standard error."""
    with one_line_errors(debug):
        text = sys.stdin.read() if prompt is None else prompt
        if not text:
            raise UserError("--prompt: there is no text; give some with -p, or pipe it in.")
        speaker = _speaker(place, model, device, dtype, seed, compiled=compile_steps)
        sampling = _sampling(max_tokens, temperature, top_p)
        from xlstm_distill.serving.conversation import Conversation

        write = (lambda _: None) if as_json else _write
        if chat_template:
            spoken = Conversation(speaker).answer(text, sampling, write)
        else:
            spoken = speaker.say(speaker.tokenizer(text)["input_ids"], sampling, write)
        if as_json:
            typer.echo(json.dumps(spoken.values()))
        else:
            _write("\n")
            typer.echo(spoken.line(), err=True)
        if spoken.interrupted:
            raise typer.Exit(INTERRUPTED)


def chat(
    place: StudentPlace,
    model: ModelName = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Message that begins the conversation.")
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    compile_steps: Compile = False,
    debug: Debug = False,
) -> None:
    """Talk to a student; its state stays the same size however long the conversation is."""
    with one_line_errors(debug):
        speaker = _speaker(place, model, device, dtype, seed, compiled=compile_steps)
        sampling = _sampling(max_tokens, temperature, top_p)
        from xlstm_distill.serving.conversation import Conversation

        conversation = Conversation(speaker, system)
        typer.echo(HELP, err=True)
        while (words := _next_message()) is not None:
            if words == "/new":
                conversation.restart()
            elif words:
                spoken = conversation.answer(words, sampling, _write)
                _write("\n")
                typer.echo(spoken.line(), err=True)


def long_context(
    place: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run directory (its merged student), a model's directory, or a name on the hub; "
            "teachers too.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write (JSON).")],
    model: ModelName = None,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="A..B|A,B,...",
            help="Tokens of prompt and answer: doubling from A to B, or a list. What the model's "
            "context does not hold is left out.",
        ),
    ] = "256..65536",
    kinds: Annotated[
        str,
        typer.Option(metavar="KIND,...", help="Kinds of needles."),
    ] = "single,multi-key,multi-value,multi-query",
    items: Annotated[int, typer.Option(min=1, help="Items of each kind and length.")] = 100,
    documents: Annotated[int, typer.Option(min=0, help="Documents for the loss by position.")] = 16,
    haystack: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text (UTF-8) for haystacks and documents.",
            show_default="synthetic sentences",
        ),
    ] = None,
    items_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where items stay for the next model.",
            show_default="long-context-items beside FILE",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of items and documents.")] = 0,
    chat_template: Annotated[
        bool, typer.Option("--chat", help="Wrap prompts in the chat template.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how far a model remembers: needles in long texts, and loss by position."""
    with one_line_errors(debug):
        check_dtype(dtype)
        from xlstm_eval.long_context.settings import make_settings, read_lengths

        settings = make_settings(
            lengths=read_lengths(lengths),
            kinds=tuple(kind.strip() for kind in kinds.split(",") if kind.strip()),
            items=items,
            documents=documents,
            seed=seed,
            haystack=haystack,
        )
        path = _model_path(place, model)
        own_items = items_dir or out.parent / "long-context-items"
        # Hours before they are written to.
        if out.is_dir():
            raise UserError(f"--out: {out} is a directory; name a file in it.")
        if own_items.exists() and not own_items.is_dir():
            raise UserError(f"--items-dir: {own_items} is a file; name a directory.")
        quiet_transformers()
        from xlstm_distill.stages.measuring.long_context import Place, measure_place

        console = Console()
        place_of_model = Place(path, dtype, device)
        found = measure_place(place_of_model, settings, chat_template, own_items, out, console)
        if as_json:
            typer.echo(out.read_text(encoding="utf-8"), nl=False)
            return
        from xlstm_distill.cli.summary import long_context_table

        console.rich().print(long_context_table(found))
        console.line(f"Results: {out}")


def _model_path(place: str, model: str | None) -> str:
    """Return a model's directory or its name on the hub; of a run, that of a student."""
    folder = Path(place)
    if not (folder / "artifacts").is_dir():
        if model is not None:
            raise UserError(f"--model: {place} is no run directory; leave the option out.")
        return place
    from xlstm_distill.export.source import find_student

    return str(find_student(folder, model).directory)


def _next_message() -> str | None:
    """Read a message; None where the conversation ends."""
    try:
        # Where there is a terminal, `input` edits lines with readline.
        words = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if words == "/quit" else words


def _speaker(
    place: Path,
    model: str | None,
    device: str | None,
    dtype: str | None,
    seed: int | None,
    *,
    compiled: bool,
) -> Speaker:
    check_dtype(dtype)
    # torch and transformers take seconds to load; a wrong place is refused before that.
    from xlstm_distill.export.source import find_student

    found = find_student(place, model)
    quiet_transformers()
    from xlstm_distill.serving.speaker import Speaker

    if seed is not None:
        import torch

        torch.manual_seed(seed)
    speaker = Speaker.load(found, device, dtype)
    if compiled:
        from xlstm_distill.models.decoding.compiled import compile_decoding

        compile_decoding(speaker.student)
        typer.echo("Compiling the step of one token: about a minute.", err=True)
        speaker.warm_up()
    return speaker


def _sampling(max_tokens: int, temperature: float | None, top_p: float | None) -> Sampling:
    from xlstm_distill.serving.speaker import Sampling

    return Sampling(max_tokens, temperature, top_p)


def check_dtype(dtype: str | None) -> None:
    """Refuse an unknown number format."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is not allowed; one of {', '.join(DTYPES)}.")


def quiet_transformers() -> None:
    """Keep transformers' notices and bars off the terminal."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _write(text: str) -> None:
    """Write a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
