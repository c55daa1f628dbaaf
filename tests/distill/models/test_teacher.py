"""Teachers that cannot be distilled are refused before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.models.teacher import check_teacher, load_teacher
from xlstm_distill.recipe import Teacher


def test_weights_of_four_bits_are_refused_with_the_way_out(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"are in MXFP4, .*Mxfp4Config\(dequantize=True\)"):
        check_teacher(Teacher(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    check_teacher(Teacher(path=str(tmp_path)))


def test_a_teacher_that_lacks_a_weight_is_refused(make_teacher, tmp_path: Path) -> None:
    """transformers would draw it at random."""
    teacher = make_teacher()
    weights = teacher.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    teacher.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"no weight model\.layers\.1\.mlp\.up_proj\.weight \(1 "):
        load_teacher(Teacher(path=str(tmp_path)))
