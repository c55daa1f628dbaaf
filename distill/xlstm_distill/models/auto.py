"""Register students with transformers' Auto classes, and with peft, without importing either."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
STAND_INS = "xlstm_distill.models.auto_configs"
PEFT_CONSTANTS = "peft.utils.constants"


class _LoadThenRegister(importlib.abc.Loader):
    """Run the wrapped loader, then register the students."""

    def __init__(self, loader: importlib.abc.Loader, register: Callable[[], None]) -> None:
        self.loader, self.register = loader, register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.register()


class _Finder(importlib.abc.MetaPathFinder):
    """Find the module that holds a registry, once, and have the students registered there."""

    def __init__(self, name: str, register: Callable[[], None]) -> None:
        self.name, self.register = name, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        # First, so that the search below asks the finders that would have been asked without us.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader, self.register)
        return spec


def register_when_libraries_load() -> None:
    """Register the students where transformers and peft are loaded, else at the moment they load.

    A user may import this package before or after them, and the command line must answer `--help`
    without loading transformers. A hook on the import of one module serves all three.

    With transformers the hook registers stand-ins only. The students' classes derive from classes
    that transformers is often in the middle of importing at that moment.
    """
    for module, register in ((AUTO_CONFIG, _register_configs), (PEFT_CONSTANTS, _register_targets)):
        # Libraries load their modules at first use, so this one may be missing even after `import
        # transformers`.
        if module in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _Finder(module, register))


def _register_configs() -> None:
    importlib.import_module(STAND_INS)


def _register_targets() -> None:
    """Give peft the default target modules of students: those of their teachers.

    Where peft knows no teacher of the family, and would choose two projections of Llama's, it is
    these, or the projection that the family has in their place.
    """
    families = importlib.import_module("xlstm_distill.models.families").FAMILIES
    constants = vars(importlib.import_module(PEFT_CONSTANTS))
    for name, targets in constants.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("TARGET_MODULES_MAPPING"):
            for model_type, family in families.items():
                known = targets.get(model_type)
                if known is None and targets.get("llama") == ["q_proj", "v_proj"]:
                    known = ["qkv_proj"] if family.fused else ["q_proj", "v_proj"]
                if known is not None:
                    targets.setdefault(f"xlstm_{model_type}", known)
