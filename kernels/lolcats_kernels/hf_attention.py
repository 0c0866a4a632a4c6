"""Hybrid attention for transformers. It is registered once, and every layer's own maps compute it.

Letters: see ../README.md; T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .equation import join_heads, other_heads, take_heads
from .hf_adapters import has_indexer, key_mask
from .hf_cache import LolcatsCacheLayer, SoftmaxCacheLayer
from .hybrid import hybrid_attention
from .maps import HybridMaps
from .softmax import AttentionSpec, attend_to_all, softmax_attention
from .sparse import sparse_attention
from .spec import HybridConfig

NAME = "lolcats"


class HybridAttention(HybridMaps):
    """The maps of one attention layer, with what its calls need: lives at `self_attn.hybrid`.

    num_heads is the number of query heads that have maps. Those of the configuration's kept heads have softmax
    attention, whatever the terms.

    terms: which terms of eq. 7 (arXiv 2410.10254) are summed: both, window or linear; the last two are ablations.
    sparse_cache_size: keys that stay exact after they have left the window (see `sparse`), if both
        terms are summed; 0 is off.
    cache_layer: this layer's cache during one call of the attention module, else None.
    """

    def __init__(self, config: HybridConfig, num_heads: int, head_dim: int, layer_idx: int) -> None:
        super().__init__(config, num_heads, head_dim)
        self.layer_idx = layer_idx
        self.terms = "both"
        self.sparse_cache_size = 0
        self.cache_layer: LolcatsCacheLayer | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        sliding_window: int | None = None,
    ) -> Tensor:
        """query [B, H, T, D], key [B, K, T, D] and value [B, K, T, Dv] (new tokens only), valid [B, T] bool or None,
        sinks [H] or None -> [B, T, H, Dv]. Continues from, and advances, the cache layer when there is one.

        sliding_window: of the teacher's attention; for heads that keep it."""
        kept, count = self.config.kept_heads, key.shape[1]
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "valid": valid}
        if not kept:
            return self._hybrid(query, key, value, sinks=sinks, **options).transpose(1, 2).contiguous()
        others = other_heads(kept, count)

        def of(heads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (take_heads(x, heads, count) for x in (query, key, value))
            return q, k, v

        def sinks_of(heads: Sequence[int]) -> Tensor | None:
            return None if sinks is None else take_heads(sinks[None], heads, count)[0]

        hybrid = self._hybrid(*of(others), sinks=sinks_of(others), **options)
        spec = AttentionSpec(scaling, sliding_window, softcap, sinks_of(kept))
        layer = None if self.cache_layer is None else self.cache_layer.kept
        softmax = _kept_softmax(*of(kept), spec, valid, layer)
        return join_heads(hybrid, softmax, kept, count).transpose(1, 2).contiguous()

    def _hybrid(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """[B, H, T, Dv] of the heads that have maps. The options are those of `hybrid_attention`."""
        layer = self.cache_layer
        options["initial_state"] = None if layer is None else layer.state
        state: Any = None
        if self.sparse_cache_size and self.terms == "both":
            out, state = sparse_attention(query, key, value, self, size=self.sparse_cache_size, **options)
        elif layer is None:
            out = hybrid_attention(query, key, value, self, terms=self.terms, **options)
        else:
            options |= {"terms": self.terms, "return_state": True, "consume_state": True}
            out, state = hybrid_attention(query, key, value, self, **options)
        if layer is not None:
            layer.advance(state, query.shape[2])
        return out


def lolcats_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The function behind the attention implementation "lolcats" -> ([B, T, H, D], None).

    The work is done by `module.hybrid`, so that students of different versions live in one process; a layer that was
    kept says so (`keeps_softmax`). A sliding window of the teacher is applied in kept layers and heads alone: the maps
    were trained to imitate it. s_aux [H] are the model's sinks. Attention dropout is not applied.
    Raises ValueError for what would silently give something else: a layer without maps, a custom 4-D mask.
    """
    hybrid = getattr(module, "hybrid", None)
    kept = getattr(module, "keeps_softmax", False)
    where = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    if hybrid is None and not kept:
        raise ValueError(f"{where} has no feature maps. The attention implementation {NAME!r} is for students only.")
    attention_mask = key_mask(module, attention_mask)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"{where} got a custom attention mask of shape {tuple(attention_mask.shape)}. Linear attention is causal "
            "and takes a padding mask [batch, tokens] only."
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    sliding_window = cast(int | None, kwargs.get("sliding_window"))
    if kept:
        spec = AttentionSpec(scaling, sliding_window, softcap, s_aux)
        out = _kept_softmax(query, key, value, spec, attention_mask, getattr(module, "cache_layer", None))
        return out.transpose(1, 2).contiguous(), None
    assert hybrid is not None
    valid = None if attention_mask is None else attention_mask[:, -query.shape[2] :]
    return hybrid(query, key, value, valid, scaling, softcap, s_aux, sliding_window), None


def _kept_softmax(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, mask: Tensor | None, layer: SoftmaxCacheLayer | None
) -> Tensor:
    """Softmax attention of new tokens. key and value are those of all tokens, or with a layer of the new ones."""
    if layer is None:
        return softmax_attention(query, key, value, spec, mask)
    new = query.shape[2]
    real = None if mask is None else mask[:, -new:]
    key, value, valid = layer.extend(key, value, real)
    if new > 1:
        return softmax_attention(query, key, value, spec, valid)
    assert valid is not None
    if spec.sliding_window is not None and not layer.slides:
        valid = valid & (torch.arange(valid.shape[1], device=valid.device) >= layer.tokens - spec.sliding_window)
    if real is None:
        return attend_to_all(query, key, value, spec, valid)
    # A query in padding may see all, so that it sees something; its output is put to 0.
    return attend_to_all(query, key, value, spec, valid | ~real) * real[:, None, :, None]


def lolcats_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: object,
    attention_mask: Tensor | None = None,
    config: Any = None,
    device: Any = None,
    **kwargs: object,
) -> Tensor | None:
    """Which tokens are real, [B, tokens seen + T] bool; None if all are. Causality is the attention's own matter.

    attention_mask [B, tokens seen + T]: what transformers hands to mask functions. Models with indexers get [B, 1, 1,
    tokens seen + T] in any case. Of a cache with fixed addresses the tokens seen count as none: the mask is [B, T].
    """
    if has_indexer(config):
        ones = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        return (ones if attention_mask is None else attention_mask[:, -kv_length:].bool())[:, None, None]
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < q_length:
        raise ValueError(f"The attention mask covers {attention_mask.shape[1]} tokens, and the input has {q_length}.")
    mask = attention_mask[:, -kv_length:].bool()
    # Looking into the mask costs a synchronisation on GPUs: worth it for a long input, not for each decoded token.
    if q_length > 1 and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def register() -> None:
    """Registers "lolcats" with transformers. It may be called again."""
    AttentionInterface.register(NAME, lolcats_attention)
    AttentionMaskInterface.register(NAME, lolcats_mask)
