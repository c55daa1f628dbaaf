"""The files that a local teacher is made of: those that transformers reads, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xlstm_distill.errors import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SETTINGS = (
    CONFIG,
    "generation_config.json",
    # The tokenizer, in all the forms that tokenizers of transformers have.
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    # Its chat templates.
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""What a teacher reads besides its weights."""


def model_files(folder: Path, *, code: bool = False) -> list[Path]:
    """Weights, configuration, tokenizer and chat templates of a teacher, sorted.

    With `code` (`trust_remote_code`) its Python files count too.

    Raises:
        UserError: as `weight_files`.
    """
    found = set(weight_files(folder))
    for pattern in (*SETTINGS, *(["*.py"] if code else [])):
        found |= {path for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def hub_patterns(*, code: bool = False) -> list[str]:
    """Patterns of a hub teacher's files but its weights, as `model_files` has them."""
    return [*SETTINGS, INDEX, *(["*.py"] if code else [])]


def hub_weights(folder: Path) -> list[str]:
    """Names of the weights of a hub teacher, whose other files are in `folder`."""
    named = _read_json(folder / CONFIG).get("transformers_weights")
    if isinstance(named, str):
        return [named]
    shards = _read_json(folder / INDEX).get("weight_map")
    return sorted(set(shards.values())) if isinstance(shards, dict) else [WEIGHTS]


def weight_files(folder: Path) -> list[Path]:
    """Files of weights that transformers loads from a folder, with the index of sharded ones.

    Other copies in the folder (`consolidated.safetensors`, `original/`) are not read.

    Raises:
        UserError: there are none, a shard is missing, or they are pickles or an adapter.
    """
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"teacher.path: {folder} holds an adapter ({ADAPTER}); merge it into its model "
            "(peft's merge_and_unload, then save_pretrained) and give that folder."
        )
    # The configuration may name another file, which then comes first.
    named = _read_json(folder / CONFIG).get("transformers_weights")
    for name in (named, WEIGHTS, INDEX):
        if isinstance(name, str) and (folder / name).is_file():
            return _with_shards(folder, folder / name)
    for pattern in PICKLES:
        pickle = next(iter(sorted(folder.glob(pattern))), None)
        if pickle is not None:
            raise UserError(
                f"teacher.path: {folder} holds its weights as a pickle ({pickle.name}), which can "
                "run code when it is loaded; give safetensors. To convert a model that you trust: "
                "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)."
            )
    raise UserError(
        f"teacher.path: {folder} holds no weights that can be loaded; it needs {WEIGHTS}, or "
        f"{INDEX} and the files that it names."
    )


def _with_shards(folder: Path, weights: Path) -> list[Path]:
    """The file, or an index with the shards that it names."""
    if not weights.name.endswith(".index.json"):
        return [weights]
    shards = _read_json(weights).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(
            f"teacher.path: {weights} must name the file of each weight in its 'weight_map'; put "
            "it back from a copy."
        )
    names = sorted(set(shards.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"teacher.path: {folder / name} is missing, and {weights.name} names it; put it "
                "back from a copy."
            )
    return [weights, *(folder / name for name in names)]


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is none, as transformers says what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
