"""Decode with the Triton kernels and print the error ratio to the forward pass without a cache.

Started by test_decoding.py, in a process of its own: Triton's interpreter must be chosen before
Triton is imported. Argument: the mixer's branches, comma-separated.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_distill import MixerConfig, convert
from xlstm_kernels.testing import error_ratio

PROMPT, DECODED = 9, 6


@torch.no_grad()
def decoding_error(branches: tuple[str, ...]) -> float:
    """Decode packed rows one token at a time with backend="triton", after a prompt with torch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.15,
    )
    mixer = MixerConfig(window=4, sinks=2, branches=branches)
    student = convert(LlamaForCausalLM(config).eval(), mixer)
    for _, parameter in student.new_parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(3, 97, (2, PROMPT + DECODED))
    # The second row begins a document while it is decoded.
    segments = torch.tensor([[0] * 15, [0] * 11 + [1] * 4])
    whole = student(ids, segment_ids=segments, use_cache=False).logits
    cache = student.new_cache()
    student(ids[:, :PROMPT], segment_ids=segments[:, :PROMPT], past_key_values=cache)
    for module in student.mixers():
        module.backend = "triton"
    tokens = []
    for t in range(PROMPT, PROMPT + DECODED):
        now = slice(t, t + 1)
        out = student(ids[:, now], segment_ids=segments[:, now], past_key_values=cache)
        tokens.append(out.logits)
    return error_ratio(torch.cat(tokens, dim=1), whole[:, PROMPT:].double())


if __name__ == "__main__":
    print(decoding_error(tuple(sys.argv[1].split(","))))
