"""Students pass transformers' own common model tests."""

from __future__ import annotations

import unittest
from types import ModuleType

import pytest
from transformers.models.auto import modeling_auto

from xlstm_distill.models import student

NOT_APPLICABLE: dict[str, str] = {}
"""Tests that students do not pass, with the reason."""

HEADS = {
    "Model": "MODEL_MAPPING_NAMES",
    "ForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The common tests of the installed version of transformers."""
    pytest.importorskip("parameterized", reason="parameterized is not installed")
    from transformers_suite import fetch_suite, import_suite

    folder = tmp_path_factory.mktemp("suite")
    if problem := fetch_suite(folder):
        pytest.skip(problem)
    return import_suite(folder)


def cases(suite: ModuleType, family: str) -> unittest.TestSuite:
    """Collect the tests that apply, for a family's students."""
    from transformers_suite import StudentTester

    classes = tuple(getattr(student, f"Xlstm{family}{head}") for head in HEADS)

    class StudentTest(suite.ModelTesterMixin, unittest.TestCase):  # type: ignore[misc,name-defined]
        all_model_classes = classes
        # The suite's own word for models whose layers have no attention weights.
        has_attentions = False

        def setUp(self) -> None:
            self.model_tester = StudentTester(self, classes[0].config_class)

    names = [name for name in dir(StudentTest) if name.startswith("test_")]
    assert set(NOT_APPLICABLE) <= {name for name in names if callable(getattr(StudentTest, name))}
    return unittest.TestSuite(
        StudentTest(n)
        for n in names
        if n not in NOT_APPLICABLE and callable(getattr(StudentTest, n))
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_common_model_tests(family: str, suite: ModuleType, monkeypatch) -> None:
    for head, mapping in HEADS.items():
        # The suite finds out by these tables what a class takes and returns.
        names = {f"xlstm_{family.lower()}": f"Xlstm{family}{head}"}
        for module in (modeling_auto, suite):
            table = getattr(module, mapping)
            monkeypatch.setitem(table, *next(iter(names.items())))
    result = unittest.TestResult()
    cases(suite, family).run(result)
    failed = {test.id().rpartition(".")[2]: text for test, text in result.failures + result.errors}
    assert not failed, failed
