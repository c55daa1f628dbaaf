"""`patch`: an expert as a small file of changes to the student that it was trained from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.cli.options import AsJson, Debug
from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import Console, byte_size, short

app = typer.Typer(
    help="Keep an expert as a small patch of its seed student; apply, stack and remove patches.",
    no_args_is_help=True,
)

DENSITY = 0.05
"""Where neither a density nor a rank is given."""
NOTHING = "nothing was written"
"""What is left of a command that did not end: files and folders appear whole, or not at all."""
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Model, or artifact that holds one.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; must be new.")]


@app.command()
def make(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="The seed student: a run's artifacts/align.")
    ],
    expert: Annotated[
        Path, typer.Argument(metavar="EXPERT", help="The expert: a run's artifacts/distill/NAME.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, *.safetensors.")],
    density: Annotated[
        float | None,
        typer.Option(
            help="Share of each tensor's differences to keep, the largest.", show_default="0.05"
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Keep factors of this rank for each matrix instead, by SVD."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the patch.", show_default="that of the file")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the largest differences of an expert from its seed student into a file."""
    with one_line_errors(debug, NOTHING):
        if density is not None and rank is not None:
            raise UserError(f"--rank: {rank} beside --density {density}; give one of the two.")
        if rank is not None and rank < 1:
            raise UserError(f"--rank: {rank} is below 1; try 16.")
        if rank is None:
            density = DENSITY if density is None else density
        if density is not None and not 0 < density <= 1:
            raise UserError(f"--density: {density} is not above 0 and at most 1; try 0.05.")
        if out.suffix != ".safetensors" or out.exists():
            problem = "exists" if out.exists() else "does not end in .safetensors"
            raise UserError(f"{out}: {problem}; give a new file NAME.safetensors.")
        check_place(out)
        places = model_folder(base), model_folder(expert)

        from xlstm_distill.merging.patches import make_patch

        out.parent.mkdir(parents=True, exist_ok=True)
        console = Console()
        with console.progress("patch", size_of(places[0]) / 1e6, unit="MB") as progress:
            facts = make_patch(
                *places,
                out,
                density,
                name or out.stem,
                lambda n: progress.update(n / 1e6),
                rank=rank,
            )
        size = out.stat().st_size
        held = "changes" if rank is None else "numbers, most of them of factors,"
        console.line(
            f"{out}: {byte_size(size)}, {size / facts.model_bytes:.1%} of the model; "
            f"{short(facts.changes)} {held} hold {facts.retained:.1%} of the difference's square"
        )
        if facts.doubt is not None:
            typer.echo(
                f"warning: nothing tells whether {expert} was trained from {base} ({facts.doubt}); "
                "a difference from another seed student is noise",
                err=True,
            )


@app.command()
def apply(
    model: Model,
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH...", help="Patches to add.")],
    out: Out,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Weight of a patch, in their order.", show_default="1 for each"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Add patches to a model; the result is a model directory in a new folder."""
    with one_line_errors(debug, NOTHING):
        weights = weight or [1.0] * len(patches)
        if len(weights) != len(patches) or not all(map(math.isfinite, weights)):
            raise UserError(
                f"--weight: {weights} for {len(patches)} patches; give one finite number for each."
            )
        check_place(out)
        folder = model_folder(model)

        from xlstm_distill.merging.stack import apply_patches

        console = Console()
        with console.progress("patch", size_of(folder) / 1e6, unit="MB") as progress:
            stack = apply_patches(
                folder,
                list(zip(patches, weights, strict=True)),
                out,
                lambda n: progress.update(n / 1e6),
            )
        held = ", ".join(f"{one.patch.facts.name} {one.weight:g}" for one in stack.applied)
        console.line(f"{out}: a model with the patches {held}")


@app.command()
def remove(
    model: Model,
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="The patch's file or name.")],
    out: Out,
    debug: Debug = False,
) -> None:
    """Take a patch off a model, to the last bit; the result lies in a new folder."""
    with one_line_errors(debug, NOTHING):
        check_place(out)
        folder = model_folder(model)

        from xlstm_distill.merging.stack import remove_patch

        console = Console()
        with console.progress("patch", size_of(folder) / 1e6, unit="MB") as progress:
            stack = remove_patch(folder, patch, out, lambda n: progress.update(n / 1e6))
        held = ", ".join(f"{one.patch.facts.name} {one.weight:g}" for one in stack.applied)
        console.line(f"{out}: a model {f'with the patches {held}' if held else 'without patches'}")


@app.command()
def show(
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a patch holds, and which base it is for."""
    with one_line_errors(debug):
        from xlstm_distill.merging.patches import Patch

        opened = Patch(patch)
        opened.check()
        facts = opened.facts
        size = patch.stat().st_size
        if as_json:
            typer.echo(json.dumps({**asdict(facts), "bytes": size}, indent=2))
            return
        console = Console()
        console.line(f"{facts.name}: changes to the base {facts.base}")
        kind = f"density {facts.density:g}" if facts.rank is None else f"rank {facts.rank}"
        console.line(
            f"  {short(facts.changes)} of {short(facts.numbers)} numbers ({kind}), "
            f"{byte_size(size)}: {size / facts.model_bytes:.1%} of the model"
        )
        console.line(f"  holds {facts.retained:.1%} of the square of the expert's difference")
        known = facts.seed and f"yes, by the manifests ({facts.seed})"
        doubt = facts.doubt or "it was not recorded"
        console.line(f"  expert trained from this base: {known or f'not known, {doubt}'}")


def model_folder(place: Path) -> Path:
    """The folder of a saved model: this one, or the one that an artifact holds.

    Raises:
        UserError: there is none.
    """
    for folder in (place, place / "model"):
        if any(folder.glob("*.safetensors")):
            return folder
    raise UserError(f"{place}: no model here; give a folder with *.safetensors files.")


def check_place(out: Path) -> None:
    """Raise UserError if what is to be written would lie inside a file."""
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{out}: {nearest} is a file, not a folder; give another place.")


def size_of(folder: Path) -> int:
    """Bytes of a model's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
