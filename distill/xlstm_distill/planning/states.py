"""Weights, gradients and optimiser states that a GPU holds, for each way to share a model.

Sources: Rajbhandari et al., ZeRO (arXiv 1910.02054); the documentation of FSDP2 and DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass

from xlstm_distill.planning.inputs import MemoryInputs

ADAM = 8
"""Bytes of the two fp32 moments of a trained parameter."""
ZERO_BUCKET, ZERO_LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults: numbers in a reduction bucket, and the most parameters ZeRO-3 gathers."""


@dataclass(frozen=True)
class States:
    """Bytes that a GPU holds between passes."""

    weights: float
    gradients: float
    optimizer: float
    working_copies: float


def held_states(inputs: MemoryInputs) -> States:
    """Count weights, gradients and optimiser states on one GPU."""
    if inputs.sharding in ("none", "ddp"):
        return _whole_states(inputs)
    if inputs.sharding in ("fsdp2", "hsdp"):
        return _fsdp2_states(inputs)
    return _zero_states(inputs)


def _whole_states(inputs: MemoryInputs) -> States:
    """Every GPU holds everything, in fp32."""
    held, trained = inputs.parameters.student + inputs.adapters, inputs.trained
    # Autocast keeps a bf16 copy of each weight of a product until the step ends; a look-up has
    # none.
    # Products of experts do not take part in autocast.
    uncast = inputs.parameters.embedding + inputs.parameters.experts
    copies = 0.0 if inputs.precision == "fp32" else 2.0 * (held - uncast)
    buckets = 4.0 * trained if inputs.sharding == "ddp" else 0.0
    return States(4.0 * held, 4.0 * trained, float(ADAM * trained), copies + buckets)


def _fsdp2_states(inputs: MemoryInputs) -> States:
    """Every GPU holds a share of everything in fp32, and gathers a layer when it is used."""
    held, trained, shards = inputs.student_numbers, inputs.trained, inputs.shards
    # Gradients that wait for the last pass are whole.
    kept = 4.0 * trained if inputs.waits and inputs.accumulates else 4.0 * trained / shards
    # What is gathered depends on the moment (`_fsdp2_moments`).
    return States(4.0 * held / shards, kept, ADAM * trained / shards, 0.0)


def _zero_states(inputs: MemoryInputs) -> States:
    """DeepSpeed shards optimiser states (ZeRO-1), gradients too (2), weights too (3)."""
    held, trained = inputs.parameters.student + inputs.adapters, inputs.trained
    half = inputs.precision != "fp32"
    size = 2.0 if half else 4.0
    weights = size * held
    gradients = 4.0 * trained / inputs.gpus
    gathered = 0.0
    if inputs.sharding == "zero1":
        gradients += size * trained  # whole, beside the fp32 share that the optimiser reads
    if inputs.sharding == "zero3":
        weights /= inputs.gpus
        gathered = size * min(held, ZERO_LIVE + inputs.layer_parameters)
    # AdamW updates fp32 masters where the weights are bf16.
    masters = 4.0 * trained / inputs.gpus if half else 0.0
    # One bucket is filled while another is sent, and its fp32 copy is reduced.
    buckets = (2 * size + 4) * min(ZERO_BUCKET, trained)
    return States(weights, gradients, ADAM * trained / inputs.gpus + masters, gathered + buckets)
