"""Launch settings by (bytes of a dot operand, head dim); the tuner writes this file."""

# The GPU on which these were the fastest forward + backward; None: chosen from registers, spills
# and shared memory of the compiled kernels, and not from times.
MEASURED_ON: str | None = None

# chunk and tile, then (block_k, block_v, warps, stages) of: states, output, state grads; and
# (columns, depth, warps, stages) of the tokens' grads
MLSTM: dict[tuple[int, int], tuple] = {
    (2, 32): (128, 64, (32, 32, 4, 2), (32, 32, 4, 1),
        (32, 32, 4, 2), (32, 32, 4, 1)),
    (2, 64): (128, 64, (64, 32, 4, 2), (32, 64, 4, 1),
        (64, 32, 4, 2), (64, 32, 4, 1)),
    (2, 128): (128, 64, (64, 32, 4, 2), (64, 128, 4, 1),
        (64, 32, 4, 2), (64, 32, 4, 1)),
    (2, 256): (128, 64, (64, 32, 4, 2), (64, 128, 4, 1),
        (64, 32, 4, 2), (64, 64, 4, 1)),
    (4, 32): (64, 32, (32, 32, 4, 1), (32, 32, 4, 1),
        (32, 32, 4, 1), (32, 32, 4, 1)),
    (4, 64): (64, 32, (32, 64, 4, 1), (32, 64, 4, 1),
        (32, 64, 4, 1), (32, 32, 4, 1)),
    (4, 128): (64, 32, (32, 64, 4, 1), (32, 64, 4, 1),
        (32, 64, 4, 1), (32, 32, 4, 1)),
    (4, 256): (64, 32, (32, 64, 4, 1), (32, 64, 4, 1),
        (32, 64, 4, 1), (32, 32, 4, 1)),
}  # fmt: skip

# block, forward warps and stages, backward warps and stages, warps of keys' and values' gradients
# and how many queries these take at a time
WINDOW: dict[tuple[int, int], tuple[int, ...]] = {
    (2, 32): (64, 4, 1, 4, 1, 4, 64),
    (2, 64): (64, 4, 1, 4, 1, 4, 32),
    (2, 128): (64, 4, 1, 4, 1, 4, 32),
    (2, 256): (32, 4, 1, 4, 1, 4, 32),
    (4, 32): (32, 4, 1, 4, 1, 4, 32),
    (4, 64): (32, 4, 1, 4, 1, 4, 32),
    (4, 128): (16, 8, 1, 8, 1, 8, 16),
    (4, 256): (16, 8, 1, 8, 1, 8, 16),
}
