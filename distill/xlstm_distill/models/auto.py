"""Register students with transformers' Auto classes without importing transformers."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
STAND_INS = "xlstm_distill.models.auto_configs"


class _LoadThenRegister(importlib.abc.Loader):
    """Run the wrapped loader, then import the stand-ins, which register themselves."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(STAND_INS)


class _AutoConfigFinder(importlib.abc.MetaPathFinder):
    """Find the module that holds `AutoConfig`, once, and have it register the students."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO_CONFIG:
            return None
        # First, so that the search below asks the finders that would have been asked without us.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader)
        return spec


def register_when_transformers_loads() -> None:
    """Register the students now if `AutoConfig` is loaded, else at the moment it loads.

    A user may import this package before or after transformers, and the command line must answer
    `--help` without loading transformers. A hook on the import of one module serves all three.

    The hook imports stand-ins only. The students' classes derive from classes that transformers
    is often in the middle of importing at that moment.
    """
    # transformers loads its modules at first use, so this one may be missing even after `import
    # transformers`.
    if AUTO_CONFIG in sys.modules:
        importlib.import_module(STAND_INS)
    else:
        sys.meta_path.insert(0, _AutoConfigFinder())
