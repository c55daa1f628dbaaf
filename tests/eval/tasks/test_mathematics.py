"""Mathematics is compared by Math-Verify, through lm-eval's own tasks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from xlstm_eval.loading import load_suite
from xlstm_eval.records import EvalError
from xlstm_eval.suites import Suite, SuiteTask

PROBLEM = {
    "problem": "What is one half?",
    "solution": r"It is $\boxed{\frac{1}{2}}$.",
    "answer": r"\frac{1}{2}",
}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """MATH500 with lm-eval's own file, and a problem of ours."""
    import lm_eval.tasks

    theirs = Path(lm_eval.tasks.__file__).parent / "minerva_math" / "minerva_math500.yaml"
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(PROBLEM) + "\n")
    (tmp_path / "minerva_math500.yaml").write_text(
        f"include: {theirs}\ntask: minerva_math500\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    )
    return Suite(include=tmp_path, tasks=(SuiteTask(name="minerva_math500", shots=0),))


def test_equal_answers_in_other_words_are_right(suite: Suite) -> None:
    pytest.importorskip("math_verify")
    (leaf,) = (leaf for _, leaf in load_suite(suite).leaves())
    doc = next(iter(leaf.test_docs()))
    for answer, right in ((r"So it is $\boxed{0.5}$.", 1), (r"$\boxed{\frac{2}{3}}$", 0)):
        assert leaf.process_results(doc, [answer])["math_verify"] == right


def test_missing_packages_are_named_with_the_fix(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    # lm-eval keeps what it has imported.
    for name in [name for name in sys.modules if name.endswith("minerva_math.utils")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(EvalError, match=r"minerva_math500 needs further packages.*\[suites\]"):
        load_suite(suite)
