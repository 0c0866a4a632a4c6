"""Hybrid attention: windowed softmax and linear attention with one shared denominator (see ../README.md)."""

from .hybrid import BACKENDS, TERMS, hybrid_attention
from .maps import FEATURE_MAPS, LAYOUTS, LINEAR_FACTORS, HybridConfig, HybridMaps
from .reference import hybrid_attention_weights
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
