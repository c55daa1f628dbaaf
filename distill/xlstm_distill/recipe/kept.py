"""Full attention that a student keeps: in which layers, and in which heads of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from xlstm_distill.recipe.fields import Count, CountOrZero, FieldError, Section


def _layer(value: object) -> object:
    """Take the keys of JSON objects, which are texts."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class KeptAttention(Section):
    """Layers and heads that keep the teacher's full attention; the others get the mixer.

    Layers and heads count from 0. Layers come as a list or as every n-th, heads by their layer.
    """

    layers: tuple[CountOrZero, ...] = Field(
        default=(), description="Layers that keep all their heads, in rising order."
    )
    every: Count | None = Field(
        default=None, description="Keep every n-th layer whole; in place of `layers`."
    )
    offset: CountOrZero | None = Field(
        default=None,
        description="First layer of `every`; null means every - 1: `every: 4` keeps 3, 7, 11 and "
        "so on.",
    )
    heads: dict[Annotated[CountOrZero, BeforeValidator(_layer)], tuple[CountOrZero, ...]] = Field(
        default_factory=dict,
        description="Query heads that a layer keeps while its others get the mixer: "
        "`{5: [0, 2]}`, in rising order.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error where something is said twice, in another order, or not at all."""
        if self.layers and self.every is not None:
            yield FieldError("every", f"{self.every} stands beside `layers`; give one of the two.")
        if self.every is None and self.offset is not None:
            yield FieldError("offset", f"{self.offset} needs `every`; give both, or neither.")
        if self.every is not None and (self.offset or 0) >= self.every:
            yield FieldError("offset", f"{self.offset} must be below `every` ({self.every}).")
        if self.every == 1:
            yield FieldError("every", "1 keeps all layers, so nothing would be distilled.")
        if not (self.layers or self.heads) and self.every is None and self.offset is None:
            yield FieldError("", "keeps nothing; name layers or heads, or write null.")
        if not _rises(self.layers):
            yield FieldError("layers", f"{list(self.layers)} must rise, each layer once.")
        for layer, heads in self.heads.items():
            field = f"heads.{layer}"
            if not heads or not _rises(heads):
                yield FieldError(
                    field, f"{list(heads)} must name heads in rising order, each once."
                )
            if self._keeps_whole(layer):
                yield FieldError(field, "the layer keeps all its heads already; leave it out here.")

    def _keeps_whole(self, layer: int) -> bool:
        return keeps_layer(self.model_dump(mode="json"), layer)

    def of(self, layers: int, heads: int) -> list[tuple[int, ...]]:
        """Return which of H query heads each of L layers keeps."""
        settings = self.model_dump(mode="json")
        return [kept_heads(settings, layer, heads) for layer in range(layers)]


def _rises(numbers: Sequence[int]) -> bool:
    return list(numbers) == sorted(set(numbers))


def keeps_layer(attention: Mapping[str, Any], layer: int) -> bool:
    """Tell whether a layer keeps all its heads, by the setting as JSON has it."""
    if layer in attention["layers"]:
        return True
    every, offset = attention["every"], attention["offset"]
    if every is None:
        return False
    return bool(layer % every == (every - 1 if offset is None else offset))


def kept_heads(attention: Mapping[str, Any] | None, layer: int, heads: int) -> tuple[int, ...]:
    """Return which of H query heads a layer keeps, by the setting as JSON has it."""
    if attention is None:
        return ()
    if keeps_layer(attention, layer):
        return tuple(range(heads))
    return tuple(attention["heads"].get(str(layer), ()))


def kept_problems(
    attention: KeptAttention,
    heads: int,
    reaches: Sequence[int | None],
    *,
    may_keep_all: bool = False,
) -> Iterator[FieldError]:
    """Yield what a teacher of H query heads has not, or what needs no keeping.

    reaches: how many keys each layer attends to, its own included; None means all. may_keep_all:
    whether a student without a mixer is wanted, as a control.
    """
    layers, last = len(reaches), len(reaches) - 1
    for field, named in (("layers", attention.layers), ("heads", tuple(attention.heads))):
        beyond = [layer for layer in named if layer > last]
        if beyond:
            yield FieldError(
                field, f"{beyond[0]} is no layer of the teacher, which has {layers}: 0 to {last}."
            )
    found = attention.of(layers, heads)
    if attention.every is not None and not any(len(kept) == heads for kept in found):
        yield FieldError("every", f"{attention.every} keeps none of the teacher's {layers} layers.")
    for layer, kept in attention.heads.items():
        if kept[-1] >= heads:
            yield FieldError(
                f"heads.{layer}",
                f"{kept[-1]} is no query head of the teacher, which has {heads}: 0 to {heads - 1}.",
            )
        elif len(kept) == heads:
            yield FieldError(
                f"heads.{layer}", "names all heads of the layer; name the layer in `layers`."
            )
    full = [layer for layer, reach in enumerate(reaches) if reach is None]
    for layer, kept in enumerate(found):
        if kept and layer not in full:
            field = f"heads.{layer}" if layer in attention.heads else "layers"
            field = "every" if field == "layers" and attention.every is not None else field
            yield FieldError(
                field,
                f"layer {layer} of the teacher sees no more than {reaches[layer]} tokens, so it has"
                f" no full attention to keep; layers that have it: {_listed(full)}.",
            )
            break
    if not may_keep_all and all(len(kept) == heads for kept in found):
        yield FieldError("layers", "keeps all layers, so nothing would be distilled; leave some.")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
