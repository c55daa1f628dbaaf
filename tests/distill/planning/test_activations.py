"""Saved activations, counted by the planner, against what autograd keeps in a real pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.student import convert
from xlstm_distill.planning.activations import work
from xlstm_distill.planning.activations.passes import Pass
from xlstm_distill.planning.activations.saved import (
    layer_saved,
    layers_saved,
    mixer_saved,
    outside_layers,
)
from xlstm_distill.planning.activations.work import layer_excess, window_work
from xlstm_distill.planning.architecture import Architecture
from xlstm_distill.recipe import MixerConfig
from xlstm_distill.stages.workbench import architecture_of
from xlstm_distill.training.objectives import AlignObjective
from xlstm_kernels import mlstm
from xlstm_kernels.testing import allocated_peak
from xlstm_kernels.torch import bounded, chunkwise, window, window_cpu

MIXERS = {
    "softmax": MixerConfig(window=40, sinks=4),
    "hedgehog": MixerConfig(window=16, sinks=4, feature_map="hedgehog", feature_dim=24),
    "mlstm": MixerConfig(window=40, branches=("mlstm",)),
    "window": MixerConfig(window=40, branches=("window",)),
}
SAVED_ERROR = 0.02  # stated in docs/planning.md
ROWS, TOKENS = 2, 200
WORK_ERROR = 0.01
Make = Callable[..., CausalLM]
Facts = Callable[[str], Architecture]


def saved_bytes(run: Callable[[], object], models: list[CausalLM]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept.setdefault(address, tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3"])
def test_saved_activations_of_stage_two(
    tiny_teacher: Make, small_batch: Any, family: str, precision: Any, mixer: MixerConfig
) -> None:
    measured = []
    for layers in (1, 2):
        # Bounded logits would be kept, and the loss makes none.
        teacher = tiny_teacher(family, num_hidden_layers=layers, final_logit_softcapping=None)
        student = convert(teacher.bfloat16() if precision == "bf16" else teacher, mixer).train()
        batch = small_batch(ROWS, TOKENS)
        inputs = {
            "input_ids": batch.input_ids,
            "segment_ids": batch.segment_ids,
            "use_cache": False,
        }
        measured.append(saved_bytes(lambda s=student, i=inputs: s(**i), [student]))  # type: ignore[misc]
    a = architecture_of(teacher)
    forward = Pass(ROWS, TOKENS, precision, "torch", "cpu")
    assert layer_saved(a, mixer, forward).bytes(forward) == pytest.approx(
        measured[1] - measured[0], rel=SAVED_ERROR
    )
    outside = 2 * measured[0] - measured[1]
    assert outside_layers(a, forward).bytes(forward) == pytest.approx(outside, rel=SAVED_ERROR)


@pytest.mark.parametrize("attention", [{"layers": [1]}, {"heads": {1: [1]}}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_activations_where_attention_is_kept(
    tiny_teacher: Make, small_batch: Any, precision: Any, attention: dict[str, Any]
) -> None:
    teacher = tiny_teacher()
    mixer = MixerConfig(window=40, sinks=4, attention=attention)
    student = convert(teacher.bfloat16() if precision == "bf16" else teacher, mixer).train()
    batch = small_batch(ROWS, TOKENS)
    inputs = {"input_ids": batch.input_ids, "segment_ids": batch.segment_ids, "use_cache": False}
    measured = saved_bytes(lambda: student(**inputs), [student])
    a, forward = architecture_of(teacher), Pass(ROWS, TOKENS, precision, "torch", "cpu")
    planned = layers_saved(a, mixer, forward) + outside_layers(a, forward).bytes(forward)
    assert planned == pytest.approx(measured, rel=SAVED_ERROR)
    assert layers_saved(a, MIXERS["softmax"], forward) > layers_saved(a, mixer, forward)


OTHER_MLPS = [
    "qwen2_moe",
    "gpt_oss",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("mixtral", "starcoder2", "apertus")),
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3_moe", "gemma2", "gemma3_text")),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", OTHER_MLPS)
def test_saved_activations_of_families_with_other_mlps_and_norms(
    tiny_teacher: Make, small_batch: Any, family: str, precision: Any
) -> None:
    test_saved_activations_of_stage_two(
        tiny_teacher, small_batch, family, precision, MIXERS["softmax"]
    )


@pytest.mark.parametrize("mixer", ["softmax", "hedgehog", "mlstm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_activations_of_stage_one(
    tiny_teacher: Make, small_batch: Any, precision: Any, mixer: str
) -> None:
    measured = []
    for layers in (1, 2):
        teacher = tiny_teacher(num_hidden_layers=layers)
        teacher = teacher.bfloat16() if precision == "bf16" else teacher
        student = convert(teacher, MIXERS[mixer], share_weights=True).train()
        task = AlignObjective(student, teacher)
        measured.append(
            saved_bytes(lambda t=task: t(small_batch(ROWS, TOKENS)), [student, teacher])
        )  # type: ignore[misc]
    a = architecture_of(teacher)
    forward = Pass(ROWS, TOKENS, precision, "torch", "cpu")
    # The pass holds the teacher's heads, and autograd does not.
    heads = forward.compute * a.query_width * ROWS * TOKENS
    expected = measured[1] - measured[0] + heads
    assert mixer_saved(a, MIXERS[mixer], forward).bytes(forward) == pytest.approx(
        expected, rel=SAVED_ERROR
    )


@pytest.mark.parametrize("at_once", [100, 3])
def test_work_of_the_windows_gradient_on_a_gpu(
    facts: Facts, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Run on the CPU, what a GPU runs; all 16 blocks at once, and then 3 of them."""
    H, G, D, T, sinks, L = 4, 2, 32, 1024, 4, 64
    scores = H * L * (sinks + 2 * L - 1)  # of a block
    for module in (window, work):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once * scores)
    q, k, v, out, dout = (torch.randn(1, heads, T, D) for heads in (H, G, G, H, H))

    def step() -> None:
        bands = window.Bands.of(q, k, v, None, L, sinks)
        blocks = (window._blocks(x, G, L) for x in (dout, out))
        window._attention_grads(bands, *blocks, 1.0)

    a = replace(facts("llama-3.1-8b"), heads=H, groups=G, head_dim=D)
    forward, mixer = Pass(1, T, "fp32", "torch"), MixerConfig(window=L, sinks=sinks)
    assert window_work(a, mixer, forward) == pytest.approx(allocated_peak(step), rel=WORK_ERROR)
    assert window_work(a, mixer, replace(forward, backend="triton")) == 0


# Rows of many parts, many rows in one part, heads of their own, rows of one block.
@pytest.mark.parametrize(
    ("rows", "T", "G", "W"),
    [(1, 2048, 2, 64), (5, 100, 2, 20), (2, 700, 4, 300), (8, 16, 2, 9)],
)
def test_work_of_the_windows_gradient_on_a_cpu(
    facts: Facts, rows: int, T: int, G: int, W: int
) -> None:
    H, D, sinks = 4, 32, 4
    q, k, v, dout = (torch.randn(rows, heads, T, D) for heads in (H, G, G, H))
    settings = (torch.zeros(rows, T, dtype=torch.int64), W, sinks, 0.2)
    out, sums = window.forward(q, k, v, *settings)
    a = replace(facts("llama-3.1-8b"), heads=H, groups=G, head_dim=D)
    forward, mixer = Pass(rows, T, "fp32", "torch", "cpu"), MixerConfig(window=W, sinks=sinks)
    found = allocated_peak(
        lambda: window.backward(dout, q, k, v, settings[0], out, sums, *settings[1:])
    )
    assert window_work(a, mixer, forward) == pytest.approx(found, rel=WORK_ERROR)
    assert window_work(a, mixer, replace(forward, backend="triton")) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_of_the_gradient_of_a_softmax_of_a_familys_own(
    facts: Facts, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    H, G, D, T, sinks, W = 8, 2, 32, 1024, 4, 192
    for module in (bounded, work):
        monkeypatch.setattr(module, "QUERIES_MAX", 128)
    q, k, v, out, dout = (torch.randn(1, n, T, D).to(dtype) for n in (H, G, G, H, H))
    given = (None, torch.zeros(H), out, torch.zeros(1, H, T), W, sinks, 1.0, 2.0)
    a = replace(facts("llama-3.1-8b"), heads=H, groups=G, head_dim=D, own_softmax=True)
    mixer = MixerConfig(window=W, sinks=sinks)
    for device in ("cpu", "cuda"):
        precision: Any = "fp32" if dtype == torch.float32 else "bf16"
        forward = Pass(1, T, precision, "torch", device)
        found = allocated_peak(lambda: bounded.backward(dout, q, k, v, *given))
        assert window_work(a, mixer, forward) == pytest.approx(found, rel=0.1)


# Many parts; few features beside a chunk's tokens; large states beside short rows; 16 bits.
@pytest.mark.parametrize(
    ("rows", "T", "G", "D", "dtype"),
    [
        (1, 4096, 4, 64, torch.float32),
        (4, 2048, 4, 16, torch.float32),
        (4, 128, 2, 128, torch.float32),
        (2, 1024, 4, 64, torch.bfloat16),
    ],
)
def test_work_of_the_mlstms_gradient_on_a_cpu(
    facts: Facts, rows: int, T: int, G: int, D: int, dtype: torch.dtype
) -> None:
    H = 4
    q, k, v = (torch.rand(rows, n, T, D).to(dtype).requires_grad_() for n in (H, H, G))
    i, f = (torch.zeros(rows, H, T, requires_grad=True) for _ in range(2))
    h = mlstm(q, k, v, i, f)
    dh = torch.rand(h.shape).to(dtype)
    found = allocated_peak(lambda: torch.autograd.grad(h, (q, k, v, i, f), dh))
    a = replace(facts("llama-3.1-8b"), heads=H, groups=G, head_dim=D)
    precision: Any = "fp32" if dtype == torch.float32 else "bf16"
    forward = Pass(rows, T, precision, "torch", "cpu")
    assert work.mlstm_work(a, MIXERS["mlstm"], forward) == pytest.approx(found, rel=0.02)


def test_parts_and_chunks_are_those_of_the_mlstm() -> None:
    sections = {"cpu": chunkwise.SECTION_CPU, "cuda": chunkwise.SECTION_GPU}
    assert sections == work.SECTION
    cpu, gpu = (Pass(1, 4096, "fp32", "torch", device) for device in ("cpu", "cuda"))
    assert (cpu.chunk, gpu.chunk) == (chunkwise.CHUNK_CPU, chunkwise.CHUNK_GPU)
    for Dk, Dv in ((16, 16), (128, 32), (64, 64), (256, 128), (512, 512)):
        for device in ("cpu", "cuda"):
            assert work.span_of(device, Dk, Dv) == chunkwise.span_of(device, Dk, Dv)


def test_blocks_and_scores_are_those_of_the_window() -> None:
    limits = ("BLOCK_MIN", "BLOCK_MAX", "SCORES_AT_ONCE")
    assert [getattr(work, n) for n in limits] == [getattr(window, n) for n in limits]
    assert work.NUMBERS_AT_ONCE == window_cpu.NUMBERS_AT_ONCE
    limits = ("QUERIES_MAX", "SCORES_MAX")
    assert [getattr(work, n) for n in limits] == [getattr(bounded, n) for n in limits]


def test_a_layer_in_plain_torch_needs_the_windows_scores_beside_what_it_saved(facts: Facts) -> None:
    """Llama-3.1-8B: 25 blocks' scores of 32, three fp32 copies; the mLSTM works with less."""
    a, forward = facts("llama-3.1-8b"), Pass(1, 4096, "bf16", "torch")
    scores = 3 * 4 * 25 * 32 * 128 * (4 + 128 + 511)
    assert scores < window_work(a, MixerConfig(), forward) < 1.3 * scores
    # As docs/planning.md says.
    assert work.mlstm_work(a, MixerConfig(), forward) == pytest.approx(655e6, rel=0.01)
    assert layer_excess(a, MixerConfig(), forward) == pytest.approx(359e6, rel=0.01)
    assert layer_excess(a, MixerConfig(), replace(forward, backend="triton")) == 0
