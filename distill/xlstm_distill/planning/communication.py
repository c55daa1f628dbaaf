"""Count the bytes that a GPU sends in an optimiser step, and the seconds that they take.

Loads no torch. To gather or to reduce-scatter a tensor, a ring sends (n - 1) / n of it from each of
n GPUs; to all-reduce it, twice that. Latency is not counted.

Sources: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in
MPICH (2005); what each sharding sends: Rajbhandari et al., ZeRO (arXiv 1910.02054), and the
documentation of FSDP2. docs/planning.md says what was counted in a run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xlstm_distill.planning.inputs import DTYPE_BYTES, MemoryInputs

FP32 = 4


@dataclass(frozen=True)
class Links:
    """Bandwidths of one GPU that collectives reach (bytes per second, one direction)."""

    within: float
    """To the GPUs of its node: NVLink or PCIe."""
    between: float
    """To other nodes: its share of the node's network."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in an optimiser step, by collective."""

    gathered: float = 0.0
    """All-gather of weights."""
    scattered: float = 0.0
    """Reduce-scatter of gradients."""
    reduced: float = 0.0
    """All-reduce of gradients over GPUs that hold the same."""
    nodes: int = 1
    """Nodes that a gather or a reduce-scatter spans (or the only all-reduce there is)."""
    replicas: int = 1
    """Nodes whose GPUs add up gradients pair by pair (HSDP)."""

    @property
    def total(self) -> float:
        """All bytes."""
        return self.gathered + self.scattered + self.reduced

    def seconds(self, links: Links, node: int) -> float:
        """Return how long the bytes take on nodes of so many GPUs.

        A ring over several nodes crosses the network once for all GPUs of a node, which carry its
        bytes there together. HSDP's all-reduce crosses it for every GPU.
        """
        network = min(links.within, node * links.between)
        spread = links.within if self.nodes == 1 else network
        if self.replicas == 1:
            return self.total / spread
        return (self.gathered + self.scattered) / spread + self.reduced / links.between


@dataclass(frozen=True)
class Bound:
    """An optimiser step of a stage on a machine: what is sent, and how long that takes.

    `compute` and `communication` are seconds, None where the GPU's rate or links are not known.
    """

    traffic: Traffic
    compute: float | None = None
    communication: float | None = None

    @property
    def by_communication(self) -> bool:
        """Whether sending takes longer than computing, beside which it runs at best."""
        if self.compute is None or self.communication is None:
            return False
        return self.communication > self.compute


def distill_traffic(inputs: MemoryInputs, passes: int) -> Traffic:
    """Count what stage II sends in a step of so many passes of each GPU."""
    if inputs.gpus == 1:
        return Traffic()
    sent = _student_traffic(inputs, passes)
    # An online teacher that is cut gathers its layers once a pass: it has no backward pass.
    shards = inputs.teacher_shards
    teacher = passes * (shards - 1) / shards * inputs.teacher_layers
    return replace(sent, gathered=sent.gathered + teacher)


def _student_traffic(inputs: MemoryInputs, passes: int) -> Traffic:
    if inputs.sharding in ("none", "ddp"):
        return _all_reduced(inputs.trained, inputs)
    if inputs.sharding in ("fsdp2", "hsdp"):
        gathers = _weight_bytes(inputs) * _gathered_numbers(inputs)
        return _sharded(inputs, passes, gathers, FP32 * inputs.trained)
    return _zero(inputs, passes)


def align_traffic(inputs: MemoryInputs, passes: int) -> Traffic:
    """Count what stage I sends: the new parameters alone; the teacher is whole on every GPU."""
    new = inputs.parameters.new
    if inputs.gpus == 1 or not new:
        return Traffic()
    if inputs.sharding not in ("fsdp2", "hsdp"):
        return _all_reduced(new, inputs)
    # They form one unit, which is gathered once for the forward and the backward pass.
    return _sharded(inputs, passes, _weight_bytes(inputs) * new, FP32 * new)


def _gathered_numbers(inputs: MemoryInputs) -> float:
    """Count the weights that FSDP2 gathers in a pass.

    Layers are gathered in the forward and again in the backward pass, frozen ones too: gradients
    pass through them. The head and the last norm stay gathered in between. The embedding is
    gathered for its gradient, where it trains.
    """
    p, a = inputs.parameters, inputs.architecture
    layers = inputs.student_numbers - p.embedding - p.head - a.hidden
    embeddings = p.embedding if not p.head or inputs.trainable != "all" else 2 * p.embedding
    return 2.0 * layers + embeddings + p.head + a.hidden


def _sharded(inputs: MemoryInputs, passes: int, gathers: float, gradients: float) -> Traffic:
    """Count FSDP2's collectives; `gathers` and `gradients` are bytes of whole tensors in a pass."""
    shards = inputs.shards
    share = (shards - 1) / shards
    replicas = inputs.gpus // shards
    return Traffic(
        gathered=passes * share * gathers,
        scattered=(1 if inputs.waits else passes) * share * gradients,
        # Each GPU's shard is added up with those of the other replicas, once in a step.
        reduced=_ring(replicas) * gradients / shards,
        nodes=_nodes(shards, inputs.node),
        replicas=replicas,
    )


def _zero(inputs: MemoryInputs, passes: int) -> Traffic:
    """ZeRO-1 and -2 gather updated weights once in a step, ZeRO-3 whenever they are used."""
    share, size = (inputs.gpus - 1) / inputs.gpus, _weight_bytes(inputs)
    # ZeRO-1 adds the gradients of several passes up before it reduces them.
    reductions = 1 if inputs.sharding == "zero1" else passes
    everywhere = inputs.sharding == "zero3"
    gathers = 2 * passes * inputs.student_numbers if everywhere else inputs.trained
    return Traffic(
        gathered=share * size * gathers,
        scattered=reductions * share * FP32 * inputs.trained,
        nodes=_nodes(inputs.gpus, inputs.node),
    )


def _all_reduced(numbers: int, inputs: MemoryInputs) -> Traffic:
    """DDP adds up whole gradients, once in a step."""
    reduced = _ring(inputs.gpus) * FP32 * numbers
    return Traffic(reduced=reduced, nodes=_nodes(inputs.gpus, inputs.node))


def _ring(gpus: int) -> float:
    """Return how often an all-reduce sends a tensor from each GPU."""
    return 2 * (gpus - 1) / gpus


def _nodes(gpus: int, node: int) -> int:
    return -(-gpus // node)


def _weight_bytes(inputs: MemoryInputs) -> int:
    """Bytes of a gathered weight: FSDP2 and ZeRO cast it before they send it."""
    return DTYPE_BYTES[inputs.teacher_dtype] if inputs.teacher_dtype == "bfloat16" else FP32
