"""Transformers' own common model tests: fetched for the installed version, never copied in.

The wheel of transformers has no tests; its source package has the common ones.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

PACKAGE = "transformers_common_tests"
# Mixins that the common tests derive from, and that the source package leaves out.
LEFT_OUT = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def fetch_suite(folder: Path) -> str | None:
    """Unpack the common tests into `folder`, as a package; return why that is impossible, or None.

    pip downloads the source package (11 MB), or takes it from its own cache.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # Else pip makes an environment with setuptools, only to read the package's name.
    command += ["--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
    command += [f"transformers=={transformers.__version__}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"the source package of transformers {transformers.__version__} cannot be fetched"
    (archive,) = folder.glob("transformers-*.tar.gz")
    package = folder / PACKAGE
    package.mkdir()
    with tarfile.open(archive) as packed:
        for member in packed.getmembers():
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                content = packed.extractfile(member)
                assert content is not None
                (package / parts[2]).write_bytes(content.read())
    for name, mixin in LEFT_OUT.items():
        file = package / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"class {mixin}:\n    pass\n")
    archive.unlink()
    return None


def import_suite(folder: Path, config: pytest.Config) -> ModuleType:
    """Import the common model tests that `fetch_suite` unpacked.

    config: pytest's, which must know the marks that the tests have.
    """
    for file in (folder / PACKAGE).glob("*.py"):
        for name in sorted(set(re.findall(r"\bmark\.(\w+)", file.read_text(encoding="utf-8")))):
            config.addinivalue_line("markers", f"{name}: a mark of transformers' tests")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{PACKAGE}.test_modeling_common")
    finally:
        sys.path.remove(str(folder))


class StudentTester:
    """What the common tests ask about a model: its sizes, a tiny configuration, and inputs."""

    is_training = True
    batch_size, seq_length = 3, 13
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, test: Any, config_class: Any) -> None:
        self.test, self.config_class = test, config_class

    def get_config(self) -> Any:
        """Make the configuration of a student with 2 layers, 4 heads of 8, 2 key/value heads."""
        return self.config_class(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            mixer={"window": 6, "sinks": 2},
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Make a configuration and a batch with padding on the left, which a student can cache."""
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}
