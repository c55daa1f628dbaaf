"""What the benchmark can time: operators and backends, each with its reference.

An entry is timed only where it agrees with the reference.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels import peers
from xlstm_kernels.api import hybrid_step, mlstm, mlstm_step, sliding_window_attention
from xlstm_kernels.benchmarks.report import BOTH, FORWARD
from xlstm_kernels.dispatch import Backend, triton_refuses
from xlstm_kernels.reference import mlstm_reference, sliding_window_reference
from xlstm_kernels.segments import document_runs, document_starts
from xlstm_kernels.state import MLSTMState, Ring, held_positions
from xlstm_kernels.testing import random_segments, random_state
from xlstm_kernels.toolchain import numbers

DENSE_LIMIT = 4096  # the dense baseline holds T x T scores per head
CAUSAL_LIMIT = 65536  # full causal attention is quadratic in time
# The oldest version of a peer that is timed, by its module, and the packages that bring it.
OLDEST = {"fla": (("flash-linear-attention", "fla-core"), "0.5.2")}
# Tokens of a chunk in the count of the mLSTM's operations, whatever a backend uses.
COUNTED_CHUNK = 64


class Shape(NamedTuple):
    """Shape of a benchmark.

    document: mean tokens of a document; 0 for one document a row.
    """

    batch: int
    tokens: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    window: int
    sinks: int
    document: int


class Inputs(NamedTuple):
    """Tensors by name, the documents of the rows, and what decoding updates in place."""

    x: dict[str, Tensor]
    ids: Tensor | None
    state: MLSTMState
    ring: Ring

    def copied(self, dtype: torch.dtype | None = None) -> Inputs:
        """Copy everything as leaves, floats in another dtype if one is given.

        Decoding may then change the state and the ring of the copy.
        """

        def copy(tensor: Tensor) -> Tensor:
            converts = dtype is not None and tensor.is_floating_point()
            copied = tensor.detach().to(dtype if converts else tensor.dtype, copy=True)
            return copied.requires_grad_(tensor.requires_grad)

        x = {name: copy(tensor) for name, tensor in self.x.items()}
        return Inputs(x, self.ids, MLSTMState(*map(copy, self.state)), Ring(*map(copy, self.ring)))


# Leaves that get gradients, and the call that is timed.
Prepared = tuple[list[Tensor], Callable[[], Tensor]]


class Entry(NamedTuple):
    """An operator of one backend, as a line of the table.

    reads: the inputs with gradients; decoding has none. needs: module that must be installed.
    packs: takes packed documents. longest: most tokens that it is run with. prepare: of what is
    timed as it is and compared with nothing (`benchmarks.native`); it has no run and no reference.
    """

    operator: str
    backend: str
    run: Callable[[Inputs, Shape], Tensor] | None
    reference: Callable[[Inputs, Shape], Tensor] | None
    reads: tuple[str, ...] = ()
    needs: str | None = None
    cuda_only: bool = False
    packs: bool = True
    longest: int | None = None
    prepare: Callable[[Inputs, Shape], Prepared] | None = None

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed; decoding has no gradients."""
        return (FORWARD, BOTH) if self.reads or self.prepare else (FORWARD,)

    def skipped(self, shape: Shape, inputs: Inputs) -> str | None:
        """Say why this entry cannot run here; None if it can."""
        device = inputs.x["q"].device.type
        if self.needs and (reason := peers.missing(self.needs) or too_old(self.needs)):
            return reason
        if self.cuda_only and device != "cuda":
            return f"needs a CUDA device; this is {device}"
        if self.backend.startswith("triton"):
            dims = {"Dk": shape.key_dim, "Dv": shape.value_dim}
            if reason := triton_refuses((inputs.x["q"],), dims, shape.sinks):
                return reason
        if shape.document and not self.packs:
            return "takes no packed documents; use --document 0"
        if self.longest is not None and shape.tokens > self.longest:
            return f"not run beyond {self.longest} tokens"
        return None


def too_old(module: str) -> str | None:
    """Say that a module's package is too old to be compared with; None if it is not."""
    if module not in OLDEST:
        return None
    packages, least = OLDEST[module]
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            if numbers(version) >= numbers(least):
                return None
            return f"{package} {version} is too old; bring {least} or newer"
    return f"the version of {module} is not known; install {packages[0]} {least} or newer"


def draw(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Draw inputs from a seed.

    Queries and keys of the attention have the width of the values; decoding reads the first token.
    """
    B, T, H, G, Dk, Dv = shape[:6]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x = {
        "q": (2 * normal(B, H, T, Dk)).softmax(dim=-1).to(dtype),
        "k": (2 * normal(B, H, T, Dk)).softmax(dim=-1).to(dtype),
        "v": normal(B, G, T, Dv).to(dtype),
        "i": normal(B, H, T),
        "f": normal(B, H, T) + 2.0,
        "queries": normal(B, H, T, Dv).to(dtype),
        "keys": normal(B, G, T, Dv).to(dtype),
    }
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    ids = random_segments(B, T, mean_length=shape.document).to(device) if shape.document else None
    fields = random_state(B, H, Dk, Dv).items()
    state = MLSTMState(**{name: tensor.detach().to(device) for name, tensor in fields})
    return Inputs(x, ids, state, full_ring(shape, device, dtype))


def full_ring(shape: Shape, device: torch.device, dtype: torch.dtype) -> Ring:
    """Make the ring of documents of which N + W tokens have been seen."""
    W, N, dim = shape.window, shape.sinks, shape.value_dim
    empty = Ring.empty(
        shape.batch, shape.groups, dim, dim, window=W, sinks=N, dtype=dtype, device=device
    )
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(empty.keys.shape, generator=generator).to(empty.keys)
    values = torch.randn(empty.values.shape, generator=generator).to(empty.values)
    return Ring(keys, values, torch.full_like(empty.lengths, N + W))


def run_mlstm(backend: Backend) -> Callable[[Inputs, Shape], Tensor]:
    """Make the call of `mlstm` with a backend."""

    def run(a: Inputs, shape: Shape) -> Tensor:
        return mlstm(*(a.x[n] for n in GATED), segment_ids=a.ids, backend=backend)

    return run


def run_cut(cut: int) -> Callable[[Inputs, Shape], Tensor]:
    """Make the call of the Triton mLSTM with so many super-chunks a row, or as many as it has."""

    def run(a: Inputs, shape: Shape) -> Tensor:
        from xlstm_kernels.triton.mlstm import mlstm_triton

        x = (a.x[n] for n in GATED)
        return mlstm_triton(*x, segment_ids=a.ids, state=None, cut=cut)[0]

    return run


def run_window(backend: Backend) -> Callable[[Inputs, Shape], Tensor]:
    """Make the call of `sliding_window_attention` with a backend."""

    def run(a: Inputs, shape: Shape) -> Tensor:
        return sliding_window_attention(
            *(a.x[n] for n in ATTENDED), segment_ids=a.ids,
            window=shape.window, sinks=shape.sinks, backend=backend,
        )  # fmt: skip

    return run


def run_step(backend: Backend) -> Callable[[Inputs, Shape], Tensor]:
    """Make the call of `mlstm_step` with a backend."""

    def run(a: Inputs, shape: Shape) -> Tensor:
        token: dict[str, Any] = {n: a.x[n].detach()[:, :, 0] for n in GATED}
        return mlstm_step(**token, state=a.state, backend=backend)

    return run


def run_hybrid(backend: Backend) -> Callable[[Inputs, Shape], Tensor]:
    """Make the call of `hybrid_step` with a backend; the gate is one half."""

    def run(a: Inputs, shape: Shape) -> Tensor:
        queries, keys, v, q, k, i, f = (
            a.x[n].detach()[:, :, 0] for n in (*ATTENDED, "q", "k", "i", "f")
        )
        gate = torch.full_like(i, 0.5)
        return hybrid_step(
            queries, keys, v, q, k, i, f, gate, a.state, a.ring,
            sinks=shape.sinks, backend=backend,
        )  # fmt: skip

    return run


def mlstm_truth(a: Inputs, shape: Shape) -> Tensor:
    """Run the recurrent reference."""
    return mlstm_reference(*(a.x[n] for n in GATED), segment_ids=a.ids)[0]


def siging_truth(a: Inputs, shape: Shape) -> Tensor:
    """Run the recurrent reference with sigmoid input gates."""
    x = a.x | {"i": F.logsigmoid(a.x["i"])}
    return mlstm_reference(*(x[n] for n in GATED), segment_ids=a.ids)[0]


def window_truth(a: Inputs, shape: Shape) -> Tensor:
    """Run the per-query reference."""
    return sliding_window_reference(
        *(a.x[n] for n in ATTENDED), window=shape.window, sinks=shape.sinks, segment_ids=a.ids
    )


def causal_truth(a: Inputs, shape: Shape) -> Tensor:
    """Run the per-query reference of attention to the whole document."""
    return sliding_window_reference(
        *(a.x[n] for n in ATTENDED), window=shape.tokens, sinks=0, segment_ids=a.ids
    )


def step_truth(a: Inputs, shape: Shape) -> Tensor:
    """Run the recurrent reference of one token, from the state."""
    return mlstm_reference(*(a.x[n].detach()[:, :, :1] for n in GATED), state=a.state)[0][:, :, 0]


def hybrid_truth(a: Inputs, shape: Shape) -> Tensor:
    """Run the references of one token: half the recurrent one, half the per-query one.

    The per-query reference attends to the tokens of the ring, in order, and to the new one.
    """
    queries, keys, values = (a.x[n].detach()[:, :, :1] for n in ATTENDED)
    held = held_positions(a.ring.lengths, shape.window, shape.sinks)
    order = held.argsort(dim=1)[:, None, :, None]
    k = torch.cat([a.ring.keys.gather(2, order.expand_as(a.ring.keys)), keys], dim=2)
    v = torch.cat([a.ring.values.gather(2, order.expand_as(a.ring.values)), values], dim=2)
    q = torch.zeros_like(queries).expand(-1, -1, k.shape[2] - 1, -1)
    attended = sliding_window_reference(
        torch.cat([q, queries], dim=2), k, v, window=shape.window, sinks=shape.sinks
    )
    return (attended[:, :, -1] + step_truth(a, shape)) / 2


def dense_window(a: Inputs, shape: Shape) -> Tensor:
    """Compute the same attention from a full T x T mask: the baseline, quadratic in T."""
    q, k, v = (a.x[n] for n in ATTENDED)
    tokens, ids = v.shape[2], a.ids
    if ids is None:
        ids = torch.zeros(shape.batch, tokens, dtype=torch.int64, device=v.device)
    runs, t = document_runs(ids), torch.arange(tokens, device=v.device)
    is_sink = t - document_starts(runs) < shape.sinks
    near = (t[:, None] - t < shape.window) | is_sink[:, None, :]
    same_document = runs[:, :, None] == runs[:, None, :]
    mask = (same_document & near & (t <= t[:, None])).unsqueeze(1)
    k, v = (x.repeat_interleave(shape.heads // shape.groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def full_causal(a: Inputs, shape: Shape) -> Tensor:
    """Full causal attention, torch's fastest (flash on a GPU)."""
    q, k, v = (a.x[n] for n in ATTENDED)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def run_peer(kernel: str) -> Callable[[Inputs, Shape], Tensor]:
    """Make the call of a kernel of mlstm_kernels with a column of ones."""

    def run(a: Inputs, shape: Shape) -> Tensor:
        return peers.mlstm_ones_column(*(a.x[n] for n in GATED), kernel=kernel)

    return run


def run_siging(a: Inputs, shape: Shape) -> Tensor:
    """Call mlstm_kernels with sigmoid input gates, not normalised by itself."""
    kernel = "triton_xl_chunk_siging"
    return peers.mlstm_ones_column(*(a.x[n] for n in GATED), kernel=kernel, normalize=False)


def run_gla(a: Inputs, shape: Shape) -> Tensor:
    """Call flash-linear-attention's simple GLA with a column of ones."""
    return peers.simple_gla_ones_column(*(a.x[n] for n in GATED))


def run_flex(a: Inputs, shape: Shape) -> Tensor:
    """Call compiled flex_attention."""
    q, k, v = (a.x[n] for n in ATTENDED)
    return peers.flex_window(q, k, v, shape.window, shape.sinks, a.ids)


# Names of the inputs of the mLSTM and of attention, in the order of their arguments.
GATED = ("q", "k", "v", "i", "f")
ATTENDED = ("queries", "keys", "v")


def peer_entry(
    backend: str, run: Callable[[Inputs, Shape], Tensor], truth: Callable[[Inputs, Shape], Tensor]
) -> Entry:
    """Make the line of another library's mLSTM; `backend` starts with the library's module."""
    return Entry(
        "mlstm", backend, run, truth, GATED, needs=backend.split()[0], cuda_only=True, packs=False
    )


ENTRIES: tuple[Entry, ...] = (
    Entry("mlstm", "torch", run_mlstm("torch"), mlstm_truth, GATED),
    Entry("mlstm", "triton", run_mlstm("triton"), mlstm_truth, GATED),
    peer_entry("mlstm_kernels xl_chunk", run_peer("triton_xl_chunk"), mlstm_truth),
    peer_entry("mlstm_kernels limit_chunk", run_peer("triton_limit_chunk"), mlstm_truth),
    peer_entry("mlstm_kernels siging", run_siging, siging_truth),
    peer_entry("fla simple_gla", run_gla, mlstm_truth),
    *(
        Entry("mlstm super-chunks", f"triton {cut}", run_cut(cut), mlstm_truth, GATED)
        for cut in (1, 2, 4, 8)
    ),
    Entry("window", "torch", run_window("torch"), window_truth, ATTENDED),
    Entry("window", "triton", run_window("triton"), window_truth, ATTENDED),
    Entry("window", "flex_attention", run_flex, window_truth, ATTENDED, cuda_only=True),
    Entry("window", "dense mask", dense_window, window_truth, ATTENDED, longest=DENSE_LIMIT),
    Entry("causal", "sdpa", full_causal, causal_truth, ATTENDED, packs=False, longest=CAUSAL_LIMIT),
    Entry("mlstm step", "torch", run_step("torch"), step_truth),
    Entry("mlstm step", "triton", run_step("triton"), step_truth),
    Entry("hybrid step", "torch", run_hybrid("torch"), hybrid_truth),
    Entry("hybrid step", "triton", run_hybrid("triton"), hybrid_truth),
)


def work(entry: Entry, shape: Shape, bytes_each: int, backward: bool) -> tuple[float, float]:
    """Count the least operations and bytes of a call, the same for every backend.

    Operations: of the chunkwise mLSTM in chunks of 64; of attention over the keys seen; backward,
    2.5 times as many. Bytes: every input and output once; backward, also dh and the gradients; in
    decoding, the state read and written, and the ring read.
    """
    B, T, H, G, Dk, Dv, W, N, _ = shape
    if entry.operator.endswith("step"):
        state = 2 * 4 * B * H * (Dk * Dv + Dk)
        ring = 2 * bytes_each * B * G * (W + N) * Dv if entry.operator.startswith("hybrid") else 0
        return 4.0 * B * H * Dk * Dv, float(state + ring)
    rows = B * T
    if entry.operator.startswith("mlstm"):
        operations = rows * H * (4 * Dk * Dv + COUNTED_CHUNK * (Dk + Dv))
        sizes = rows * (2 * H * Dk + G * Dv + 2 * H), rows * H * Dv
    else:
        seen = (T + 1) / 2 if entry.operator == "causal" else min((T + 1) / 2, W + N)
        operations = int(rows * H * 4 * Dv * seen)
        sizes = rows * (H + 2 * G) * Dv, rows * H * Dv
    inputs, outputs = sizes
    forward = float(operations), float(bytes_each * (inputs + outputs))
    if not backward:
        return forward
    return 3.5 * forward[0], forward[1] + bytes_each * float(2 * inputs + 2 * outputs)
