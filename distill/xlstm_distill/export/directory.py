"""Write a student as a directory that plain transformers loads, with or without this package."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from xlstm_distill.artifacts.files import replace_directory
from xlstm_distill.errors import UserError
from xlstm_distill.export.card import CardFacts, model_card
from xlstm_distill.export.modeling import auto_map, modeling_file, modeling_source
from xlstm_distill.export.source import FoundStudent
from xlstm_distill.models.families import FAMILIES
from xlstm_distill.models.loading import WeightFiles, empty_student
from xlstm_distill.models.teacher_files import CONFIG, INDEX, SETTINGS
from xlstm_distill.planning.architecture import read_architecture
from xlstm_distill.recipe import MixerConfig
from xlstm_distill.runtime.console import Console, byte_size
from xlstm_kernels.state import state_dtype

SHARD_SIZE = "5GB"
"""Most bytes of a file of weights: host memory holds one file at a time."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the weights' and the state's bytes, the latter for one sequence.

    bytes_per_token: what each token adds to the state, where heads keep full attention.
    """

    directory: Path
    weight_bytes: int
    state_bytes: int
    bytes_per_token: int = 0


def export(
    student: FoundStudent,
    target: Path,
    console: Console,
    *,
    version: str,
    dtype: str | None = None,
    licence: str | None = None,
    shard_size: str = SHARD_SIZE,
) -> Exported:
    """Write a student, its modeling file and its model card; `target` appears when all is there.

    version: of this package. dtype: number format of the weights; None keeps theirs. licence: for
    the card; None takes the teacher's, where its folder names one.

    Raises:
        UserError: the target is there already, or the student's family is not supported.
    """
    check_target(target)
    source = modeling_source(student.teacher_type, version)
    made = target.absolute().with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    made.mkdir(parents=True)
    try:
        config = _config(student, dtype)
        (made / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (made / modeling_file(student.teacher_type)).write_text(source, encoding="utf-8")
        _copy_settings(student.directory, made)
        weight_bytes = _write_weights(student.directory, made, dtype, shard_size, console)
        facts = card_facts(student, made, weight_bytes, version, licence)
        (made / "README.md").write_text(model_card(facts), encoding="utf-8")
        if target.exists():  # empty: `check_target`
            target.rmdir()
        replace_directory(made, target.absolute())
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Exported(target, weight_bytes, facts.state_bytes, facts.bytes_per_token)


def check_target(target: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: there is a file, or a folder that is not empty.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise UserError(f"OUT: {target} is there already; give another name, or remove it first.")


def _config(student: FoundStudent, dtype: str | None) -> dict[str, Any]:
    """Return the configuration, which tells transformers where the classes are."""
    config = dict(student.config)
    # All fields: the modeling file knows no defaults.
    config["mixer"] = MixerConfig(**config["mixer"]).model_dump(mode="json")
    config["auto_map"] = auto_map(student.teacher_type)
    if dtype is not None:
        config["dtype"] = dtype
    return config


def _copy_settings(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates and generation settings."""
    for pattern in SETTINGS:
        for path in source.glob(pattern):
            if path.is_file() and path.name != CONFIG:
                place = target / path.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)


def _write_weights(
    source: Path, target: Path, dtype: str | None, shard_size: str, console: Console
) -> int:
    """Write the weights in files of at most `shard_size`; return their bytes."""
    weights = WeightFiles(source)

    def converted(tensor: Tensor) -> Tensor:
        wanted = getattr(torch, dtype) if dtype and tensor.is_floating_point() else tensor.dtype
        return tensor.to(wanted).contiguous()

    # Shapes alone decide which file a tensor goes to, so that nothing is read for it.
    shapes = {name: converted(weights[name].to("meta")) for name in weights}
    try:
        plan = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_size)
    except ValueError:
        raise UserError(f"--shard-size: {shard_size!r} is no size; write 5GB or 500MB.") from None
    total = sum(tensor.numel() * tensor.element_size() for tensor in shapes.values())
    with console.progress("export", total / 1e6, unit="MB") as progress:
        for file, names in plan.filename_to_tensors.items():
            tensors = {name: converted(weights[name]) for name in names}
            save_file(tensors, target / file, metadata={"format": "pt"})
            progress.update(sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def card_facts(
    student: FoundStudent, made: Path, weight_bytes: int, version: str, licence: str | None
) -> CardFacts:
    """Collect what the model card says."""
    config = json.loads((made / CONFIG).read_text())
    teacher = {**config, "model_type": student.teacher_type}
    architecture = read_architecture(teacher, str(made / CONFIG))
    dtype = getattr(torch, config.get("dtype") or "float32")
    report = student.run / "report" / "report.md" if student.run else None
    state, per_token = state_bytes(made, dtype)
    return CardFacts(
        name=student.recipe.name if student.recipe else student.directory.name,
        model=student.name,
        family=FAMILIES[student.teacher_type].class_prefix,
        recipe=student.recipe,
        report=report.read_text(encoding="utf-8") if report and report.is_file() else None,
        mixer=MixerConfig(**config["mixer"]),
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=weight_bytes,
        state_bytes=state,
        bytes_per_token=per_token,
        key_bytes=2 * architecture.layers * architecture.key_width * dtype.itemsize,
        version=version,
        licence=licence,
        has_chat=any(made.glob("chat_template*")),
    )


def state_bytes(directory: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Count the bytes that decoding holds for one sequence, and those that each token adds."""
    student = empty_student(directory, dtype)
    cache = student.new_cache()
    # On the meta device tensors have shapes and no memory.
    cache.receive((1, 1), None, torch.device("meta"))
    assert cache.lengths is not None
    for mixer, layer in zip(student.mixers(), cache.layers, strict=True):
        heads = mixer.kept
        keys = torch.empty(1, heads.mixed_keys, 1, mixer.head_dim, dtype=dtype, device="meta")
        if heads.kept:
            full = keys.new_empty(1, heads.kept_keys, 1, mixer.head_dim)
            layer.extend(full, full)
        if mixer.has_window:
            layer.ring_for(keys, keys, cache.lengths)
        if mixer.has_mlstm:
            features = keys.new_empty(1, len(heads.mixed), 1, mixer.feature_map_k.out_features)
            layer.state_for(features, keys, state_dtype(keys))
    return cache.nbytes(), cache.bytes_per_token()


def upload(directory: Path, repository: str, *, private: bool, api: Any = None) -> str:
    """Upload an exported directory to the hub; return its address.

    api: an `HfApi`; by default one with the user's own token.

    Raises:
        UserError: the hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = api or HfApi()
    try:
        address = str(hub.create_repo(repository, private=private, exist_ok=True))
        hub.upload_folder(repo_id=repository, folder_path=directory)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--push-to-hub: {repository!r} was not uploaded: {lines[0]} The directory {directory} "
            "is complete."
        ) from error
    return address


def _growth(per_token: int) -> str:
    """Say what a sequence's length adds to its state."""
    return f"and {per_token:,} bytes for each token" if per_token else "however long it is"


def describe(exported: Exported) -> list[str]:
    """Say what was written and how to load it."""
    return [
        f"{exported.directory}: {byte_size(exported.weight_bytes)} of weights; decoding holds "
        f"{byte_size(exported.state_bytes)} for a sequence, {_growth(exported.bytes_per_token)}.",
        f"Load it: AutoModelForCausalLM.from_pretrained({str(exported.directory)!r}, "
        "trust_remote_code=True)",
    ]
