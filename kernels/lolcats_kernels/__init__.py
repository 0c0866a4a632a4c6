"""Hybrid attention: windowed softmax and linear attention with one shared denominator (see ../README.md)."""

from .hybrid import BACKENDS, hybrid_attention
from .maps import HybridMaps
from .reference import hybrid_attention_weights
from .spec import FEATURE_MAPS, LAYOUTS, LINEAR_FACTORS, TERMS, HybridConfig
from .state import KVState

__all__ = [
    "BACKENDS",
    "FEATURE_MAPS",
    "LAYOUTS",
    "LINEAR_FACTORS",
    "TERMS",
    "HybridConfig",
    "HybridMaps",
    "KVState",
    "hybrid_attention",
    "hybrid_attention_weights",
]
