"""Templates of the reports, and writing their files whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlstm_eval.records import EvalError
from xlstm_eval.report.names import byte_size, duration, token_count
from xlstm_eval.score import ends, percent, with_stderr


def write_files(files: Mapping[str, str], target: Path) -> Path:
    """Write a folder of texts; return it.

    All or nothing: a folder beside ``target`` is filled, which then takes its place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # mkdtemp makes folders that only their owner may read; a report is for others.
        fresh.chmod(0o755)
        for name, text in files.items():
            (fresh / name).write_text(text, encoding="utf-8")
        _replace(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


def environment() -> Any:
    """Return the templates with the filters that they use."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    # Markdown is not escaped as a whole: the filter `cell` escapes what stands in its tables. A
    # template that names a missing value fails, and does not print nothing.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "duration": duration,
        "score": _score,
        "cell": _markdown_cell,
        "ends": ends,
        "bytes": byte_size,
        "tokens": token_count,
        "breaks": _with_breaks,
    }
    environment.globals["with_stderr"] = with_stderr
    return environment


def _score(value: float) -> str:
    # Perplexities and scores in percent need fewer digits than shares do.
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _with_breaks(name: str) -> Any:
    """Let a long name break after its underscores; it is escaped here."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _markdown_cell(value: object) -> str:
    """Keep a text inside its cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _replace(fresh: Path, target: Path) -> None:
    """Put ``fresh`` in the place of ``target``; remove the old report once the new one stands."""
    if not target.exists():
        fresh.rename(target)
        return
    if not target.is_dir():
        raise EvalError(f"report: {target} is a file. Give a folder.")
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    # A rename cannot replace a folder that holds files, so the old one moves away first.
    os.replace(target, old)
    fresh.rename(target)
    shutil.rmtree(old)
