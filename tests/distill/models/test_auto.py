"""transformers' Auto classes know students, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from processes import process_environment

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.families import FAMILIES

HYBRID = MixerConfig(window=8, sinks=2)


@pytest.mark.parametrize("order", ["xlstm_distill, transformers", "transformers, xlstm_distill"])
def test_auto_classes_know_students_in_either_import_order(order, tiny_teacher, tmp_path):
    convert(tiny_teacher(), HYBRID).save_pretrained(tmp_path)
    code = (
        f"import {order}; from transformers import AutoModelForCausalLM as A; "
        f"print(type(A.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("XlstmLlamaForCausalLM")


@pytest.mark.parametrize(
    "name",
    [
        # Each takes a process of its own, and these two load the most and the least.
        "Trainer",
        "AutoConfig",
        pytest.param("LlamaForCausalLM", marks=pytest.mark.slow),
        pytest.param("AutoTokenizer", marks=pytest.mark.slow),
        pytest.param("AutoModelForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_importing_this_package_first_breaks_no_import_of_transformers(name):
    subprocess.run(
        [sys.executable, "-c", f"import xlstm_distill; from transformers import {name}"], check=True
    )


def test_auto_config_alone_makes_the_real_configuration(tiny_teacher, tmp_path):
    convert(tiny_teacher(), HYBRID).save_pretrained(tmp_path)
    code = (
        "import xlstm_distill; from transformers import AutoConfig as A; "
        f"loaded = A.from_pretrained({str(tmp_path)!r}); made = A.for_model('xlstm_qwen2'); "
        "print(type(loaded).__name__, type(made).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["XlstmLlamaConfig", "XlstmQwen2Config"]


def test_every_auto_class_loads_a_student(tiny_teacher, tmp_path):
    student = convert(tiny_teacher(num_labels=3), HYBRID)
    student.save_pretrained(tmp_path)
    rows = torch.arange(3, 19).view(2, 8)
    expected = student.model(rows).last_hidden_state
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(body).__name__ == "XlstmLlamaModel"
    assert torch.equal(body(rows).last_hidden_state, expected)
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        auto = getattr(transformers, f"AutoModelFor{task}")
        model = auto.from_pretrained(tmp_path)
        assert type(model).__name__ == f"XlstmLlamaFor{task}"
        if task == "SequenceClassification":
            assert model(rows).logits.shape == (2, 3)
            model.score.weight.data.copy_(torch.eye(3, 64))
            torch.testing.assert_close(model(rows).logits, expected[:, -1, :3])
            model.save_pretrained(tmp_path / "classifier")
            again = auto.from_pretrained(tmp_path / "classifier")
            assert torch.equal(again(rows).logits, model(rows).logits)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_peft_knows_the_targets_of_students(family, tiny_teacher):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    student = convert(tiny_teacher(family), HYBRID)
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    names = [n for n, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    targets = {"qkv_proj"} if FAMILIES[family].fused else {"q_proj", "v_proj"}
    assert {name.rpartition(".")[2] for name in names} == targets
    assert len(names) == len(targets) * len(student.mixers())


LOAD = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "xlstm_distill":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hidden())
from transformers import AutoModelForCausalLM
def load():
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    load()
except ImportError as error:
    print(error)
del sys.meta_path[0]
print(type(load()).__name__)
"""


@pytest.mark.slow
def test_a_student_says_what_to_install_and_then_loads_without_the_import(tiny_teacher, tmp_path):
    convert(tiny_teacher(), HYBRID).save_pretrained(tmp_path / "student")
    environment = process_environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "student")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    refused, loaded = done.stdout.strip().rsplit("\n", 1)
    assert "pip install xlstm_distill" in refused, done.stderr
    assert loaded == "XlstmLlamaForCausalLM", done.stderr
