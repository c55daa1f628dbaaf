"""Count the bytes that a GPU sends in an optimiser step, and the seconds that they take.

Loads no torch. A ring sends (n - 1) / n of a tensor from each of n GPUs to gather or to
reduce-scatter it, and twice that to all-reduce it. That holds for NCCL's other algorithms up to a
constant that shrinks with the size of the messages; latency is not counted.

Source: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in
MPICH (2005); what each sharding sends: Rajbhandari et al., ZeRO (arXiv 1910.02054), and the
documentation of FSDP2. docs/planning.md says what was counted in a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xlstm_distill.planning.memory import MemoryInputs

FP32 = 4


@dataclass(frozen=True)
class Links:
    """Bandwidths of one GPU (bytes per second, one direction), and the GPUs of a node."""

    within: float
    """To the other GPUs of its node: NVLink, or PCIe."""
    between: float
    """To other nodes: its share of the node's network."""
    node: int = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in an optimiser step, by collective and by link."""

    gathered: float = 0.0
    """All-gather of weights."""
    scattered: float = 0.0
    """Reduce-scatter of gradients."""
    reduced: float = 0.0
    """All-reduce of gradients over GPUs that hold the same."""
    between: float = 0.0
    """Those of all these bytes that cross nodes."""

    @property
    def total(self) -> float:
        """All bytes."""
        return self.gathered + self.scattered + self.reduced

    def seconds(self, links: Links) -> float:
        """Return how long the bytes take, each kind of link by itself."""
        return (self.total - self.between) / links.within + self.between / links.between


@dataclass(frozen=True)
class Step:
    """An optimiser step of a GPU: its passes, and whether gradients wait for the last of them."""

    passes: int
    waits: bool = False


def distill_traffic(inputs: MemoryInputs, step: Step, links: Links) -> Traffic:
    """Count what stage II sends."""
    if inputs.gpus == 1:
        return Traffic()
    if inputs.sharding in ("none", "ddp"):
        return _all_reduced(FP32 * inputs.trained, inputs.gpus, links)
    if inputs.sharding == "fsdp2":
        return _fsdp2(inputs, step, links)
    return _zero(inputs, step, links)


def align_traffic(inputs: MemoryInputs, step: Step, links: Links) -> Traffic:
    """Count what stage I sends: the new parameters alone; the teacher is whole on every GPU."""
    new = inputs.parameters.new
    if inputs.gpus == 1 or not new:
        return Traffic()
    if inputs.sharding != "fsdp2":
        return _all_reduced(FP32 * new, inputs.gpus, links)
    # They form one unit, which stays gathered from the forward to the backward pass.
    size = _weight_bytes(inputs)
    return _sharded(inputs, step, links, gathers=float(size * new), gradients=float(FP32 * new))


def _fsdp2(inputs: MemoryInputs, step: Step, links: Links) -> Traffic:
    """FSDP2 gathers each layer in both passes, and cuts its gradient over the GPUs."""
    p, size = inputs.parameters, _weight_bytes(inputs)
    held = p.student + inputs.adapters
    head = p.head or p.embedding
    # The last unit (the head) stays gathered from its forward to its backward pass, so it is
    # gathered once. Frozen weights are gathered twice as well: gradients pass through them.
    gathers = 2.0 * held - head - inputs.architecture.hidden
    if not p.head:
        gathers -= 0  # a tied head is the embedding, which is then one unit with it
    if inputs.trainable != "all" and p.head:
        gathers -= p.embedding  # no gradient reaches a frozen embedding
    return _sharded(
        inputs, step, links, gathers=size * gathers, gradients=float(FP32 * inputs.trained)
    )


def _sharded(
    inputs: MemoryInputs, step: Step, links: Links, *, gathers: float, gradients: float
) -> Traffic:
    """Count FSDP2's collectives: `gathers` and `gradients` are bytes of whole tensors in a pass."""
    shards = inputs.gpus // inputs.replicas
    share = (shards - 1) / shards
    reductions = 1 if step.waits else step.passes
    gathered = step.passes * share * gathers
    scattered = reductions * share * gradients
    # Each GPU's shard is added up with those of the other replicas, once in a step.
    reduced = _ring(inputs.replicas) * gradients / shards
    between = _crossing(shards, links) * (gathered + scattered)
    between += reduced if inputs.gpus > links.node else 0.0
    return Traffic(gathered, scattered, reduced, between)


def _zero(inputs: MemoryInputs, step: Step, links: Links) -> Traffic:
    """ZeRO-1 and -2 gather updated weights once in a step, ZeRO-3 whenever they are used."""
    share = (inputs.gpus - 1) / inputs.gpus
    held, size = inputs.parameters.student + inputs.adapters, _weight_bytes(inputs)
    # Reduced in fp32 at every pass, but for ZeRO-1, whose gradients add up in bf16 first.
    reductions = 1 if inputs.sharding == "zero1" else step.passes
    scattered = reductions * share * FP32 * inputs.trained
    if inputs.sharding == "zero3":
        gathered = 2 * step.passes * share * size * held
    else:
        gathered = share * size * inputs.trained
    crossing = _crossing(inputs.gpus, links)
    return Traffic(gathered, scattered, 0.0, crossing * (gathered + scattered))


def _all_reduced(size: float, gpus: int, links: Links) -> Traffic:
    """DDP adds up whole gradients, once in a step."""
    reduced = _ring(gpus) * size
    return Traffic(reduced=reduced, between=_crossing(gpus, links) * reduced)


def _ring(gpus: int) -> float:
    """Return how often an all-reduce sends a tensor from each GPU."""
    return 2 * (gpus - 1) / gpus


def _crossing(gpus: int, links: Links) -> float:
    """Return the share of a collective's bytes that bounds it at the network between nodes.

    A ring over several nodes passes all its bytes over the network once at each node's border. A
    node's GPUs carry them there together, so each GPU counts its share.
    """
    return 1.0 if gpus > links.node else 0.0


def _weight_bytes(inputs: MemoryInputs) -> int:
    """Bytes of a gathered weight."""
    return 4 if inputs.teacher_dtype != "bfloat16" else 2


LINKS: Mapping[str, Links] = {}
