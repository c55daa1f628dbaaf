"""Types that the recipe's sections share: strict numbers, folder names, paths beside the recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails

from xlstm_eval.problems import FieldError

SUM_TOLERANCE = 1e-6
"""How far a sum of weights may be from its total, relative to it. Rounding needs some room."""
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# A name becomes a folder (`artifacts/distill/NAME`) and a part of a label (`distill/NAME`), so it
# has no slash, and no dot in front: hidden folders hold drafts.
_NAME = re.compile(NAME_PATTERN)
_HUB_ID = re.compile(f"{NAME_PATTERN}/{NAME_PATTERN}")


class Section(BaseModel):
    """Base of all parts of a recipe: immutable, and unknown keys are errors."""

    # Frozen, because fingerprints are taken from it. Unknown keys are refused: a misspelt key would
    # otherwise leave its default in place without a word.
    model_config = ConfigDict(frozen=True, extra="forbid")

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield every broken rule that spans fields of this section; all fields are valid alone."""
        yield from ()

    @model_validator(mode="after")
    def _keeps_its_rules(self) -> Self:
        broken = list(self.broken_rules())
        if broken:
            # pydantic reports one error per validator that raises. A ValidationError is the
            # exception: its problems join those of the whole recipe, so the user sees all at once.
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(type="value_error", input=self, ctx={"error": error})
                    for error in broken
                ],
            )
        return self


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise FieldError(
            "", f"{value!r} cannot name a folder; use letters, digits, '.', '_' and '-'."
        )
    # Such folders hold artifacts of earlier settings, which `clean` removes.
    if ".kept-" in value:
        raise FieldError("", f"{value!r} holds '.kept-', as names of replaced artifacts do.")
    return value


def _hub_or_path(value: str, info: ValidationInfo) -> str:
    """Make a local path absolute and keep a hub id.

    Paths are relative to the recipe's folder, which is in the validation context. `owner/name` is a
    path if it exists beside the recipe, or if a folder `owner` does; otherwise it is a hub id.
    """
    folder: Path | None = (info.context or {}).get("folder")
    # No folder in the context: the recipe comes from a run directory and its paths are absolute
    # already.
    if folder is None:
        return value
    path = folder / Path(value).expanduser()
    if path.exists():
        return str(path.resolve())
    # `data/math` with a folder `data` beside the recipe is a misspelt path and no hub id. Asked of
    # the hub, it would fail late and with a message about the network.
    if _HUB_ID.fullmatch(value) and not (folder / value.split("/")[0]).is_dir():
        return value
    raise FieldError(
        "",
        f"{value!r} does not exist (looked for {path}); give a local path or a hub id "
        "'owner/name'.",
    )


def _folder(value: str, info: ValidationInfo) -> str:
    """Make a local folder's path absolute; it is relative to the recipe's folder."""
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return value
    path = folder / Path(value).expanduser()
    if not path.is_dir():
        raise FieldError(
            "", f"{value!r} is not a folder (looked for {path}); paths are relative to the recipe."
        )
    return str(path.resolve())


def _file(value: str, info: ValidationInfo) -> str:
    """Make a local file's path absolute; it is relative to the recipe's folder."""
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return value
    path = folder / Path(value).expanduser()
    if not path.is_file():
        raise FieldError(
            "", f"{value!r} is not a file (looked for {path}); paths are relative to the recipe."
        )
    return str(path.resolve())


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[
    str, AfterValidator(_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})
]
HubOrPath = Annotated[str, Field(min_length=1), AfterValidator(_hub_or_path)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(_folder)]
File = Annotated[str, Field(min_length=1), AfterValidator(_file)]
# Strict: pydantic would otherwise take "3", 3.0 and "yes" for 3 and true. A recipe that means
# something else than it says is worse than one that is refused.
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
# Above 0: a set that holds none of the mass would be empty.
ShareOfAll = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
# Below 1: an AdamW moment that decays by 1 would never take in a gradient.
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Mixture = Annotated[dict[str, Positive], Field(min_length=1)]


def _switch(value: Any) -> Any:
    """Undo what YAML 1.1 makes of the words `on` and `off`."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


def shape_of(value: Any) -> str:
    """Tell a mapping from a word: the discriminator of `uniform` and a mapping of weights."""
    # In angle brackets, because pydantic puts the tag into the path of an error, and
    # `xlstm_eval.problems` drops such parts again.
    return "<mapping>" if isinstance(value, dict) else "<word>"
