"""Students pass transformers' own common model tests."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from types import ModuleType

import pytest
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from xlstm_distill.models import student

NOT_APPLICABLE = {
    "test_generation_tester_mixin_inheritance": "the tests of `generate` are not in the source "
    "package; ours are in test_generation.py and test_decoding.py",
}
"""Tests that are left out, with the reason. docs/use.md lists what the suite skips by itself."""
LEAST_RUN = 60
"""Fewer tests than this would mean that the suite skips what students should pass."""

HEADS = {
    "Model": "MODEL_MAPPING_NAMES",
    "ForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> ModuleType:
    """The common tests of the installed version of transformers."""
    pytest.importorskip("parameterized", reason="parameterized is not installed")
    from transformers_suite import fetch_suite, import_suite

    folder = tmp_path_factory.mktemp("suite")
    if problem := fetch_suite(folder):
        pytest.skip(problem)
    return import_suite(folder, pytestconfig)


def cases(suite: ModuleType, family: str) -> unittest.TestSuite:
    """Collect the tests that apply, for a family's students."""
    from transformers_suite import StudentTester

    classes = tuple(getattr(student, f"Xlstm{family}{head}") for head in HEADS)

    class StudentTest(suite.ModelTesterMixin, unittest.TestCase):  # type: ignore[misc,name-defined]
        all_model_classes = classes
        # The suite's own word for models whose layers have no attention weights.
        has_attentions = False
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self) -> None:
            self.model_tester = StudentTester(self, classes[0].config_class)

    tests = [name for name in dir(StudentTest) if name.startswith("test_")]
    names = [name for name in tests if callable(getattr(StudentTest, name))]  # others are switches
    assert set(NOT_APPLICABLE) <= set(names)
    chosen = [name for name in names if name not in NOT_APPLICABLE]
    return unittest.TestSuite(StudentTest(name) for name in chosen)


@pytest.fixture
def warnings_on() -> Iterator[None]:
    """Have transformers log its warnings, which the suite reads; our commands make it quiet."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)


@pytest.mark.slow
@pytest.mark.usefixtures("warnings_on")
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_common_model_tests(family: str, suite: ModuleType, monkeypatch) -> None:
    for head, mapping in HEADS.items():
        # The suite finds out by these tables what a class takes and returns.
        table = getattr(modeling_auto, mapping)
        monkeypatch.setitem(table, f"xlstm_{family.lower()}", f"Xlstm{family}{head}")
    result = unittest.TestResult()
    cases(suite, family).run(result)
    failed = {test.id().rpartition(".")[2]: text for test, text in result.failures + result.errors}
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())
    assert result.testsRun - len(result.skipped) >= LEAST_RUN
