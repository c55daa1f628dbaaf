"""Values and gradients of all settings that the table holds or the tuner can choose, in float64.

Warps and stages do not change what the interpreter computes; chunks, blocks and tiles do. The
settings come from the table and from the tuner's own lists: a new one is tested without a change
here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from itertools import starmap
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from xlstm_kernels.dispatch import HEAD_DIMS
from xlstm_kernels.state import MLSTMState
from xlstm_kernels.testing import (
    error_ratio,
    outputs_and_grads,
    random_inputs,
    random_state,
    to_float64,
)
from xlstm_kernels.torch.chunkwise import mlstm_chunkwise
from xlstm_kernels.torch.window import banded_attention

pytest.importorskip("triton")
from xlstm_kernels.benchmarks import candidates
from xlstm_kernels.triton.configs import (
    Launch,
    MLSTMConfig,
    TokenLaunch,
    WindowConfig,
    mlstm_config,
)
from xlstm_kernels.triton.mlstm import mlstm_triton
from xlstm_kernels.triton.table import WINDOW
from xlstm_kernels.triton.window import window_triton

pytestmark = pytest.mark.usefixtures("poisoned")
BOUND = 1e-5
WARPS, STAGES, SINKS = 4, 1, 3
KERNELS = MLSTMConfig._fields[2:]
AnyLaunch = Launch | TokenLaunch
Tensors = dict[str, Tensor]


class Tiles(NamedTuple):
    """A kernel's part of a setting; more_k, more_v: whether a head has more than one of its tiles.

    That, and not how many, takes other branches.
    """

    chunk: int
    tile: int
    kernel: str
    block_k: int
    block_v: int
    more_k: bool
    more_v: bool

    @classmethod
    def of(cls, chunk: int, tile: int, kernel: str, launch: AnyLaunch, dim: int) -> Tiles:
        block_k, block_v = (min(block, dim) for block in launch[:2])
        return cls(chunk, tile, kernel, block_k, block_v, block_k < dim, block_v < dim)

    @property
    def smallest(self) -> tuple[int, int, int, int]:
        """The chunk and its tile, and the smallest Dk and Dv that have these tiles."""
        Dk, Dv = self.block_k * (1 + self.more_k), self.block_v * (1 + self.more_v)
        if self.kernel == "token_grads":  # columns and depth are those of both dims
            Dk = Dv = max(Dk, Dv)
        return self.chunk, self.tile, Dk, Dv


def of_table() -> set[Tiles]:
    found = set()
    for dtype, dim in itertools.product((torch.bfloat16, torch.float32), HEAD_DIMS):
        chunk, tile, *launches = mlstm_config(dtype, dim, dim)
        pairs = zip(KERNELS, launches, strict=True)
        found |= {Tiles.of(chunk, tile, kernel, launch, dim) for kernel, launch in pairs}
    return found


def of_tuner() -> set[Tiles]:
    found = set()
    for dim in HEAD_DIMS:
        chunks, tiles, *kernels = candidates.mlstm_space(dim).values()
        for chunk, tile, (kernel, launches) in itertools.product(
            chunks, tiles, zip(KERNELS, kernels, strict=True)
        ):
            found |= {Tiles.of(chunk, tile, kernel, launch, dim) for launch in launches}
    return found


def runs_of(wanted: set[Tiles]) -> Iterator[tuple[MLSTMConfig, int, int]]:
    """Yield a few calls, each with Dk and Dv, in which every kernel has all its wanted tiles.

    A kernel's tiles do not change what another one does, so not every combination is needed.
    """
    by_size: dict[tuple[int, int, int, int], dict[str, list[tuple[int, int]]]] = {}
    for tiles in sorted(wanted):
        blocks = by_size.setdefault(tiles.smallest, {}).setdefault(tiles.kernel, [])
        blocks.append((tiles.block_k, tiles.block_v))
    for (chunk, tile, Dk, Dv), kernels in by_size.items():
        lists = [kernels.get(kernel, [(Dk, Dv)]) for kernel in KERNELS]
        for n in range(max(map(len, lists))):
            *launches, last = ((*each[n % len(each)], WARPS, STAGES) for each in lists)
            yield MLSTMConfig(chunk, tile, *starmap(Launch, launches), TokenLaunch(*last)), Dk, Dv


def row_of(chunk: int) -> tuple[int, Tensor]:
    """Two chunks, the second of which ends early; a document begins in each of them."""
    tokens = chunk + 5
    ids = torch.zeros(1, tokens, dtype=torch.long)
    ids[:, chunk - 7 :] = 1
    ids[:, chunk + 2 :] = 2
    return tokens, ids


def check_mlstm(config: MLSTMConfig, Dk: int, Dv: int, device: str) -> None:
    tokens, ids = row_of(config.chunk)
    drawn = random_inputs(1, 1, tokens, Dk, Dv) | random_state(1, 1, Dk, Dv, seed=3)

    def run(operator: Callable[..., Any], ids: Tensor, inputs: Tensors, **settings: Any) -> Tensors:
        def call(q, k, v, i, f, C, n, m) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
            state = MLSTMState(C, n, m)
            h, final = operator(q, k, v, i, f, segment_ids=ids, state=state, **settings)
            return h, final.C, final.n

        return outputs_and_grads(call, inputs)

    # The torch operator has tests of its own against the recurrence.
    truth = run(mlstm_chunkwise, ids, to_float64(drawn))
    inputs = {
        name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in drawn.items()
    }
    found = run(mlstm_triton, ids.to(device), inputs, config=config)
    ratios = {name: error_ratio(found[name].cpu(), expected) for name, expected in truth.items()}
    assert all(ratio < BOUND for ratio in ratios.values()), (config, ratios)


def test_the_mlstm_is_right_with_all_tiles_of_the_table(device: str) -> None:
    for config, Dk, Dv in runs_of(of_table()):
        check_mlstm(config, Dk, Dv, device)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "Dk", "Dv"), list(runs_of(of_tuner() - of_table())), ids=str)
def test_the_mlstm_is_right_with_all_tiles_that_the_tuner_tries(
    device: str, config: MLSTMConfig, Dk: int, Dv: int
) -> None:
    check_mlstm(config, Dk, Dv, device)


def test_nothing_that_the_tuner_tries_is_left_out() -> None:
    covered = set()
    for config, Dk, Dv in itertools.chain(runs_of(of_table()), runs_of(of_tuner() - of_table())):
        for kernel, (block_k, block_v, *_) in zip(KERNELS, config[2:], strict=True):
            more = (block_k < Dk, block_v < Dv)
            covered.add(Tiles(*config[:2], kernel, block_k, block_v, *more))
    named = {launch: kernel for kernel, launch in candidates.KERNELS.items()}
    sizes = (HEAD_DIMS, candidates.CHUNKS, candidates.TOKENS)
    for dim, chunk, tile in itertools.product(*sizes):
        best = mlstm_config(torch.bfloat16, dim, dim)._replace(chunk=chunk, tile=tile)
        by_chunk, by_tile, *rounds = candidates.mlstm_rounds(dim)
        assert chunk in [config.chunk for config in by_chunk[0](best)]
        assert tile in [config.tile for config in by_tile[0](best)]
        for make, (launched,) in rounds:
            kernel = named[launched]
            launches = [getattr(config, kernel) for config in make(best)]
            tried = {Tiles.of(chunk, tile, kernel, launch, dim) for launch in launches}
            assert tried <= covered


def blocks_of(config: WindowConfig) -> tuple[int, int]:
    """The block, and the queries that the gradients of keys and values take at a time."""
    return config.block, min(config.key_grad_queries, config.block)


def blocks_of_the_tuner() -> set[tuple[int, int]]:
    """Those of all settings that the rounds of the window try, one after the other."""
    found = {WindowConfig(*settings) for settings in WINDOW.values()}
    for make, _ in candidates.window_rounds(128):
        for best in list(found):
            found.update(make(best))
    return {blocks_of(config) for config in found}


# Nothing else changes what the interpreter computes; the head dim is not cut into tiles.
OF_TABLE = {blocks_of(WindowConfig(*settings)) for settings in WINDOW.values()}
OTHERS = sorted(blocks_of_the_tuner() - OF_TABLE)


# The shorter window ends within the first of the queries that are taken at a time.
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    ("block", "queries"),
    [*sorted(OF_TABLE), *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)],
)
def test_the_window_is_right_with_all_blocks(
    device: str, block: int, queries: int, short: bool
) -> None:
    # Four blocks, of which the last ends early: band, interior, edge, and sinks before the band. A
    # document begins in the first block, and one in the last.
    tokens, window = 3 * block + 5, block + queries // 2 if short else 2 * block + 1
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    ids[:, 5:] = 1
    ids[:, 3 * block + 2 :] = 2
    draw = torch.Generator().manual_seed(block)
    inputs = {
        name: torch.randn(1, heads, tokens, 16, generator=draw).to(device).requires_grad_()
        for name, heads in (("q", 2), ("k", 1), ("v", 1))
    }
    config = WindowConfig(block, WARPS, STAGES, WARPS, STAGES, WARPS, queries)
    settings = {"window": window, "sinks": SINKS, "segment_ids": ids, "scale": 0.25}
    found = outputs_and_grads(lambda **x: window_triton(**x, **settings, config=config), inputs)
    truth = outputs_and_grads(lambda **x: banded_attention(**x, **settings), to_float64(inputs))
    ratios = {name: error_ratio(found[name], expected) for name, expected in truth.items()}
    assert all(ratio < BOUND for ratio in ratios.values()), (config, ratios)
