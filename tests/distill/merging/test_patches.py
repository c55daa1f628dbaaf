"""Patches: what they hold, applied and stacked, taken off to the last bit, refused elsewhere."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xlstm_distill import MixerConfig, convert
from xlstm_distill.artifacts.manifest import FORMAT, facts_of_files
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.merging import streaming
from xlstm_distill.merging.files import SavedWeights
from xlstm_distill.merging.patches import Patch, make_patch
from xlstm_distill.merging.sparse import decode, encode
from xlstm_distill.merging.stack import apply_patches, load_patched, read_stack, remove_patch
from xlstm_distill.stages import workbench

FLOATS = ("layer.big", "layer.bf16", "layer.f16", "norm.frozen")


@given(st.sets(st.integers(0, 3000)))
@settings(max_examples=60, deadline=None)
def test_positions_are_read_back(drawn):
    positions = np.array(sorted(drawn), dtype=np.int64)
    assert decode(encode(positions)).tolist() == positions.tolist()


def test_gaps_at_the_ends_of_a_byte_are_read_back():
    for gap in (0, 1, 254, 255, 256, 509, 510, 511, 2**20 - 1):
        positions = np.array([gap, gap + 1], dtype=np.int64)
        coded = encode(positions)
        assert decode(coded).tolist() == positions.tolist()
        assert len(coded) == gap // 255 + 2


@pytest.fixture(scope="module")
def patches(places, tmp_path_factory):
    """A patch of each expert, of 10 % of its changes."""
    folder = tmp_path_factory.mktemp("patches")
    found = {}
    for name in ("a", "b", "c"):
        found[name] = folder / f"{name}.safetensors"
        make_patch(places(1)["base"], places(2)[name], found[name], 0.1, name)
    return found


def weights_in(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def dense(students, name):
    """The difference that a patch of 10 % holds, in float64, from the whole tensor."""
    found = {}
    for key in FLOATS:
        base = students["base"][key]
        difference = (students[name][key].float() - base.float()).flatten()
        count = max(1, round(0.1 * difference.numel()))
        # Of equal ones the first.
        kept = difference.abs().sort(descending=True, stable=True).indices[:count]
        held = torch.zeros_like(difference, dtype=torch.float64)
        held[kept] = difference[kept].bfloat16().double()
        found[key] = held.reshape(base.shape)
    return found


def test_a_patch_holds_the_largest_changes_of_each_tensor(patches, students):
    patch, expected = Patch(patches["a"]), dense(students, "a")
    squares = left_out = 0.0
    for key in FLOATS:
        base = students["base"][key].double()
        blocks = streaming.blocks_of(key, base.numel())
        held = torch.zeros(base.numel(), dtype=torch.float64)
        for block in blocks:
            if change := patch.changes(block):
                held[block.start + torch.from_numpy(change.positions)] = change.values.double()
        held = held.reshape(base.shape)
        assert torch.equal(held, expected[key]), key
        difference = students["a"][key].double() - base
        squares += float(difference.square().sum())
        left_out += float((difference - held).square().sum())
    assert patch.facts.retained == pytest.approx(1 - left_out / squares, rel=1e-9)
    assert patch.facts.changes == patch.count
    # Of normal differences the largest tenth holds 44 % of the square.
    assert patch.facts.retained == pytest.approx(0.44, abs=0.01)
    assert patches["a"].stat().st_size < 3.1 * patch.facts.changes + 2**16


def test_it_is_the_same_file_whatever_the_threads_and_files(patches, places, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "threads", lambda: 3)
    make_patch(places(2)["base"], places(1)["a"], tmp_path / "a.safetensors", 0.1, "a")
    assert (tmp_path / "a.safetensors").read_bytes() == patches["a"].read_bytes()


def test_patches_add_up_and_come_off_to_the_last_bit(patches, places, students, tmp_path):
    base = places(2)["base"]
    steps = {"a": 1.0, "b": 0.5, "c": -2.0}
    apply_patches(base, [(patches[n], steps[n]) for n in "abc"], tmp_path / "three")
    changes = {name: dense(students, name) for name in "abc"}
    for key, tensor in weights_in(tmp_path / "three").items():
        start = students["base"][key]
        if key not in FLOATS:
            assert torch.equal(tensor, start)
            continue
        total = start.double() + sum(steps[name] * changes[name][key] for name in "abc")
        unit = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), total, rtol=0.51 * unit, atol=1e-12)
    # Out of order, one by one: what the others alone make, and the base's own bytes in the end.
    remove_patch(tmp_path / "three", "b", tmp_path / "two")
    apply_patches(base, [(patches["a"], 1.0), (patches["c"], -2.0)], tmp_path / "a_c")
    for path in (tmp_path / "a_c").rglob("*"):
        if path.is_file():
            own = tmp_path / "two" / path.relative_to(tmp_path / "a_c")
            assert own.read_bytes() == path.read_bytes(), path.name
    remove_patch(tmp_path / "two", str(patches["a"]), tmp_path / "one")
    left = remove_patch(tmp_path / "one", "c", tmp_path / "none")
    assert not left.applied
    assert sorted(p.name for p in (tmp_path / "none").iterdir()) == sorted(
        p.name for p in base.iterdir()
    )
    for path in base.iterdir():
        assert (tmp_path / "none" / path.name).read_bytes() == path.read_bytes()
    # One after the other is the same as at once.
    apply_patches(tmp_path / "one", [(patches["a"], 1.0)], tmp_path / "c_a")
    assert [one.patch.facts.name for one in read_stack(tmp_path / "c_a").applied] == ["c", "a"]


def test_another_base_and_other_mistakes_are_refused(patches, places, students, tmp_path):
    base = places(1)["base"]
    out = tmp_path / "out"
    with pytest.raises(UserError, match="made for the base"):
        apply_patches(places(1)["b"], [(patches["a"], 1.0)], out)
    assert not list(tmp_path.iterdir())
    (tmp_path / "smaller").mkdir()
    fewer = {key: students["base"][key] for key in FLOATS if key != "layer.big"}
    save_file(fewer, tmp_path / "smaller" / "model.safetensors")
    with pytest.raises(UserError, match=r"layer\.big is not in .* made for another base"):
        apply_patches(tmp_path / "smaller", [(patches["a"], 1.0)], out)
    apply_patches(base, [(patches["a"], 1.0)], out)
    with pytest.raises(UserError, match="exists; give a new folder"):
        apply_patches(base, [(patches["a"], 1.0)], out)
    with pytest.raises(UserError, match=r"is in .* already; remove it first"):
        apply_patches(out, [(patches["a"], 0.5)], tmp_path / "twice")
    with pytest.raises(UserError, match=r"has no such patch\. Patches: a"):
        remove_patch(out, "b", tmp_path / "less")
    with pytest.raises(UserError, match="cannot name a file"):
        make_patch(base, places(1)["a"], tmp_path / "x.safetensors", 0.1, "../x")
    with pytest.raises(UserError, match="its weights are those of"):
        make_patch(base, base, tmp_path / "x.safetensors", 0.1, "x")
    with pytest.raises(UserError, match=r"is no .xlstm-distill patch 1."):
        Patch(base / "model.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(UserError, match="no such file; give a patch"):
        Patch(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="this patch is given twice"):
        apply_patches(base, [(patches["a"], 1.0), (patches["a"], 1.0)], tmp_path / "two")
    with pytest.raises(UserError, match="would hold numbers that are not finite"):
        apply_patches(base, [(patches["a"], 3e38)], tmp_path / "huge")
    with pytest.raises(UserError, match=r"1e\+60 is beyond the numbers of float32"):
        apply_patches(base, [(patches["a"], 1e60)], tmp_path / "huge")
    assert not (tmp_path / "huge").exists()


def as_artifact(model, folder, identity, **inputs):
    """Lay a saved model into an artifact with this identity, made from these inputs."""
    shutil.copytree(model, folder / "model")
    stage = "align" if folder.name == "align" else "distill"
    files = facts_of_files(folder)
    facts = {"format": FORMAT, "stage": stage, "fingerprint": identity, "identity": identity}
    facts |= {"recipe": {}, "inputs": inputs, "wall_seconds": 1.0, "results": {}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder / "model"


def test_an_expert_of_another_seed_student_has_no_patch(places, tmp_path):
    base = as_artifact(places(2)["base"], tmp_path / "align", "one", teacher="t")
    own = as_artifact(places(1)["a"], tmp_path / "own", "x", align="one")
    other = as_artifact(places(1)["b"], tmp_path / "other", "y", align="two")
    # A refined expert was trained from the aligned student by way of another expert.
    refined = as_artifact(places(1)["c"], tmp_path / "refined", "z", **{"distill/own": "x"})
    out = tmp_path / "p.safetensors"
    with pytest.raises(
        UserError, match=r"other/model: was trained from the aligned student two, a"
    ):
        make_patch(base, other, out, 0.1, "p")
    with pytest.raises(UserError, match=r"own/model: was trained from .*align/model, not the oth"):
        make_patch(own, base, out, 0.1, "p")
    assert not out.exists()
    facts = make_patch(base, own, out, 0.1, "p")
    assert (facts.seed, facts.doubt) == ("one", None)
    for pair, doubt in (
        ((base, places(1)["a"]), "the expert has no manifest"),
        ((places(2)["base"], own), "the base has no manifest"),
        ((base, refined), "the expert's manifest names no seed student"),
    ):
        facts = make_patch(*pair, out, 0.1, "p")
        assert (facts.seed, facts.doubt) == (None, doubt)
        assert Patch(out).facts == facts
    # A changed file is found before it is compared with anything.
    (file,) = own.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(RunError, match=r"model\.safetensors: its content changed"):
        make_patch(base, own, tmp_path / "q.safetensors", 0.1, "q")


@pytest.mark.parametrize("rank", [None, 2])
def test_numbers_that_are_not_finite_are_named(students, places, tmp_path, rank):
    spoiled = {key: tensor.clone() for key, tensor in students["a"].items()}
    matrix = torch.randn(64, 64)
    spoiled["layer.bf16"][4, 1] = float("nan")
    spoiled["matrix"] = matrix.clone()
    spoiled["matrix"][0, 0] = float("inf")
    base = {**students["base"], "matrix": matrix}
    for name, tensors in (("base", base), ("expert", spoiled)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    density = 0.1 if rank is None else None
    with pytest.raises(UserError, match=r"expert: layer\.bf16 holds numbers that are not finite"):
        make_patch(
            tmp_path / "base",
            tmp_path / "expert",
            tmp_path / "p.safetensors",
            density,
            "p",
            rank=rank,
        )
    assert not (tmp_path / "p.safetensors").exists()


def test_a_damaged_patch_changes_no_model(patches, places, tmp_path):
    good, damaged = bytearray(patches["a"].read_bytes()), tmp_path / "a.safetensors"
    data = 8 + int.from_bytes(good[:8], "little")
    facts = good.index(b'"retained')
    # A value, a position, the last byte, a digit of the facts.
    for place in (data, (data + len(good)) // 2, len(good) - 1, good.index(b".", facts) + 2):
        bad = bytearray(good)
        bad[place] ^= 1
        damaged.write_bytes(bad)
        with pytest.raises(RunError, match=r"a\.safetensors: its checksum is wrong"):
            apply_patches(places(1)["base"], [(damaged, 1.0)], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_patched_model_that_was_changed_is_refused(patches, places, tmp_path):
    out = tmp_path / "out"
    apply_patches(places(1)["base"], [(patches["a"], 1.0)], out)
    file = out / "model.safetensors"
    good = file.read_bytes()
    entry = SavedWeights(out).entries["norm.frozen"]
    file.write_bytes(good[: entry.start] + b"\x01" + good[entry.start + 1 :])
    with pytest.raises(RunError, match="its weights were changed after its patches"):
        remove_patch(out, "a", tmp_path / "less")
    file.write_bytes(good)
    kept = out / "patches" / "1-a.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RunError, match=r"1-a\.safetensors: the patch was changed"):
        remove_patch(out, "a", tmp_path / "less")
    (out / "patches" / "stack.json").write_text("[]")
    with pytest.raises(RunError, match=r"stack\.json: cannot be read"):
        remove_patch(out, "a", tmp_path / "less")


def test_numbers_that_are_equal_do_not_exceed_the_density(places, students, tmp_path):
    moved = dict(students["base"])
    # In bf16 most differences of a short training are equal: here all of them.
    moved["layer.bf16"] = torch.ones(5, 7).bfloat16()
    base = dict(moved, **{"layer.bf16": torch.zeros(5, 7).bfloat16()})
    for name, tensors in (("base", base), ("expert", moved)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    facts = make_patch(tmp_path / "base", tmp_path / "expert", tmp_path / "p.safetensors", 0.2, "p")
    assert facts.changes == 7
    change = Patch(tmp_path / "p.safetensors").changes(streaming.Block("layer.bf16", 0, 0, 35))
    assert change.positions.tolist() == list(range(7))
    assert facts.retained == pytest.approx(0.2)


def test_a_model_is_patched_while_it_is_loaded(tiny_teacher, tmp_path):
    """From the command line: the files of a patched model and one patched in memory are equal."""
    from command_line import call_cli
    from transformers import AutoModelForCausalLM

    student = convert(tiny_teacher(tie_word_embeddings=True), MixerConfig(window=8, sinks=2))

    def save(name):
        silent = SimpleNamespace(save_pretrained=lambda folder: None)
        workbench.save_model(student, silent, tmp_path / name / "model")

    save("align")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save("math")
    patch, out = tmp_path / "math.safetensors", tmp_path / "patched"
    made = call_cli("patch", "make", tmp_path / "align", tmp_path / "math", patch)
    assert made.returncode == 0, made.stderr
    assert "changes hold" in made.stdout
    # Folders without manifests.
    assert made.stderr.startswith("warning: nothing tells whether")
    shown = call_cli("patch", "show", patch, "--json")
    facts = json.loads(shown.stdout)
    assert (facts["name"], facts["density"]) == ("math", 0.05)
    assert facts["bytes"] == patch.stat().st_size
    words = ("patch", "apply", tmp_path / "align", patch, "--weight", "0.5", "--out", out)
    assert call_cli(*words).returncode == 0
    before = (tmp_path / "align" / "model" / "model.safetensors").read_bytes()
    loaded = load_patched(tmp_path / "align" / "model", [(patch, 0.5)])
    expected = AutoModelForCausalLM.from_pretrained(out)
    theirs = expected.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert (tmp_path / "align" / "model" / "model.safetensors").read_bytes() == before
    again = call_cli("patch", "remove", out, "math", "--out", tmp_path / "back")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == before
    refused = call_cli("patch", "apply", tmp_path / "math", patch, "--out", tmp_path / "no")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {patch}: made for the base ")
