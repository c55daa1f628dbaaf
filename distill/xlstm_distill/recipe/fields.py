"""Types shared by the recipe's sections: strict numbers, names that can be folders, paths relative to the recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from xlstm_eval.problems import FieldError

SUM_TOLERANCE = 1e-6
"""How far weights that must add up may be off, for rounding."""
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME, _HUB_ID = re.compile(NAME_PATTERN), re.compile(f"{NAME_PATTERN}/{NAME_PATTERN}")


class Section(BaseModel):
    """Base of all parts of a recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise FieldError(
            "", f"{value!r} cannot name a folder; use letters, digits, '.', '_' and '-'."
        )
    return value


def _hub_or_path(value: str, info: ValidationInfo) -> str:
    """Make a local path absolute (relative to the recipe's folder, the validation context); keep a hub id.

    `owner/name` is a path if it, or a folder `owner`, lies beside the recipe; else it is a hub id.
    """
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return value
    path = folder / Path(value).expanduser()
    if path.exists():
        return str(path.resolve())
    if _HUB_ID.fullmatch(value) and not (folder / value.split("/")[0]).is_dir():
        return value
    raise FieldError(
        "",
        f"{value!r} is not there (looked for {path}); give a local path or a hub id 'owner/name'.",
    )


def _folder(value: str, info: ValidationInfo) -> str:
    """Make a local folder's path absolute (relative to the recipe's folder, the validation context)."""
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return value
    path = folder / Path(value).expanduser()
    if not path.is_dir():
        raise FieldError(
            "", f"{value!r} is not a folder (looked for {path}); paths are relative to the recipe."
        )
    return str(path.resolve())


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[
    str, AfterValidator(_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})
]
HubOrPath = Annotated[str, Field(min_length=1), AfterValidator(_hub_or_path)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(_folder)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
ShareOfAll = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Mixture = Annotated[dict[str, Positive], Field(min_length=1)]


def shape_of(value: Any) -> str:
    """Tell a mapping from anything else: the discriminator of `uniform` or a mapping of weights."""
    return "<mapping>" if isinstance(value, dict) else "<word>"
