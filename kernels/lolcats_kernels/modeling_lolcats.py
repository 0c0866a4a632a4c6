"""A merged student: the teacher's causal-LM class with hybrid attention."""

from __future__ import annotations

from typing import Any

import transformers

from .configuration_lolcats import LolcatsConfig
from .hf_student import MergedStudent, share_layout
from .teacher import BASE_CLASS, MODEL_CLASS, MODEL_TYPE

TeacherForCausalLM: Any = getattr(transformers, MODEL_CLASS)
share_layout(LolcatsConfig.model_type, TeacherForCausalLM, MODEL_TYPE)


class LolcatsForCausalLM(MergedStudent, TeacherForCausalLM):
    """Loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; parameter names are the
    teacher's, plus those of the maps under each attention's `hybrid`."""

    config_class = LolcatsConfig
    _auto_class = "AutoModelForCausalLM"


if BASE_CLASS is not None:
    TeacherModel: Any = getattr(transformers, BASE_CLASS)

    class LolcatsModel(MergedStudent, TeacherModel):
        """A student without its head; loads with `AutoModel.from_pretrained(folder, trust_remote_code=True)`."""

        config_class = LolcatsConfig
        _auto_class = "AutoModel"
