"""transformers' Auto classes know students, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xlstm_distill import MixerConfig, convert

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
