"""Configuration of a merged student: the teacher's, under a model type of its own."""

from __future__ import annotations

from typing import Any

import transformers

from .teacher import CONFIG_CLASS, MODEL_TYPE

TeacherConfig: Any = getattr(transformers, CONFIG_CLASS)


class LolcatsConfig(TeacherConfig):
    """The teacher's configuration plus `lolcats`: {"hybrid": {...}, "layers": [...], "num_heads", "head_dim"}, and
    `sparse_cache_size`: how many keys a layer keeps exactly beside its window (LoLA, arXiv 2505.23666).

    The type is never the teacher's: a student that loaded as a plain softmax model would give something else.
    """

    model_type = f"lolcats_{MODEL_TYPE}"
    _auto_class = "AutoConfig"

    lolcats: dict[str, Any] | None = None
    sparse_cache_size: int = 0
