"""Configuration of a merged student: the teacher's, under a model type of its own.

Travels inside merged model folders, where the teacher's class replaces the one imported here.
"""

from __future__ import annotations

from transformers import LlamaConfig as TeacherConfig


class LolcatsConfig(TeacherConfig):
    """The teacher's configuration plus `lolcats`: {"hybrid": {...}, "layers": [...], "num_heads", "head_dim"}, and
    `sparse_cache_size`: how many keys a layer keeps exactly beside its window (LoLA, arXiv 2505.23666).

    The type is never the teacher's: a student that loaded as a plain softmax model would give something else.
    """

    model_type = "lolcats_llama"
    _auto_class = "AutoConfig"

    lolcats: dict | None = None
    sparse_cache_size: int = 0
