"""Start the teacher's weights with an induction circuit, so that it learns recall in minutes.

Looking a key up in a table takes two layers: one marks each token with the tokens just before it,
the next compares marks. A small model finds this pair of heads late or never
(docs/embedded-teacher.md has the figures), so they are there, roughly, before the first step.
Everything trains freely afterwards.
"""

import math

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

# Coordinate 0 of every embedding, so that a query and a key can be the same at every token.
CONSTANT = 0.2
SHARPNESS = 12.0  # of the offset heads
SLOWEST = 0.05  # radians a token: pairs of RoPE that the offset heads use
MATCH = 1.7  # of the comparing heads
WRITE = 0.15  # size of what a head writes
QUIET = 0.1  # scale of what else the first layers write at first
# Of the comparing heads to the end of a turn, which follows the key in the question itself.
AVERSION = 2.5
# Pairs of RoPE that turn less than this many radians over LONGEST tokens can compare contents.
STABLE_TURN = 0.4
LONGEST = 320


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM, *, theta: float) -> None:
    """Write the circuit into layers 0 and 1, and keep all other weights as initialised.

    Layer 0: heads 0 to 3 attend to the token 1 to 4 places back (`offset_heads`). The last three
    mark their token with what they see, each in a random subspace.

    Layer 1: the first head of a key/value group attends to tokens whose mark at one distance
    equals the query's mark at one place more, and copies them to the output. Tables have the key 2
    tokens before its value, and questions have it 3 before the answer. So the two groups find the
    first and the second token of a value.

    Layer 2: one head looks up what the first of these found, so that a name leads to a second row.
    """
    first, second = (model.model.layers[at].self_attn for at in (0, 1))
    dim, shared = first.head_dim, first.num_key_value_groups
    frequency = theta ** (-torch.arange(0, dim, 2) / dim)
    # RoPE rotates a mark by its position. Only slow pairs compare marks over a whole table.
    pairs = (frequency * LONGEST < STABLE_TURN).nonzero().flatten()
    stable = torch.cat([pairs, pairs + dim // 2])
    # The marks' space holds nothing else, so that comparing is not disturbed.
    read, *marks = _projection(model, dim + 3 * len(stable)).split([dim] + 3 * [len(stable)])
    embedding = model.model.embed_tokens.weight
    embedding -= embedding @ torch.cat(marks).T @ torch.cat(marks)
    for quiet in (model.model.layers[0].mlp.down_proj, first.o_proj, second.o_proj):
        quiet.weight *= QUIET
    offset_heads(model, theta=theta)
    for head, mark in enumerate(marks, start=1):
        # All three read the same subspace of the embedding, so that their marks are comparable.
        first.v_proj.weight[_rows(head // shared, dim)] = read
        first.o_proj.weight[:, _rows(head, dim)] = 0.0
        first.o_proj.weight[:, head * dim : head * dim + len(stable)] = WRITE * mark.T
    other = _projection(model, dim)
    for group, copied in enumerate((read, other)):
        _comparing_head(
            model, 1, group, stable, query=marks[group + 1], key=marks[group], copied=copied
        )
    # What the first head of layer 1 found, compared with the marks: the second hop.
    if model.config.num_hidden_layers > 2:
        found = read[: len(stable)]
        _comparing_head(model, 2, 0, stable, query=found, key=marks[0], copied=other)


def _comparing_head(
    model: LlamaForCausalLM,
    layer: int,
    group: int,
    stable: Tensor,
    *,
    query: Tensor,
    key: Tensor,
    copied: Tensor,
) -> None:
    """Let a head match what its query holds in one subspace with what keys hold in another.

    It is the first head of `group`, and copies the tokens it finds. query, key: the subspaces,
    (S, hidden). copied: the subspace that it copies, (D, hidden).
    """
    attention = model.model.layers[layer].self_attn
    dim = attention.head_dim
    head = group * attention.num_key_value_groups
    for weight, at, mark in (
        (attention.q_proj.weight, head, query),
        (attention.k_proj.weight, group, key),
    ):
        weight[_rows(at, dim)] = 0.0
        weight[at * dim + stable[:-1]] = MATCH * mark[:-1]
    # One coordinate is not for comparing: it scores the end-of-turn token down at every query.
    end = model.model.embed_tokens.weight[model.config.eos_token_id].clone()
    end[0] = 0.0
    attention.q_proj.weight[head * dim + stable[-1], 0] = AVERSION
    attention.k_proj.weight[group * dim + stable[-1]] = -AVERSION * end / end.norm()
    attention.v_proj.weight[_rows(group, dim)] = copied
    attention.o_proj.weight[:, _rows(head, dim)] = WRITE * copied.T


@torch.no_grad()
def offset_heads(model: LlamaForCausalLM, *, theta: float) -> None:
    """Let heads 0 to 3 of layer 0 attend to the token 1 to 4 places back.

    Keys are the same vector at every token. The query is that vector turned back by the offset
    under RoPE, so their product peaks at that distance.
    """
    embedding = model.model.embed_tokens.weight
    attention = model.model.layers[0].self_attn
    dim, shared = attention.head_dim, attention.num_key_value_groups
    # Rows of equal norm: else the RMS norm before the layer scales the constant differently for
    # each token.
    embedding[:, 0] = 0.0
    norms = embedding.norm(dim=-1, keepdim=True)
    embedding *= embedding.norm(dim=-1).mean() / norms.clamp(min=1e-6)
    embedding[:, 0] = CONSTANT
    read = CONSTANT / embedding.square().mean(-1).sqrt().mean()  # the coordinate after the RMS norm
    frequency = theta ** (-torch.arange(0, dim, 2) / dim)  # (D/2,)
    # Slow pairs cannot tell neighbours apart.
    size = math.sqrt(SHARPNESS * math.sqrt(dim)) * (frequency > SLOWEST)
    key = torch.cat([size, torch.zeros(dim // 2)])
    for head, offset in enumerate((1, 2, 3, 4)):
        query = torch.cat([size * (offset * frequency).cos(), -size * (offset * frequency).sin()])
        _read_constant(attention.q_proj, head, query / read)
        _read_constant(attention.k_proj, head // shared, key / read)


def _read_constant(projection: nn.Linear, head: int, vector: Tensor) -> None:
    """Make a head's projection the same vector at every token."""
    rows = _rows(head, len(vector))
    projection.weight[rows] = 0.0
    projection.weight[rows, 0] = vector


def _rows(head: int, dim: int) -> slice:
    return slice(head * dim, (head + 1) * dim)


def _projection(model: LlamaForCausalLM, dim: int) -> Tensor:
    """Draw `dim` orthonormal rows (D, hidden) that leave the constant coordinate out."""
    hidden = model.config.hidden_size
    rows = torch.zeros(dim, hidden)
    rows[:, 1:] = torch.linalg.qr(torch.randn(hidden - 1, dim)).Q.T
    return rows
