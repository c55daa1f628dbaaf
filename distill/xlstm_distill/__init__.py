"""Distill Transformer language models into hybrid xLSTM students.

Importing this package is cheap: torch loads with the first name that needs it. Students are known
to `AutoModelForCausalLM` once this package and transformers are imported, in either order.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xlstm_distill.models.auto import register_when_libraries_load

if TYPE_CHECKING:
    from xlstm_distill.models.decoding.compiled import compile_decoding as compile_decoding
    from xlstm_distill.models.decoding.files import load_cache as load_cache
    from xlstm_distill.models.decoding.files import save_cache as save_cache
    from xlstm_distill.models.student import convert as convert
    from xlstm_distill.recipe import MixerConfig as MixerConfig

__version__ = "0.1.0"
__all__ = [
    "MixerConfig",
    "__version__",
    "compile_decoding",
    "convert",
    "load_cache",
    "save_cache",
]

_EXPORTS = {
    "MixerConfig": "xlstm_distill.recipe",
    "compile_decoding": "xlstm_distill.models.decoding.compiled",
    "convert": "xlstm_distill.models.student",
    "load_cache": "xlstm_distill.models.decoding.files",
    "save_cache": "xlstm_distill.models.decoding.files",
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'xlstm_distill' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


register_when_libraries_load()
