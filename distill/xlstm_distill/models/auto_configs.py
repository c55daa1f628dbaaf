"""Stand-ins for the students' configurations, replaced when the first student is loaded."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from xlstm_distill.models.families import FAMILIES


class _StandIn(PreTrainedConfig):
    """Registered under a student's model type; calling it makes the real class's configuration."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Python calls __init__ only on instances of this class, and the real one is none.
        return cls._real()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real().from_dict(*args, **kwargs)

    @classmethod
    def _real(cls) -> Any:
        """Import the students, which replaces this class in the registry; return the real one."""
        students = importlib.import_module("xlstm_distill.models.student").STUDENTS
        return students[cls.model_type.removeprefix("xlstm_")].config_class


for _model_type in FAMILIES:
    _name = f"xlstm_{_model_type}"
    AutoConfig.register(
        _name, type("_StandIn", (_StandIn,), {"__module__": __name__, "model_type": _name})
    )
