"""Objectives: what the student is compared with, and what its loss is the mean of."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from xlstm_distill import MixerConfig, convert, models
from xlstm_distill.data.rows import IGNORE_INDEX, load_batch
from xlstm_distill.targets.providers import kept_logits
from xlstm_distill.training.objectives import AlignObjective, TeacherObserver
from xlstm_kernels.testing import error_ratio


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma2", "gpt_oss"])
def test_the_observer_sees_what_the_projection_gets(family, tiny_teacher, domains):
    teacher = tiny_teacher(family)
    batch = load_batch(domains, [("a", 4), ("b", 5)])
    exact = convert(teacher, MixerConfig(window=32, sinks=0, branches=("window",)))
    for mixer, seen in zip(exact.mixers(), TeacherObserver(teacher)(batch), strict=True):
        mixed = mixer.mix(
            seen.hidden_states, seen.position_embeddings, segment_ids=batch.segment_ids
        )
        assert error_ratio(mixed[batch.real], seen.heads[batch.real].double()) < 1e-6


@pytest.mark.parametrize("sharded", [False, True])
def test_only_a_whole_teachers_pass_ends_with_the_last_heads(sharded, tiny_teacher, domains):
    """What shards a model (ZeRO-3 marks its parameters) frees a layer's weights at its end."""
    teacher = tiny_teacher("llama")
    batch = load_batch(domains, [("a", 4)])
    expected = [layer.heads for layer in TeacherObserver(teacher)(batch)]
    ended = []
    teacher.model.norm.register_forward_hook(lambda *_: ended.append(True))
    if sharded:
        teacher.model.norm.weight.ds_id = 0
    seen = [layer.heads for layer in TeacherObserver(teacher)(batch)]
    assert len(ended) == sharded
    assert all(map(torch.equal, seen, expected))


OWN_SOFTMAX = {
    # Scores are about as large as the bound.
    "gemma2": {"attn_logit_softcapping": 1.0, "sliding_window": 8},
    "gpt_oss": {"sliding_window": 8},
}


@pytest.mark.parametrize(
    ("family", "by_mask"),
    [*((family, False) for family in OWN_SOFTMAX), *product(("llama", "olmo3"), (False, True))],
)
def test_a_teacher_attends_in_documents_as_transformers_has_it(
    family, by_mask, tiny_teacher, domains, monkeypatch
):
    """Targets of both stages: the observed heads are transformers' own, document by document.

    transformers itself lets documents of a row see each other in gpt-oss. by_mask: as on a GPU.
    """
    monkeypatch.setattr(models.packed, "reads_documents", lambda device: not by_mask)
    teacher = tiny_teacher(family, **OWN_SOFTMAX.get(family, {}))
    with torch.no_grad():
        for layer in teacher.model.layers if family == "gpt_oss" else ():
            layer.self_attn.sinks.normal_(mean=2.0)  # as large a part as the tokens
    batch = load_batch(domains, [("a", 4), ("b", 5)])
    packed = torch.stack([layer.heads for layer in TeacherObserver(teacher)(batch)])
    own = "eager" if family in OWN_SOFTMAX else "sdpa"
    assert teacher.config._attn_implementation == own
    alone = torch.zeros_like(packed)
    seen = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        for layer in teacher.model.layers
    ]
    for row, ids in enumerate(batch.segment_ids):
        for document in ids[batch.real[row]].unique():
            where = (ids == document) & batch.real[row]
            seen.clear()
            with torch.no_grad():
                teacher(batch.input_ids[row, where][None])
            alone[:, row, where] = torch.stack(seen)
    for handle in handles:
        handle.remove()
    assert len(batch.segment_ids.unique()) > 1
    assert error_ratio(packed[:, batch.real], alone[:, batch.real].double()) < 1e-6


@pytest.mark.parametrize(
    "family", ["phi3", "qwen2", "olmo3", "cohere2", "gemma2", "gemma3_text", "gpt_oss"]
)
def test_stage_one_gives_all_new_parameters_of_a_family_a_gradient(family, tiny_teacher, domains):
    teacher = tiny_teacher(family)
    student = convert(teacher, MixerConfig(window=8, sinks=2), share_weights=True)
    objective = AlignObjective(student, teacher)
    objective(load_batch(domains, [("a", 4), ("b", 5)])).loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    for mixer in student.mixers():
        if not mixer.family.fused:
            assert torch.equal(mixer.value_weight, mixer.v_proj.weight)


def test_what_is_kept_is_not_aligned(tiny_teacher, domains):
    teacher = tiny_teacher(num_hidden_layers=3)
    mixer = MixerConfig(window=8, sinks=2, attention={"layers": [1], "heads": {2: [1, 2]}})
    student = convert(teacher, mixer, share_weights=True)
    objective = AlignObjective(student, teacher)
    batch = load_batch(domains, [("a", 4), ("b", 5)])
    sums = objective(batch)
    assert {name for name in sums.parts if name.startswith("squared")} == {
        "squared_error/0", "squared_error/2",
    }  # fmt: skip
    plain = AlignObjective(convert(teacher, MixerConfig(window=8, sinks=2)), teacher)(batch).parts
    # The power is that of the teacher's other heads alone; layer 0 keeps none.
    assert torch.equal(sums.parts["teacher_power/0"], plain["teacher_power/0"])
    seen = TeacherObserver(teacher)(batch)[2].heads[batch.real].unflatten(-1, (4, 16))
    power = seen[:, [0, 3]].double().square().sum()
    assert float(sums.parts["teacher_power/2"]) == pytest.approx(float(power), rel=1e-5)
    sums.loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    figures = objective.figures({"loss": 1.0} | {k: float(v) for k, v in sums.parts.items()})
    assert 0 < figures["relative_error"] < 1


def test_the_student_computes_what_was_aligned(tiny_teacher, domains):
    """Its output gates read values as they are, and not values of RMS 1."""
    teacher = tiny_teacher()
    student = convert(teacher, MixerConfig(window=8, sinks=2), share_weights=True)
    objective = AlignObjective(student, teacher)
    batch = load_batch(domains, [("a", 4), ("b", 5)])
    with torch.no_grad():
        for mixer in student.mixers():
            mixer.output_gate.weight.normal_()
    aligned = float(objective(batch).loss)
    folded = objective.folded({k: v.clone() for k, v in student.state_dict().items()})
    student.load_state_dict(folded)
    objective.value_scales = dict.fromkeys(objective.value_scales, torch.ones(()))
    assert float(objective(batch).loss) == pytest.approx(aligned, rel=1e-6)


def test_relative_errors_of_layers_show_a_layer_with_small_values(align_objective):
    means = {f"{name}/{n}": value for name, values in {
        "squared_error": (1.0, 0.03), "teacher_power": (100.0, 0.1)
    }.items() for n, value in enumerate(values)}  # fmt: skip
    figures = align_objective().figures({"loss": 1.03, **means})
    assert figures["relative_error"] == pytest.approx(1.03 / 100.1)
    assert figures["relative_error_of_layers"] == pytest.approx(0.155)
    assert figures["relative_error_of_worst_layer"] == pytest.approx(0.3)
    assert not any("/" in name for name in figures)


def test_the_loss_is_the_mean_over_supervised_tokens(distill_objective, domains):
    objective = distill_objective()
    batch = load_batch(domains, [("a", 6), ("b", 7)])
    sums = objective(batch)
    logits = objective.student(batch.input_ids, segment_ids=batch.segment_ids).logits
    supervised = batch.labels != IGNORE_INDEX
    kept = logits[supervised]
    fused = kept_logits(objective.student, batch, segment_ids=batch.segment_ids)
    assert error_ratio(fused, kept.double()) < 1e-6
    expected = torch.nn.functional.cross_entropy(kept, batch.labels[supervised]).detach()
    mean = float(sums.parts["ce"]) / objective.count(batch)
    assert mean == pytest.approx(float(expected), rel=1e-5)
