"""Launch settings by (bytes of a dot operand, head dim); written by `python -m xlstm_kernels.tune` or by hand."""

# Chosen from registers, spills and shared memory of the compiled kernels; not yet from times on a GPU.
MEASURED_ON: str | None = None

# chunk, then (block_k, block_v, warps, stages) of: states, output, state grads, query and key grads, value grads
MLSTM: dict[tuple[int, int], tuple] = {
    (2, 32): (64, (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (2, 64): (64, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)),
    (2, 128): (64, (64, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)),
    (2, 256): (64, (64, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)),
    (4, 32): (32, (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    (4, 64): (32, (32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (32, 64, 4, 1)),
    (4, 128): (32, (32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (32, 64, 4, 1)),
    (4, 256): (32, (32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (32, 64, 4, 1)),
}

# block, forward warps and stages, backward warps and stages
WINDOW: dict[tuple[int, int], tuple[int, int, int, int, int]] = {
    (2, 32): (64, 4, 2, 4, 2),
    (2, 64): (64, 4, 2, 4, 2),
    (2, 128): (64, 4, 2, 4, 2),
    (2, 256): (32, 4, 2, 4, 2),
    (4, 32): (32, 4, 1, 4, 1),
    (4, 64): (32, 4, 1, 4, 1),
    (4, 128): (32, 4, 1, 4, 1),
    (4, 256): (16, 4, 1, 4, 1),
}
