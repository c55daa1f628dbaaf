"""Exported students: complete, equal to what they were made from, and loadable by others."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import HFValidationError
from processes import process_environment
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from xlstm_distill import MixerConfig, convert
from xlstm_distill.errors import UserError
from xlstm_distill.export.directory import describe, export, upload
from xlstm_distill.export.source import find_student
from xlstm_distill.models.families import FAMILIES
from xlstm_distill.models.student import CODE_FILE
from xlstm_distill.runtime.console import QuietConsole, byte_size

IDS = torch.arange(3, 43).view(2, 20)
ELSEWHERE = """
import sys
# An environment without this project: importing any of its packages fails.
for package in ("xlstm_distill", "xlstm_kernels", "xlstm_eval"):
    sys.modules[package] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
made = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(3, 43).view(2, 20)
    model(ids).logits.logsumexp(-1).sum().backward()
    with torch.no_grad():
        made[folder] = {
            "logits": model(ids).logits,
            "tokens": model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None),
            "gradients": {n: p.grad for n, p in model.named_parameters()},
        }
        body = AutoModel.from_pretrained(folder, trust_remote_code=True)
        made[folder]["body"] = body(ids).last_hidden_state
    # Not every family has this head.
    if "AutoModelForSequenceClassification" in model.config.auto_map:
        AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)(ids)
torch.save(made, sys.argv[1])
"""


def exported(source: Path, target: Path, **options) -> Path:
    export(find_student(source), target, QuietConsole(), version="1.2.3", **options)
    return target


def test_an_exported_student_is_whole_and_loads_natively(
    saved_student: Path, tmp_path: Path
) -> None:
    out = exported(saved_student, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    kept = {path.name for path in saved_student.iterdir()} - {CODE_FILE}
    assert names == kept | {"README.md", "modeling_xlstm_llama.py"}
    ours = AutoModelForCausalLM.from_pretrained(saved_student)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded) is type(ours)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, ours(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(saved_student).chat_template


def test_weights_are_written_in_shards_and_converted(saved_student: Path, tmp_path: Path) -> None:
    out = exported(saved_student, tmp_path / "out", dtype="bfloat16", shard_size="400KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    before = AutoModelForCausalLM.from_pretrained(saved_student).state_dict()
    for file in files:
        with safe_open(out / file, "pt") as held:
            for name in held.keys():  # noqa: SIM118
                assert torch.equal(held.get_tensor(name), before[name].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_the_card_says_what_it_is(saved_student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = export(
        find_student(saved_student), out, QuietConsole(), version="1.2.3", licence="llama3.1"
    )
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "llama3.1"
    assert head["pipeline_tag"] == "text-generation"
    student = AutoModelForCausalLM.from_pretrained(saved_student)
    with torch.no_grad():
        cache = student(IDS[:1], use_cache=True).past_key_values
    assert made.state_bytes == cache.nbytes()
    assert f"| state of one sequence, of any length | {byte_size(cache.nbytes())} |" in card
    assert "trust_remote_code=True" in card
    assert "xlstm-distill 1.2.3" in card


def own_class(folder: Path) -> type:
    """Import an exported student's modeling file, and return its class of the language model."""
    (path,) = folder.glob("modeling_*.py")
    name = f"exported_{folder.parent.name}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.XlstmLlamaForCausalLM


def test_an_exported_student_that_keeps_attention_equals_itself(
    make_teacher, tmp_path: Path
) -> None:
    kept = {"layers": [1], "heads": {0: [0], 2: [1, 3]}}
    teacher = make_teacher(num_hidden_layers=3)
    student = convert(teacher, MixerConfig(window=6, sinks=2, attention=kept)).eval()
    student.save_pretrained(tmp_path / "saved")
    out = tmp_path / "out"
    made = export(find_student(tmp_path / "saved"), out, QuietConsole(), version="1.2.3")
    loaded = own_class(out).from_pretrained(out)
    assert type(loaded).__module__ != type(student).__module__
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # by the package
    loss = [model(IDS).logits.logsumexp(-1).sum() for model in (student, loaded, again)]
    for one in loss:
        one.backward()
    gradients = dict(student.named_parameters())
    for model in (loaded, again):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, gradients[name].grad), name
        tokens = model.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
        expected = student.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
        assert torch.equal(tokens, expected)
    with torch.no_grad():
        cache = student(IDS[:1], use_cache=True).past_key_values
    # Two keys and values in layer 1, one in layer 0, two in layer 2; fp32, D = 16.
    assert made.bytes_per_token == cache.bytes_per_token() == 5 * 2 * 16 * 4
    assert made.state_bytes == cache.nbytes() - 20 * made.bytes_per_token
    card = (out / "README.md").read_text()
    assert "Layers 1; heads 0 of layer 0; heads 1, 3 of layer 2 (from 0) keep" in card
    assert "| state of one sequence, and 640 bytes for each token |" in card
    assert "and 640 bytes for each token." in describe(made)[0]


def test_a_pipeline_takes_an_exported_student(saved_student: Path, tmp_path: Path) -> None:
    out = exported(saved_student, tmp_path / "out")
    student = AutoModelForCausalLM.from_pretrained(saved_student)
    tokenizer = AutoTokenizer.from_pretrained(saved_student)
    prompts = ["What is 3 + 4?", "a"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = own_class(out).from_pretrained(out)
    for given in (
        {"model": str(out), "trust_remote_code": True},
        {"model": alone, "tokenizer": AutoTokenizer.from_pretrained(out)},
    ):
        generate = pipeline("text-generation", **given)
        for prompt, (answer,) in zip(prompts, generate(prompts, **options), strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            row = student.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            assert answer["generated_text"] == tokenizer.decode(row, skip_special_tokens=True)


def test_nothing_is_written_over(saved_student: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"OUT: .* is there already"):
        exported(saved_student, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes"]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_itself_without_this_package(
    family: str, elsewhere: dict, students: dict[str, torch.nn.Module]
) -> None:
    student, found = students[family].eval(), elsewhere[family]
    student.zero_grad()
    student(IDS).logits.logsumexp(-1).sum().backward()
    with torch.no_grad():
        assert torch.equal(found["logits"], student(IDS).logits)
        assert torch.equal(found["body"], student.model(IDS).last_hidden_state)
        tokens = student.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(found["tokens"], tokens)
    for name, parameter in student.named_parameters():
        assert torch.equal(found["gradients"][name], parameter.grad), name


@pytest.fixture(scope="module")
def students(make_teacher) -> dict[str, torch.nn.Module]:
    """A tiny student of every family."""
    return {f: convert(make_teacher(f), MixerConfig(window=6, sinks=2)) for f in FAMILIES}


@pytest.fixture(scope="module")
def elsewhere(students, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the exported students do in a process that cannot import this project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for family, student in students.items():
        student.save_pretrained(folder / "saved" / family)
        exported(folder / "saved" / family, folder / family)
    # transformers copies modeling files into a cache before it runs them.
    environment = process_environment(HF_MODULES_CACHE=str(folder / "modules"))
    places = [str(folder / family) for family in students]
    command = [sys.executable, "-c", ELSEWHERE, str(folder / "made.pt"), *places]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = torch.load(folder / "made.pt")
    return {family: made[str(folder / family)] for family in students}


def test_uploading_names_the_repository_and_its_error(saved_student: Path, tmp_path: Path) -> None:
    calls = []

    class Hub:
        def create_repo(self, repository: str, **options: object) -> str:
            if "/" not in repository:
                raise HFValidationError("no owner")
            calls.append((repository, options))
            return f"hub/{repository}"

        def upload_folder(self, **options: object) -> None:
            calls.append(options)

    assert upload(tmp_path, "me/student", private=True, api=Hub()) == "hub/me/student"
    assert calls == [
        ("me/student", {"private": True, "exist_ok": True}),
        {"repo_id": "me/student", "folder_path": tmp_path},
    ]
    with pytest.raises(UserError, match="--push-to-hub: 'student' was not uploaded: no owner"):
        upload(tmp_path, "student", private=False, api=Hub())


def test_what_is_no_student_is_refused(root: Path, tmp_path: Path, saved_student: Path) -> None:
    with pytest.raises(UserError, match=r"is neither a run directory .* nor a model's"):
        find_student(tmp_path)
    with pytest.raises(UserError, match="model_type is 'llama', which is no student's"):
        find_student(root / "recipes" / "quickstart" / "teacher")
    with pytest.raises(UserError, match=r"--model: .* is a model already"):
        find_student(saved_student, "math")
    (tmp_path / "artifacts").mkdir()
    with pytest.raises(UserError, match="has no student yet"):
        find_student(tmp_path)
