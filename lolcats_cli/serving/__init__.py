"""Serves merged students in vLLM.

`register` is this package's entry point in the group `vllm.general_plugins`. vLLM calls it in each of its processes.
"""

from __future__ import annotations

MODULE = "lolcats_cli.serving.model"
ARCHITECTURE, MOE_ARCHITECTURE = "LolcatsForCausalLM", "LolcatsMoEForCausalLM"


def register() -> None:
    """Registers students with vLLM, and with the transformers that it uses.

    It may be called more than once, and does not import torch.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    from lolcats_cli.serving.config import OptionChecks, placeholder, vllm_is_known

    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = placeholder(model_type)
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in (ARCHITECTURE, MOE_ARCHITECTURE):
        ModelRegistry.register_model(name, f"{MODULE}:{name}")
    if vllm_is_known():  # otherwise the configuration says so when a student is loaded, and other models go on working
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        MODELS_CONFIG_MAP |= dict.fromkeys((ARCHITECTURE, MOE_ARCHITECTURE), OptionChecks)
