"""Making a student of a teacher, and saving and loading it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from xlstm_distill import MixerConfig, convert
from xlstm_distill.errors import UserError
from xlstm_distill.models.families import FAMILIES, family_of

ALL = sorted(FAMILIES)
HYBRID = MixerConfig(window=8, sinks=2)


def ids(batch: int = 2, tokens: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def stir(student: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Give the new parameters random values, so that no part of the mixer is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in student.new_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return student


@pytest.mark.parametrize(
    ("family", "noise"),
    [
        ("llama", ("attention_dropout",)),
        # Released StarCoder2 models have all three.
        ("starcoder2", ("attention_dropout", "residual_dropout", "embedding_dropout")),
        ("phi3", ("resid_pdrop", "embd_pdrop")),
        ("mixtral", ("router_jitter_noise",)),
    ],
)
def test_a_teachers_dropout_is_left_out_with_a_warning(family, noise, tiny_teacher):
    teacher = tiny_teacher(family, **dict.fromkeys(noise, 0.5))
    with pytest.warns(UserWarning, match=r"a student trains without noise") as warned:
        student = convert(teacher, HYBRID).train()
    assert [str(w.message).split(":")[0] for w in warned] == [f"teacher.{name}" for name in noise]
    assert not any(getattr(student.config, name) for name in noise)
    assert torch.equal(student(ids()).logits, student(ids()).logits)


@pytest.mark.parametrize("family", ALL)
def test_save_and_load_round_trip_is_exact(family, tiny_teacher, tmp_path):
    student = stir(convert(tiny_teacher(family), HYBRID))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is type(student)
    assert loaded.config.mixer == student.config.mixer
    before, after = student.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids()).logits, student(ids()).logits)


def test_tied_embeddings_stay_tied(tiny_teacher, tmp_path):
    teacher = tiny_teacher("llama", tie_word_embeddings=True)
    student = convert(teacher, HYBRID)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_sharing_weights_copies_nothing_and_not_sharing_copies_all(tiny_teacher):
    teacher = tiny_teacher()
    shared, own = convert(teacher, HYBRID, share_weights=True), convert(teacher, HYBRID)
    projection = teacher.model.layers[0].self_attn.q_proj.weight
    assert shared.model.layers[0].self_attn.q_proj.weight.data_ptr() == projection.data_ptr()
    assert own.model.layers[0].self_attn.q_proj.weight.data_ptr() != projection.data_ptr()


def test_unsupported_teacher_is_refused_in_one_line():
    teacher = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    with pytest.raises(
        UserError, match=r"teacher.model_type: 'gpt2' cannot be converted; supported are llama"
    ):
        convert(teacher, HYBRID)


def test_attention_weights_are_refused_with_a_word(tiny_teacher):
    student = convert(tiny_teacher(), HYBRID)
    with pytest.warns(UserWarning, match="output_attentions: mixers have no attention weights"):
        given = student(ids(), output_attentions=True)
    assert not given.attentions
    assert torch.equal(given.logits, student(ids()).logits)


def test_the_body_takes_its_arguments_by_position(tiny_teacher):
    student = convert(tiny_teacher(), HYBRID)
    mask = torch.ones_like(ids())
    mask[0, :5] = 0
    by_name = student.model(input_ids=ids(), attention_mask=mask).last_hidden_state
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    assert torch.equal(student.model(ids(), mask).last_hidden_state, by_name)
    assert torch.equal(
        student.model(ids(), mask, positions).last_hidden_state[:, 5:], by_name[:, 5:]
    )


def test_parameters_that_a_file_lacks_start_as_new_ones(tiny_teacher, tmp_path):
    """Teachers' weights loaded as a student's, without `convert`."""
    student = convert(tiny_teacher(), HYBRID)
    new = dict(student.new_parameters())
    weights = {name: w for name, w in student.state_dict().items() if name not in new}
    student.save_pretrained(tmp_path, state_dict=weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.new_parameters():
        assert torch.equal(parameter, new[name]), name


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gemma3", "'gemma3_text'")],
)
def test_families_that_have_no_row_are_refused_with_the_reason(model_type, reason):
    with pytest.raises(UserError, match=f"'{model_type}' cannot be converted \\(.*{reason}"):
        family_of(model_type)
