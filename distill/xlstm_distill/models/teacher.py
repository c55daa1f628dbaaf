"""Load the pinned teacher and its tokenizer; refuse what cannot be distilled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer

from xlstm_distill.artifacts.hashing import digest, hash_files
from xlstm_distill.errors import UserError
from xlstm_distill.models.teacher_files import (
    hub_patterns,
    hub_weights,
    model_files,
    weight_files,
)
from xlstm_distill.recipe import Teacher
from xlstm_distill.runtime.ranks import (
    from_rank_zero,
    gathered,
    is_first_of_node,
    is_main_process,
    process_count,
)

if TYPE_CHECKING:
    import torch

    from xlstm_distill.models.families import CausalLM


_DOWNLOADED: set[tuple[str, str]] = set()
"""Teachers of the hub, and their revisions, that `download_teacher` has put on this machine."""


def download_teacher(config: Teacher) -> None:
    """Download a teacher of the hub once a machine, so that all ranks then load it from the disk.

    Rank 0 comes first: machines mostly share the cache. Then the others find their files there, or
    one rank of each downloads them. All ranks must call this.

    Raises:
        UserError: it cannot be downloaded.
    """
    if process_count() == 1 or Path(config.path).is_dir():
        return
    from_rank_zero(lambda: _download(config))
    problem = ""
    if is_first_of_node() and not is_main_process():
        try:
            _download(config)
        except UserError as error:
            problem = str(error)
    # A barrier too: the other ranks of a machine must not look before it has the files.
    for told in filter(None, gathered(problem)):
        raise UserError(told)
    _DOWNLOADED.add(_version(config))


def _download(config: Teacher) -> None:
    import huggingface_hub

    def fetch(patterns: list[str]) -> Path:
        path, revision = _version(config)
        return Path(
            huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns)
        )

    try:
        folder = fetch(hub_patterns(code=config.trust_remote_code))
        fetch(hub_weights(folder))
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"teacher.path: {config.path!r} cannot be downloaded: {reason}") from error


def _version(config: Teacher) -> tuple[str, str]:
    return config.path, config.revision or "main"


def load_teacher(config: Teacher, device: torch.device | str = "cpu") -> CausalLM:
    """Load the teacher in its recipe's dtype, for inference.

    Raises:
        UserError: the path is missing, holds no whole model, or the architecture is not supported.
    """
    # Not above: who needs the tokenizer alone loads no model code.
    import torch
    from transformers import AutoModelForCausalLM

    # Only the configuration is read for this: a wrong teacher is refused before weights are loaded.
    check_teacher(config)
    # Never a pickle, from the hub neither: it can run code when it is loaded.
    options = {"dtype": getattr(torch, config.dtype), "use_safetensors": True}
    # Each tensor goes from the mapped file to its device. Ranks of a node share the file's pages,
    # and none holds a copy of the model in host memory.
    place = {"": torch.device(device)}
    options |= {"device_map": place, "output_loading_info": True}
    model, report = _load(AutoModelForCausalLM, config, "a model", **options)
    # transformers draws what a file lacks at random, and only warns.
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"teacher.path: {config.path!r} has no weight {missing[0]} ({len(missing)} missing);"
            " get its files again, or save it by transformers with save_original_format=False."
        )
    return model.eval()


def load_tokenizer(config: Teacher) -> Any:
    """Load the teacher's tokenizer and check that it fits the teacher.

    Raises:
        UserError: the tokenizer is missing, has no end-of-text token, or has more tokens than the
            teacher's embedding.
    """
    _check_path(config)
    tokenizer = _load(AutoTokenizer, config, "a tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"teacher.path: the tokenizer of {config.path!r} has no end-of-text token;"
            " set its eos_token."
        )
    vocabulary = _load(AutoConfig, config, "a model").vocab_size
    tokens = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    if tokens > vocabulary:
        raise UserError(
            f"teacher.path: the tokenizer of {config.path!r} has {tokens} tokens, its model only"
            f" {vocabulary}; they do not belong together. Use the tokenizer the teacher was trained"
            " with."
        )
    return tokenizer


def teacher_hash(config: Teacher) -> str:
    """Hash the recipe's settings of the teacher and, where the teacher is local, its files.

    Only the files it is made of count (`teacher_files.model_files`): a changed README makes nothing
    anew. A teacher of the hub is identified by its name and revision.
    """
    settings = config.model_dump(mode="json")
    folder = Path(config.path)
    # By content: the same teacher in another place is the same teacher.
    if folder.is_dir():
        settings["path"] = hash_files(folder, model_files(folder, code=config.trust_remote_code))
    return digest(settings)


def check_teacher(config: Teacher) -> None:
    """Refuse a teacher that cannot be distilled, from its files' names and its configuration.

    Raises:
        UserError: the path is missing, holds no weights but pickles, or the architecture is not
            supported.
    """
    from xlstm_distill.models.families import family_of

    _check_path(config)
    if Path(config.path).is_dir():
        weight_files(Path(config.path))
    found = teacher_config(config)
    family_of(found.model_type)
    _refuse_mxfp4(config, found)


def _refuse_mxfp4(config: Teacher, found: Any) -> None:
    """Refuse weights of four bits: a student of them cannot train."""
    settings = getattr(found, "quantization_config", None) or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    if str(getattr(method, "value", method)) == "mxfp4":
        raise UserError(
            f"teacher.path: the weights of {config.path!r} are in MXFP4, which does not train."
            " Save them in bfloat16 once: AutoModelForCausalLM.from_pretrained(PATH,"
            " dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))"
            ".save_pretrained(FOLDER, save_original_format=False), and the tokenizer too; give that"
            " folder."
        )


def teacher_config(config: Teacher) -> Any:
    """Load the teacher's configuration.

    Raises:
        UserError: there is none.
    """
    return _load(AutoConfig, config, "a model")


def _check_path(config: Teacher) -> None:
    """Refuse an absolute path that does not exist."""
    path = Path(config.path)
    # transformers would take it for a name on the hub, and complain about that.
    if path.is_absolute() and not path.is_dir():
        raise UserError(
            f"teacher.path: {config.path} is no directory; give a local directory or a hub id"
            " owner/name."
        )


def _load(auto: Any, config: Teacher, what: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(
            config.path,
            revision=config.revision or "main",
            local_files_only=_version(config) in _DOWNLOADED,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        # transformers explains in many lines; the first one says what is wrong.
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"teacher.path: {config.path!r} holds no {what[2:]} that can be loaded: {reason}"
        ) from error
