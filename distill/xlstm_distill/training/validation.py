"""Held-out figures of a task, shared out over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import nn

from xlstm_distill.data.rows import Batch, DomainRows, Row, load_batch
from xlstm_distill.models.gates import GateMeter
from xlstm_distill.training.accelerator import reshard


@torch.no_grad()
def validate(
    wrapped: nn.Module,
    count: Callable[[Batch], int],
    domains: Mapping[str, DomainRows],
    rows: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean loss parts per token over the validation rows, and `gate`, the mean output gate over real tokens.

    At most `rows` rows a process run at a time. All processes must call this, and all get the same figures.
    """
    totals: dict[str, torch.Tensor] = {}
    wrapped.eval()
    with GateMeter(wrapped) as meter:
        for part, counts in _shares(domains, rows, accelerator):
            batch = load_batch(domains, part).to(accelerator.device)
            meter.expect(batch.real & counts)
            sums = wrapped(batch)
            figures = {"tokens": torch.tensor(count(batch)), **sums.parts}
            for name, value in figures.items():
                totals[name] = (
                    totals.get(name, 0.0) + value.double().to(accelerator.device) * counts
                )
    reshard(wrapped)
    wrapped.train()
    gates = torch.tensor(meter.tokens), meter.total()
    stacked = torch.stack(
        [*totals.values(), *(value.double().to(accelerator.device) for value in gates)]
    )
    *values, real, opened = accelerator.reduce(stacked, "sum").tolist()
    means = dict(zip(totals, values, strict=True))
    tokens = max(means.pop("tokens"), 1)
    return {name: value / tokens for name, value in means.items()} | (
        {"gate": opened / real} if meter.gates else {}
    )


def _shares(
    domains: Mapping[str, DomainRows], rows: int, accelerator: Accelerator
) -> Iterator[tuple[list[Row], bool]]:
    """This process's rows, batch after batch and as many as the others' but for one, and whether they count.

    Every process gets as many batches, since sharded weights are gathered by all at once: one that has run out of rows
    runs the first row again, which does not count.
    """
    names = [(name, index) for name, held in domains.items() for index in range(held.validation)]
    for start in range(0, len(names), rows * accelerator.num_processes):
        together = names[start : start + rows * accelerator.num_processes]
        mine = together[accelerator.process_index :: accelerator.num_processes]
        yield (mine, True) if mine else (names[:1], False)
