"""Held-out figures of an objective, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xlstm_distill.data.rows import DomainRows, Row
from xlstm_distill.models.gates import GateMeter
from xlstm_distill.runtime.products import fast_linear_layers
from xlstm_distill.training.accelerator import reshard
from xlstm_distill.training.compilation import eagerly
from xlstm_distill.training.objectives import Objective


@torch.no_grad()
def validate(
    wrapped: nn.Module,
    objective: Objective,
    domains: Mapping[str, DomainRows],
    rows: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return mean loss parts per token over the validation rows, and `gate`.

    `wrapped` is the objective as Accelerate prepared it. `gate` is the mean output gate over real
    tokens; it is missing where the module has no gates. At most `rows` rows run at a time on each
    rank. All ranks must call this; all get the same figures.
    """
    totals: dict[str, Tensor] = {}
    wrapped.eval()
    # The meter hooks into modules that may be inside of compiled parts.
    with eagerly(), fast_linear_layers(accelerator.device), GateMeter(wrapped) as meter:
        processes, rank = accelerator.num_processes, accelerator.process_index
        for part, counts in rank_batches(domains, rows, processes=processes, rank=rank):
            read = objective.load(domains, part)
            batch = read.to(accelerator.device)
            meter.expect(batch.real & counts)
            sums = wrapped(batch)
            counted = torch.full((), objective.count(read), device=accelerator.device)
            for name, value in {"tokens": counted, **sums.parts}.items():
                # float64: the sums run over all validation tokens.
                part_sum = value.double() * counts
                totals[name] = totals.get(name, 0.0) + part_sum
    reshard(wrapped)
    wrapped.train()
    gates = meter.tokens, meter.total()
    sums_of_gates = [value.double().to(accelerator.device) for value in gates]
    stacked = torch.stack([*totals.values(), *sums_of_gates])
    *values, real, opened = accelerator.reduce(stacked, "sum").tolist()
    sums_by_name = dict(zip(totals, values, strict=True))
    tokens = max(sums_by_name.pop("tokens"), 1)
    means = objective.figures({name: value / tokens for name, value in sums_by_name.items()})
    return means | ({"gate": opened / real} if meter.gates else {})


def rank_batches(
    domains: Mapping[str, DomainRows], rows: int, *, processes: int, rank: int
) -> Iterator[tuple[list[Row], bool]]:
    """Give a rank its validation rows in batches; padding batches are flagged False.

    Every rank gets the same number of batches: sharded weights are gathered by all ranks at once. A
    rank that has no rows left repeats the first row as padding.
    """
    every = [(name, index) for name, held in domains.items() for index in range(held.validation)]
    for start in range(0, len(every), rows * processes):
        together = every[start : start + rows * processes]
        mine = together[rank::processes]
        yield (mine, True) if mine else (every[:1], False)
