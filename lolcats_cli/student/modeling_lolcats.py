"""A merged student: the teacher's causal-LM class with hybrid attention.

Travels inside merged model folders, where the teacher's class replaces the one imported here.
"""

from __future__ import annotations

from transformers import LlamaForCausalLM as TeacherForCausalLM

from .configuration_lolcats import LolcatsConfig, TeacherConfig
from .mixin import MergedStudent, share_layout

share_layout(LolcatsConfig.model_type, TeacherForCausalLM, TeacherConfig.model_type)


class LolcatsForCausalLM(MergedStudent, TeacherForCausalLM):  # type: ignore[misc]
    """Loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; parameter names are the
    teacher's, plus those of the maps under each attention's `hybrid`."""

    config_class = LolcatsConfig
    _auto_class = "AutoModelForCausalLM"
