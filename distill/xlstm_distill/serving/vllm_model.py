"""A student in vLLM: its own model, whose layers keep their state in vLLM's memory.

vLLM gives a request pages: one for each mixer's state, and those for the keys and values of heads
that keep full attention, which become more. All that works token by token (norms, MLPs, experts)
takes the row of a step's tokens as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree

from xlstm_distill.models.student import NO_MASK
from xlstm_distill.serving.vllm_layers import ServedAttention, ServedMixer, Step
from xlstm_distill.serving.vllm_pages import page_size


class VllmStudent(nn.Module, HasInnerState, IsAttentionFree):
    """A student of any family, as vLLM runs a model.

    Also where it keeps attention: to vLLM, "attention free" means that prefixes are not cached, and
    that the model cuts its memory into pages by itself.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        self.student: Any = AutoModelForCausalLM.from_pretrained(
            model.model, revision=model.revision, dtype=model.dtype
        ).to(vllm_config.device_config.device)
        self.student.eval().requires_grad_(False)
        self.body = self.student.model
        cache, page = self.student.new_cache(), page_size(self.student.mixers())
        for layer in self.body.layers:
            mixer = layer.self_attn
            if mixer.kept.mixed:
                layer.self_attn = ServedMixer(mixer, cache, page, vllm_config)
            else:
                layer.self_attn = ServedAttention(mixer, page)
        served = (layer.self_attn for layer in self.body.layers)
        self.mixers = [layer.prefix for layer in served if isinstance(layer, ServedMixer)]
        # Their hooks find documents in rows, and read long prompts in chunks; here a step does.
        for part in (self.student, self.body):
            part._forward_pre_hooks.clear()
        # The head's forward pass then begins with hidden states (families scale or cap logits).
        self.student.model = _Given()

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """Return how vLLM copies a state."""
        return (get_temporal_copy_spec,)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed tokens (T,)."""
        return self.body.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return hidden states (T, d) of a step's tokens (T,)."""
        metadata = get_forward_context().attn_metadata
        step = None
        if metadata is not None and self.mixers:
            step = Step(metadata[self.mixers[0]])
        given = (
            {"inputs_embeds": inputs_embeds[None]}
            if inputs_embeds is not None
            else {"input_ids": cast(Tensor, input_ids)[None]}
        )
        found = self.body(
            **given,
            position_ids=positions[None],
            attention_mask=NO_MASK,
            use_cache=False,
            step=step,
        )
        return found.last_hidden_state[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return logits (T, V) of hidden states (T, d)."""
        return self.student(inputs_embeds=hidden_states[None], use_cache=False).logits[0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Tell vLLM that all weights are there: transformers has read them."""
        return {name for name, _ in self.named_parameters()}


class _Given(nn.Module):
    """Stands where the head looks for the body, and returns what it is given."""

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
