"""A student whose weights are sums of the experts', read from their files whenever they are used.

A layer's merged weights exist while that layer computes: its forward pass drops them, its backward
pass sums them again. Beside activations, memory holds one merged layer (or the head) and one tensor
of one expert, in float32, however many experts there are. The price is reading: a step reads each
expert's files four times, once for its targets and three times for the merged student. With four
experts of 8B parameters in float32 that is 0.5 TB from the page cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from xlstm_distill.losses.head import FusedHead, fuse_head
from xlstm_distill.merging.groups import group_of
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.loading import WeightFiles

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head"


class MixedWeights:
    """The experts' files, and the coefficients with which they are summed.

    coefficients (G, K) by group of layers and expert. With `base` and `scale` s the sum is that of
    task arithmetic: (1 - s) θ(0) + s Σ c_i θ_i, as the coefficients sum to 1.
    """

    def __init__(
        self,
        experts: Mapping[str, Path],
        layers: int,
        device: torch.device,
        dtype: torch.dtype,
        base: Path | None = None,
        scale: float = 1.0,
    ) -> None:
        self.files = [WeightFiles(place) for place in experts.values()]
        self.base = WeightFiles(base) if base is not None and scale != 1 else None
        self.layers, self.scale = layers, scale
        self.device, self.dtype = device, dtype
        self.coefficients = torch.zeros(1, len(self.files), device=device)
        self.alone: int | None = None
        """The expert whose own weights are used in place of the sum."""

    def weight(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Sum a tensor, or these rows (R,) of it, in float32; the result is in `dtype`."""
        if self.alone is not None:
            return self.read(self.files[self.alone], name, rows).to(self.dtype)
        group = group_of(name, len(self.coefficients), self.layers)
        total: Tensor = _Sum.apply(self.coefficients[group], self, name, rows)
        if self.base is not None:
            total = (1 - self.scale) * self.read(self.base, name, rows) + self.scale * total
        return total.to(self.dtype)

    def read(self, files: WeightFiles, name: str, rows: Tensor | None) -> Tensor:
        """Read a tensor of one model, or rows of it, in float32."""
        tensor = files[name]
        # Rows are taken from the mapped file: an embedding is never read whole.
        return (tensor if rows is None else tensor[rows]).to(self.device).float()


class _Sum(torch.autograd.Function):
    """Σ c_i W_i with a gradient for c (K,); the experts' tensors are read again for it."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, mixed: MixedWeights, name: str, rows: Tensor | None
    ) -> Tensor:
        ctx.source = (mixed, name, rows)
        total: Tensor | None = None
        for factor, files in zip(coefficients.tolist(), mixed.files, strict=True):
            part = mixed.read(files, name, rows) * factor
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        mixed, name, rows = ctx.source
        found = [torch.sum(gradient * mixed.read(files, name, rows)) for files in mixed.files]
        return torch.stack(found), None, None, None


class Streamed(nn.Module):
    """A module on the meta device that computes with summed weights.

    The module is in a list, so that nobody looks for its parameters.
    """

    def __init__(self, module: nn.Module, name: str, mixed: MixedWeights) -> None:
        super().__init__()
        self.module, self.name, self.mixed = [module], name, mixed
        self.outputs: list[Tensor] = []
        """What the last calls gave, for whoever compares layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; where gradients are recorded its weights are not kept."""
        if torch.is_grad_enabled():
            # Nothing in a layer is random: there is no dropout in a student in eval mode.
            found = checkpoint(
                self._call, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        else:
            found = self._call(*args, **kwargs)
        self.outputs.append(found)
        return found

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module[0]
        weights = {
            name: self.mixed.weight(f"{self.name}.{name}") for name, _ in module.named_parameters()
        }
        return functional_call(module, weights, args, kwargs)


class StreamedEmbedding(nn.Module):
    """An embedding of which only the rows of the tokens at hand are summed."""

    def __init__(self, module: nn.Embedding, mixed: MixedWeights) -> None:
        super().__init__()
        # Rows are numbered anew, so that the padding's number means nothing here.
        module.padding_idx = None
        self.module, self.mixed = [module], mixed

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids (B, T): (B, T, d)."""
        rows, places = ids.unique(return_inverse=True)
        weight = self.mixed.weight(EMBEDDING, rows.cpu())
        found: Tensor = functional_call(self.module[0], {"weight": weight}, (places,))
        return found


class StreamedStudent:
    """A student without weights of its own, for forward and backward passes over whole rows.

    `student` is on the meta device (`empty_student`), its kernels chosen.
    """

    def __init__(self, student: CausalLM, mixed: MixedWeights) -> None:
        self.mixed = mixed
        self.head: FusedHead = fuse_head(student)
        self.body = student.model
        self.tied = bool(student.config.tie_word_embeddings)
        self.body.rotary_emb.to(mixed.device)
        self.body.embed_tokens = StreamedEmbedding(self.body.embed_tokens, mixed)
        self.layers = [
            Streamed(layer, f"model.layers.{number}", mixed)
            for number, layer in enumerate(self.body.layers)
        ]
        self.body.layers = nn.ModuleList(self.layers)
        self.body.norm = Streamed(self.body.norm, "model.norm", mixed)

    def hidden(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Run the body: every layer's output, and what the head gets, all (B, T, d)."""
        for layer in self.layers:
            layer.outputs.clear()
        found = self.body(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segment_ids=batch.segment_ids,
            use_cache=False,
        ).last_hidden_state
        outputs = [layer.outputs.pop() for layer in self.layers]
        return outputs, self.head.scaled(found)

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight (V, d) and bias (V,), summed."""
        weight = self.mixed.weight(EMBEDDING if self.tied else f"{HEAD}.weight")
        bias = self.mixed.weight(f"{HEAD}.bias") if self.head.bias is not None else None
        return weight, bias
