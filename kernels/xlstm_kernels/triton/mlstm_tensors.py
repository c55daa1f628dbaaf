"""What the passes of the chunkwise mLSTM hand to each other: tensors by name, and sizes.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from xlstm_kernels.triton.common import dot_format
from xlstm_kernels.triton.configs import Launch, MLSTMConfig, TokenLaunch, super_chunks

# h, the final C, n and m, and what `Kept` has: one by one, as a registered operator's results.
Results = tuple[
    Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor,
]  # fmt: skip


class Inputs(NamedTuple):
    """What both passes read of the arguments.

    centre (B, G, Dv): the common component, subtracted from v (B, G, T, Dv). v_max (B, G, chunks):
    the largest of what is left, without its sign. C0_max (B, H, Dk): bound of the rows of the
    initial C, of the centred values. C0, n0, m0: the initial state. runs (B, T): the documents of
    each row, numbered; None for one document a row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    centre: Tensor
    v_max: Tensor
    C0_max: Tensor
    C0: Tensor
    n0: Tensor
    m0: Tensor
    runs: Tensor | None


class Gates(NamedTuple):
    """What the kernels read of the gates, each (B, H, T).

    i, f: preactivations. sum_high + sum_low: sum of log f from the start of the token's chunk.
    max_log_weight: largest log-weight that a token of the chunk has at this token.
    """

    i: Tensor
    f: Tensor
    sum_high: Tensor
    sum_low: Tensor
    max_log_weight: Tensor


class Rows(NamedTuple):
    """What the backward kernels read of each token.

    dh (B, H, T, Dv); and (B, H, T): the denominator, dh . h, the largest |dh|, the stabiliser.
    """

    dh: Tensor
    den: Tensor
    dh_h: Tensor
    dh_max: Tensor
    m: Tensor


class States(NamedTuple):
    """C and n as they enter each chunk, or their gradients as they leave it.

    C (B H, chunks, Dk, Dv) in units of scale (B H, chunks, Dk), a power of two; n (B H, chunks, Dk)
    in float32. So C in float16 has the range of float32.
    """

    C: Tensor
    scale: Tensor
    n: Tensor

    @classmethod
    def empty(cls, sizes: Sizes, device: torch.device, wanted: bool = True) -> States:
        """Make room for them; none if they are not wanted."""
        shape = (sizes.B * sizes.H if wanted else 0, sizes.chunks, sizes.Dk)
        C = torch.empty(*shape, sizes.Dv, dtype=sizes.kept, device=device)
        return cls(C, torch.empty(shape, device=device), torch.empty(shape, device=device))


class Ends(NamedTuple):
    """What each super-chunk adds to the state at its end, or to the gradient of that at its start.

    C (B H, super-chunks - 1, Dk, Dv); n and bound, that of |C|, (B H, super-chunks - 1, Dk). The
    sum of log f (B H, super-chunks - 1) in float64. All but the last super-chunk have one; of
    gradients, all but the first.
    """

    C: Tensor
    n: Tensor
    bound: Tensor
    log_f: Tensor

    @classmethod
    def empty(cls, sizes: Sizes, launch: Launch, device: torch.device) -> Ends:
        """Make room for them."""
        shape = (sizes.B * sizes.H, sizes.super_chunks(launch) - 1)
        C = torch.empty(*shape, sizes.Dk, sizes.Dv, device=device)
        n, bound = (torch.empty(*shape, sizes.Dk, device=device) for _ in range(2))
        return cls(C, n, bound, torch.empty(shape, dtype=torch.float64, device=device))


def named_ends(ends: Ends | None, prefix: str = "") -> dict[str, Tensor | None]:
    """Name them as kernels do: end_C_ptr, end_n_ptr, end_bound_ptr and end_log_f_ptr."""
    return {f"end_{prefix}{name}_ptr": getattr(ends, name, None) for name in Ends._fields}


class GateParts(NamedTuple):
    """What `gate_grad_kernel` adds up; each (B, H, T) but two. Gradients of log-weights.

    d_read, d_write: with which a token reads the state that enters its chunk, and is written to the
    one that leaves. d_earlier: with which it reads the tiles of its chunk before its own. d_keys
    (B, H, L / BT, T): with which the queries of each tile of its chunk read it. d_inside: the
    gradient of log f from pairs of its tile. d_pass (B, H, chunks): <C, dC> of a chunk.
    """

    d_read: Tensor
    d_write: Tensor
    d_earlier: Tensor
    d_keys: Tensor
    d_inside: Tensor
    d_pass: Tensor

    @classmethod
    def empty(cls, sizes: Sizes, device: torch.device) -> GateParts:
        """Make room for them."""
        B, H, T = sizes.B, sizes.H, sizes.T
        row = (B, H, T)
        shapes = (row, row, row, (B, H, sizes.chunk // sizes.tile, T), row, (B, H, sizes.chunks))
        return cls(*(torch.empty(shape, device=device) for shape in shapes))


class Kept(NamedTuple):
    """What the backward pass reads of the forward pass, beside the arguments.

    h_centred: h less the centre, in units of h_scale (B, H, parts of Dv, T), which are powers of
    two; empty where nothing requires gradients. C, C_scale, n: the `States`; empty where they are
    computed again. The rest: `Inputs`, `Gates` and `Rows`.
    """

    centre: Tensor
    v_max: Tensor
    C0_max: Tensor
    sum_high: Tensor
    sum_low: Tensor
    max_log_weight: Tensor
    h_centred: Tensor
    h_scale: Tensor
    den: Tensor
    m: Tensor
    C: Tensor
    C_scale: Tensor
    n: Tensor

    @property
    def states(self) -> States | None:
        """The states that enter the chunks, if they were kept."""
        return States(self.C, self.C_scale, self.n) if self.C.numel() else None


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which h of values of a dtype is kept: it has as many bytes."""
    return torch.float32 if dtype == torch.float32 else torch.float16


class Sizes(NamedTuple):
    """Sizes of a call, and the compile-time settings that follow from it."""

    B: int
    H: int
    G: int
    T: int
    Dk: int
    Dv: int
    chunks: int  # of a row
    chunk: int  # tokens of a chunk
    tile: int  # tokens of a tile of it
    segmented: bool
    kept: torch.dtype  # of the states kept per chunk
    dot: tl.dtype  # of the operands of products
    precision: str
    cut: int = 0  # most super-chunks of a row; 0: as many as `processors` need
    processors: int = 0  # SMs of the device; 0 on a CPU

    def head_settings(self, launch: Launch) -> dict[str, Any]:
        """Return the keyword arguments that all kernels with tiles of features share."""
        block_k, block_v, warps, stages = launch
        return self._settings() | {
            "BK": block_k, "BV": block_v, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip

    def token_settings(self, launch: TokenLaunch) -> dict[str, Any]:
        """Return those of the tokens' gradients."""
        columns, depth, warps, stages = launch
        return self._settings() | {
            "COLUMNS": columns, "DEPTH": depth, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        return {
            "SEGMENTED": self.segmented, "PRECISION": self.precision, "DOT": self.dot,
            "L": self.chunk, "BT": self.tile, "DK": self.Dk, "DV": self.Dv,
        }  # fmt: skip

    @property
    def token_tiles(self) -> int:
        """Count the tiles of the tokens of all heads, those past the end of a row included."""
        return self.B * self.H * self.chunks * (self.chunk // self.tile)

    def state_tiles(self, launch: Launch) -> int:
        """Count the tiles of the states of all heads."""
        return self.B * self.H * (self.Dk // launch.block_k) * (self.Dv // launch.block_v)

    def span(self, launch: Launch) -> int:
        """Count the chunks of a super-chunk, which is a whole row where its heads are many."""
        wanted = self.cut or super_chunks(self.state_tiles(launch), self.chunks, self.processors)
        return -(-self.chunks // min(wanted, self.chunks))

    def super_chunks(self, launch: Launch) -> int:
        """Count the super-chunks of a row; none is empty, so they may be fewer than asked for."""
        return -(-self.chunks // self.span(launch))


def sizes_of(q: Tensor, v: Tensor, segmented: bool, config: MLSTMConfig, cut: int = 1) -> Sizes:
    """Return the sizes of a call; cut: of `Sizes`."""
    (B, H, T, Dk), (G, Dv) = q.shape, (v.shape[1], v.shape[3])
    chunk, tile = config[:2]
    processors = 0
    if cut == 0 and q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    chunks, formats = -(-T // chunk), dot_format(q.dtype)
    return Sizes(B, H, G, T, Dk, Dv, chunks, chunk, tile, segmented, *formats, cut, processors)
