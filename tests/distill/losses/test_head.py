"""The head that ends in the loss: it is the head it replaces, and hooks run around it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_distill.errors import UserError
from xlstm_distill.losses.head import FusedHead, fuse_head
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_kernels.testing import error_ratio


def test_the_fused_head_is_the_head(tiny_teacher, tmp_path):
    model = tiny_teacher(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight, state = model.lm_head.weight, torch.random.get_rng_state()
    head = fuse_head(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert fuse_head(model) is head is model.lm_head
    assert head.weight is weight is model.model.embed_tokens.weight
    assert model.state_dict().keys() == before.keys()
    x = torch.randn(2, 3, 64)
    assert torch.equal(head(x), F.linear(x, weight))
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(again.lm_head) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_hooks_of_the_head_run_for_the_loss():
    """As FSDP and ZeRO-3 do: the weight is whole only while the module is called."""
    hidden, whole = torch.randn(50, 16), torch.randn(301, 16) * 0.5
    labels, targets = torch.randint(301, (50,)), SparseTargets.from_logits(torch.randn(50, 301), 24)
    head = FusedHead(nn.Linear(16, 301, bias=False))
    head.weight.data = torch.empty(0)

    def gather(module, _):
        module.weight.data = whole

    def shard(module, *_):
        module.weight.data = torch.empty(0)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(shard)
    total, parts = head.loss(hidden, labels, targets, LossWeights(0.9, 0.1))
    logits = F.linear(hidden.double(), whole.double())
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    p = targets.log_probs.double().log_softmax(-1)
    q = logits.gather(-1, targets.ids).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    assert error_ratio(total.detach(), 0.9 * cross_entropy + 0.1 * kl) < 1e-6
    assert error_ratio(parts.kl, kl) < 1e-6
    assert torch.equal(head.targets(hidden, 8).ids, F.linear(hidden, whole).topk(8).indices)
    assert head.weight.numel() == 0


def test_a_replaced_head_is_refused():
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(
        UserError, match=r"lm_head: a torch.nn.modules.container.Sequential, the loss needs a plain"
    ):
        fuse_head(model)
