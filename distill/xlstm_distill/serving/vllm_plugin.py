"""What vLLM calls when it starts: students are known by their class's name from then on.

vLLM calls this in each of its processes, also where it serves other models; so nothing heavy is
imported here.
"""

from __future__ import annotations

import warnings
from typing import Any

from xlstm_distill.models.families import FAMILIES

MODEL = "xlstm_distill.serving.vllm_model:VllmStudent"


def register() -> None:
    """Register the students of all families."""
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    except ImportError as error:
        # An error here would end vLLM, whatever it serves.
        warnings.warn(
            f"xlstm-distill: this version of vLLM serves no students (0.32 does): {error}",
            stacklevel=2,
        )
        return

    class StudentSettings(VerifyAndUpdateConfig):
        """Checks and completes vLLM's settings for a student."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            settle(vllm_config)

    for family in FAMILIES.values():
        name = f"Xlstm{family.class_prefix}ForCausalLM"
        ModelRegistry.register_model(name, MODEL)
        MODELS_CONFIG_MAP[name] = StudentSettings


def settle(config: Any) -> None:
    """Complete vLLM's settings for a student, and refuse those that it would not honour.

    config: vLLM's `VllmConfig`.

    Raises:
        ValueError: a setting does not apply.
    """
    refusals = {
        "enable_prefix_caching": (
            config.cache_config.enable_prefix_caching,
            "a state cannot be cut to a prefix; leave it out",
        ),
        "tensor_parallel_size": (
            config.parallel_config.tensor_parallel_size > 1,
            "a student runs on one device; use 1, and several servers for more throughput",
        ),
        "pipeline_parallel_size": (
            config.parallel_config.pipeline_parallel_size > 1,
            "a student runs on one device; use 1",
        ),
        "quantization": (
            config.model_config.quantization is not None,
            "students have no quantised layers; leave it out",
        ),
        "block_size": (
            config.cache_config.user_specified_block_size,
            "a page holds a state, and as many keys as that makes room for; leave it out",
        ),
        "kv_cache_dtype": (
            config.cache_config.cache_dtype != "auto",
            "states and rings have formats of their own, and kept attention has the weights'; "
            "leave it out",
        ),
        "speculative_config": (
            config.speculative_config is not None,
            "a state cannot give back tokens that were refused; leave it out",
        ),
    }
    for name, (given, why) in refusals.items():
        if given:
            raise ValueError(f"{name}: does not apply to a student: {why}.")
    # One block holds the whole state of a request, however long it is.
    config.cache_config.mamba_block_size = config.model_config.max_model_len
    config.cache_config.mamba_cache_mode = "none"
    # Prompts are read one after another, in a loop that no graph can hold.
    config.model_config.enforce_eager = True
