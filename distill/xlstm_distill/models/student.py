"""The student: the teacher's own class with every attention layer replaced by a `HybridMixer`.

Layers and heads may keep the teacher's attention.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from xlstm_distill.errors import UserError
from xlstm_distill.models.cache import StudentCache, checked_cache
from xlstm_distill.models.decoding.prefill import (
    can_be_read_apart,
    chunk_size,
    read_prompt,
)
from xlstm_distill.models.families import FAMILIES, CausalLM, Family, family_of
from xlstm_distill.models.feature_maps import FeatureMap
from xlstm_distill.models.gates import OutputGate, ScalarGate
from xlstm_distill.models.mixer import NEW_MODULES, HybridMixer
from xlstm_distill.models.segments import check_chunk, chunk_documents, ends_in_padding
from xlstm_distill.recipe import MixerConfig
from xlstm_distill.recipe.kept import kept_heads, kept_problems

# transformers passes a four-dimensional mask on as it is. So none of size T x T is ever built.
NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


# For the type checker: every class made from the mixins has a model of transformers behind it.
if TYPE_CHECKING:
    from transformers import LlamaForCausalLM as _CausalLM
    from transformers import PreTrainedModel as _Model
else:
    _CausalLM = _Model = object


class MixerInit(_Model):
    """What all models with mixers share: how new parameters start."""

    family: Family

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Tell `set_experts_implementation`, which looks for experts in the class's own module."""
        return cls.family.experts != "none"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FeatureMap | ScalarGate | OutputGate):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class StudentBody(MixerInit):
    """What a student adds to its family's model without a head (`AutoModel`)."""

    family: Family

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        put_mixers(self, self.family, config)
        self.post_init()


class StudentMixin(MixerInit, _CausalLM):
    """What a student adds to its family's causal language model.

    Besides the family's arguments, `forward` takes `segment_ids` (B, T). Tokens of different
    documents do not see each other in state, window or sinks. Without `segment_ids`, documents are
    told apart by positions that restart, and padding by the two-dimensional `attention_mask`.
    Positions that are not given count from each document's first token.

    With a cache all of this holds across calls: a chunk, or a token, continues its row's document
    or begins one.
    """

    family: Family
    body_class: Any
    config: Any
    model: Any
    prefill_chunk: int | None = None
    """Tokens of each row that a prompt is read by at once where only its last logits are wanted
    (`logits_to_keep`, as `generate` does); None: a default. It may be set at any time."""
    # transformers then refuses assisted decoding, which takes tokens back.
    _is_stateful = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        checkpointing = getattr(config, "gradient_checkpointing", False)
        super().__init__(config, *args, **kwargs)
        if checkpointing:  # the body that is replaced has taken the flag out
            config.gradient_checkpointing = True
        # The family's class has made a body of the teacher's class. transformers asks the body how
        # parameters start that a file does not have, so it must be one that knows the new ones.
        self.model = self.body_class(config)
        self.post_init()
        names = tuple(inspect.signature(type(self).forward).parameters)[1:]
        hook = functools.partial(_read_prompt, names=names)
        self.register_forward_pre_hook(hook, with_kwargs=True)

    def new_cache(self) -> StudentCache:
        """Make an empty decoding cache; its memory grows with kept attention alone."""
        return _new_cache(self.model)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kw: Any
    ) -> None:
        """Give `generate` the student's own cache."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation: {generation_config.cache_implementation!r} does not apply"
                " to a student, whose cache has a constant size; leave it out."
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()

    def mixers(self) -> list[HybridMixer]:
        """The mixers, first layer first."""
        return [layer.self_attn for layer in self.model.layers]

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters that the teacher does not have (feature maps and gates)."""
        for name, parameter in self.named_parameters():
            if any(part in NEW_MODULES for part in name.split(".")):
                yield name, parameter


def put_mixers(body: Any, family: Family, config: Any) -> None:
    """Replace every attention layer of a model's body, and have a hook prepare its inputs."""
    mixer = MixerConfig(**config.mixer)
    attention = config.mixer.get("attention")
    for number, layer in enumerate(body.layers):
        kept = kept_heads(attention, number, config.num_attention_heads)
        layer.self_attn = HybridMixer(layer.self_attn, family, mixer, kept)
    # On the body, not on the model around it: training calls `student.model` without the head.
    # Names of arguments are looked up once, because a signature takes longer than a small layer.
    names = tuple(inspect.signature(body.forward).parameters)
    hook = functools.partial(_prepare_inputs, names=names)
    body.register_forward_pre_hook(hook, with_kwargs=True)


def _new_cache(model: Any) -> StudentCache:
    """Make an empty cache for a model's body."""
    windows = [layer.self_attn.window for layer in model.layers]
    return StudentCache(windows, model.config.mixer["sinks"])


def _prepare_inputs(
    model: Any, args: tuple, kwargs: dict[str, Any], names: tuple[str, ...]
) -> tuple[tuple, dict[str, Any]]:
    """Turn masks and positions into `segment_ids`, and make a cache where one is wanted.

    A hook that runs before the model's body, whose arguments have these names. It returns the
    arguments that the body gets.
    """
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    if kwargs.get("output_attentions", model.config.output_attentions):
        warnings.warn(
            "output_attentions: mixers have no attention weights, so there are none to return.",
            stacklevel=2,
        )
        kwargs["output_attentions"] = False
    ids = kwargs.get("input_ids")
    given = ids if ids is not None else kwargs["inputs_embeds"]
    shape = (given.shape[0], given.shape[1])
    mask = kwargs.get("attention_mask")
    cache = _cache_and_mask(model, kwargs, shape[1])
    past = None if cache is None else cache.ends
    segment_ids = kwargs.get("segment_ids")
    found = chunk_documents(
        shape,
        given.device,
        segment_ids,
        kwargs.get("position_ids"),
        mask,
        past,
        # Training gives segment ids and has no cache. Without them, a pass without documents is
        # worth the question: it may run on any backend.
        wait=cache is not None or segment_ids is None,
    )
    if cache is not None:
        cache.end_rows(found.ends)
        cache.receive(shape, found.segments, given.device)
    kwargs |= {
        "past_key_values": cache,
        "use_cache": cache is not None,
        "attention_mask": NO_MASK,
        "segment_ids": found.segments,
        "position_ids": found.positions,
    }
    return (), kwargs


def _read_prompt(
    model: Any, args: tuple, kwargs: dict[str, Any], names: tuple[str, ...]
) -> tuple[tuple, dict[str, Any]] | None:
    """Read all but the end of a prompt; a hook that runs before the student's forward pass.

    Its arguments have these names. What is left to it is the prompt's end.
    """
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    # A graph for prompts of any length cannot depend on it. Soon: it is asked at every token.
    if given is None or torch.compiler.is_compiling():
        return None
    if given.shape[1] == 1:
        return None
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    chunk = chunk_size(given, model.prefill_chunk)
    if not can_be_read_apart(model, kwargs, chunk):
        return None
    shape = (given.shape[0], given.shape[1])
    cache = _cache_and_mask(model.model, kwargs, shape[1])
    if cache is None:
        return None
    # Now, because later a part of the prompt would be in the caller's cache.
    check_chunk(shape, kwargs.get("segment_ids"), kwargs.get("attention_mask"), cache.ends)
    return (), read_prompt(model, kwargs, cache, chunk)


def _cache_and_mask(model: Any, kwargs: dict[str, Any], tokens: int) -> StudentCache | None:
    """Find the cache for a pass over so many tokens of each row, as `_cache_for` does.

    Raises:
        ValueError: of that; the mask has another shape, or padding that a cache cannot take.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and (mask.ndim != 2 or mask.shape[1] < tokens):
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)}, a student takes (B, T);"
            " give documents as segment_ids."
        )
    cache = _cache_for(model, kwargs, mask)
    # `ends_in_padding` waits for the device, so a single token goes unchecked. If it is padding,
    # it ends its row's document.
    if cache is not None and tokens > 1 and ends_in_padding(mask, cache.ends):
        raise ValueError("attention_mask: padding on the right cannot be cached; pad on the left.")
    return cache


def _cache_for(
    model: Any, kwargs: dict[str, Any], mask: torch.Tensor | None
) -> StudentCache | None:
    """Return the caller's cache, a new one where one is wanted, or None.

    A cache holds constants: no gradient flows from one call to the next. So there is none in
    training mode where gradients are recorded. Where only the configuration asks for one, rows that
    end in padding get none (they cannot be cached), and exported programs neither.

    Raises:
        ValueError: the caller's cache is of another class, or gradients would stop at it.
    """
    cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    trains = model.training and torch.is_grad_enabled()
    if cache is not None:
        cache = checked_cache(cache)
        if trains:
            raise ValueError(
                "past_key_values: a student's cache holds constants, so gradients would stop"
                " there; use torch.no_grad() or eval(), or leave the cache out."
            )
        return cache
    if trains and use_cache:
        warnings.warn(
            "use_cache: a student in training mode makes no cache where gradients are recorded,"
            " because it would hold constants; use torch.no_grad() or eval().",
            stacklevel=3,
        )
    if use_cache is None:
        wanted = model.config.use_cache and not torch.compiler.is_exporting()
        use_cache = wanted and not ends_in_padding(mask)
    return _new_cache(model) if use_cache and not trains else None


CODE_FILE = "modeling_xlstm.py"
CODE = '''"""This student's classes are in the package xlstm-distill: pip install xlstm-distill.

transformers reads this file where the package was not imported first, with trust_remote_code=True.
"""

from xlstm_distill.models.student import {names}
'''


class NamesItsPackage(_Model):
    """A saved student says which package it needs, where transformers does not know it."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, with a file that imports this package."""
        classes = _saved_classes(self.config)
        module = CODE_FILE.removesuffix(".py")
        self.config.auto_map = {auto: f"{module}.{name}" for auto, name in classes.items()}
        found = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True) and Path(save_directory).is_dir():
            names = ", ".join(sorted(classes.values()))
            (Path(save_directory) / CODE_FILE).write_text(CODE.format(names=names))
        return found


def _saved_classes(config: Any) -> dict[str, str]:
    """Return the names of a student's classes, by those of transformers' Auto classes."""
    prefix = type(config).__name__.removesuffix("Config")
    autos = {"Config": AutoConfig, **AUTOS}
    names = {auto.__name__: prefix + suffix for suffix, auto in autos.items()}
    return {auto: name for auto, name in names.items() if name in globals()}


# Those with another head: transformers makes them around the body that `AutoModel` gives.
AUTOS: dict[str, Any] = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}
MIXINS: dict[str, type] = {"Model": StudentBody, "ForCausalLM": StudentMixin}


def _student_classes(family: Family) -> dict[str, Any]:
    """Make and register the classes of a family's students (`xlstm_llama` and so on), by name."""
    name = f"Xlstm{family.class_prefix}"

    def made(suffix: str, bases: tuple[Any, ...], **body: Any) -> Any:
        doc = f"{suffix} of hybrid xLSTM students of {family.class_prefix} teachers."
        return type(name + suffix, bases, {"__module__": __name__, "__doc__": doc, **body})

    config = made(
        "Config",
        (family.config,),
        __annotations__={"mixer": dict | None},
        model_type=f"xlstm_{family.model_type}",
        mixer=None,
    )
    # exist_ok, because a stand-in may be registered under this name.
    AutoConfig.register(config.model_type, config, exist_ok=True)
    found = [config]
    own = {"config_class": config, "family": family}
    for suffix, auto in AUTOS.items():
        teacher = getattr(family.modeling, family.class_name(suffix), None)
        # Not every family has every head.
        if teacher is not None:
            mixin = MIXINS.get(suffix, MixerInit)
            found.append(made(suffix, (NamesItsPackage, mixin, teacher), **own))
            own.setdefault("body_class", found[-1])  # the first one
            auto.register(config, found[-1])
    return {cls.__name__: cls for cls in found}


STUDENTS: dict[str, Any] = {}
"""The class of a family's students, by the teacher's `model_type`."""
for _family in FAMILIES.values():
    _classes = _student_classes(_family)
    # As names of this module, the classes can be pickled and imported like any other.
    globals().update(_classes)
    STUDENTS[_family.model_type] = _classes[f"Xlstm{_family.class_prefix}ForCausalLM"]


def convert(teacher: CausalLM, mixer: MixerConfig, *, share_weights: bool = False) -> CausalLM:
    """Make a student that holds the teacher's weights, with a `HybridMixer` in every layer.

    Heads that `mixer.attention` names stay as they are; all of them may. Window attention and
    mLSTM, whichever `mixer` has, read the teacher's projections; feature maps and gates are new.
    With `share_weights` both models hold the same tensors: stage I trains none of them and needs
    no second copy.

    Raises:
        UserError: the teacher's architecture is not one of `FAMILIES`, or it has no such layers or
            heads to keep.
    """
    family = family_of(teacher.config.model_type)
    _check_kept(teacher, family, mixer)
    cls = STUDENTS[family.model_type]
    config = cls.config_class(**_settings(teacher), mixer=mixer.model_dump(mode="json"))
    # On the meta device nothing is allocated; `assign` below puts the real tensors in place.
    with torch.device("meta"):
        student = cls(config)
    weights = teacher.state_dict()
    if not share_weights:
        weights = {name: weight.detach().clone() for name, weight in weights.items()}
    # Not strict: feature maps and gates are in no teacher.
    report = student.load_state_dict(weights, strict=False, assign=True)
    if report.unexpected_keys:
        raise UserError(
            f"teacher: weights {report.unexpected_keys[:3]} have no place in a student of this"
            " family; load the teacher without adapters or quantisation."
        )
    # Buffers that no state dict holds are still on the meta device: rotary frequencies, and others.
    student.model.rotary_emb = copy.deepcopy(teacher.model.rotary_emb)
    for name, buffer in teacher.named_buffers():
        if student.get_buffer(name).is_meta:
            module, _, leaf = name.rpartition(".")
            student.get_submodule(module).register_buffer(leaf, buffer.clone(), persistent=False)
    reference = next(teacher.parameters())
    for module in student.modules():
        if isinstance(module, FeatureMap | ScalarGate | OutputGate):
            module.to_empty(device=reference.device).to(reference.dtype)
            module.reset_parameters()
    # `assign` gives each name a tensor of its own, so tied weights are tied once more.
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def _check_kept(teacher: CausalLM, family: Family, mixer: MixerConfig) -> None:
    if mixer.attention is None:
        return
    reaches = [family.reach(layer.self_attn) for layer in teacher.model.layers]
    heads = teacher.config.num_attention_heads
    found = kept_problems(mixer.attention, heads, reaches, may_keep_all=True)
    if problems := [f"student.mixer.attention.{problem}" for problem in found]:
        raise UserError(*problems)


NOISE = (
    "attention_dropout",
    "residual_dropout",
    "embedding_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "router_jitter_noise",
)
"""Settings of families that make a model in training mode random."""


def _settings(teacher: CausalLM) -> dict[str, Any]:
    """Copy the teacher's configuration for the student, which trains without noise."""
    settings = teacher.config.to_dict()
    for name in ("model_type", "architectures"):
        # Both name the teacher's class; the student's own sets them.
        settings.pop(name, None)
    # The mixers drop nothing, and targets come from a teacher that does not: half of a family's
    # dropout would be neither.
    for name in NOISE:
        if settings.get(name):
            warnings.warn(
                f"teacher.{name}: {settings[name]}, but a student trains without noise; its own is"
                " 0.",
                stacklevel=3,  # the caller of `convert`
            )
            settings[name] = 0.0
    return settings
