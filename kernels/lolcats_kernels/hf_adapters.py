"""Adapters for attentions of transformers that do not use its attention interface. Each function here does what one
class does around its attention, and calls `attend` for the attention itself.

Letters: see ../README.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hf_cache import given_cache

Attend = Callable[..., tuple[Tensor, Any]]  # an attention function of transformers' interface


def _heads(hidden_states: Tensor, size: int, *projections: Any) -> Iterator[Tensor]:
    """What each projection makes of the hidden states, cut into heads [B, heads, T, size]."""
    return (project(hidden_states).unflatten(-1, (-1, size)).transpose(1, 2) for project in projections)


def _with_past(kw: dict[str, Any], module: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of all tokens, the new ones in the cache too, if the arguments hold one."""
    past = given_cache(kw.values())
    return (k, v) if past is None else past.update(k, v, module.layer_idx)


def _gpt(attend: Attend, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *_: Any) -> Any:
    """Takes the place of a method `_attn`: of GPT-J and CodeGen, GPT-Neo, and the Japanese GPT-NeoX."""
    root: Any = getattr(module, "scale_attn", getattr(module, "norm_factor", 1.0))
    window = module.config.window_size if getattr(module, "attention_type", "") == "local" else None
    out, weights = attend(module, query, key, value, mask, scaling=1 / float(root), sliding_window=window)
    return out.transpose(1, 2), weights


def _openai(attend: Attend, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *_: Any) -> Any:
    """Takes the place of the first GPT's `_attn`; key comes transposed."""
    scaling = value.shape[-1] ** -0.5 if module.scale else 1.0
    out, _ = attend(module, query, key.transpose(2, 3), value, mask, scaling=scaling)
    return [out.transpose(1, 2)]


def _bert(attend: Attend, module: Any, hidden_states: Tensor, attention_mask: Any = None, *_: Any, **kw: Any) -> Any:
    """BERT's attention as it was before the interface."""
    q, k, v = _heads(hidden_states, module.attention_head_size, module.query, module.key, module.value)
    k, v = _with_past(kw, module, k, v)
    out, weights = attend(module, q, k, v, attention_mask, scaling=1 / math.sqrt(module.attention_head_size))
    return out.flatten(2), weights


def _bart(attend: Attend, module: Any, hidden_states: Tensor, *_: Any, **kw: Any) -> Any:
    """BART's attention as it was before the interface."""
    q, k, v = _heads(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    k, v = _with_past(kw, module, k, v)
    out, weights = attend(module, q, k, v, kw.get("attention_mask"), scaling=module.scaling)
    return module.out_proj(out.flatten(2)), weights


def _falcon(attend: Attend, module: Any, hidden_states: Tensor, alibi: Any, attention_mask: Any, **kw: Any) -> Any:
    """Falcon's with RoPE. Its fused projection gives keys and values that are repeated to the query heads, or one."""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    q, k, v = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    if module.new_decoder_architecture:
        k, v = (x[:, :: module.num_heads // module.num_kv_heads] for x in (k, v))
    q, k = rotate(q, k, *kw["position_embeddings"])
    k, v = _with_past(kw, module, k, v)
    out, weights = attend(module, q, k, v, attention_mask, scaling=module.head_dim**-0.5)
    return module.dense(out.flatten(2)), weights


def _diffllama(
    attend: Attend, module: Any, hidden_states: Tensor, position_embeddings: Any, *args: Any, **kw: Any
) -> Any:
    """DiffLlama's differential attention, which attends twice with the same weights: once, to both halves of v."""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    q, k, v = _heads(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    q, k = rotate(q, k, *position_embeddings)
    k, v = _with_past(kw, module, k, v)
    v = torch.cat([half.repeat(1, 2, 1, 1) for half in v.chunk(2, dim=1)], dim=-1)
    mask = kw.get("attention_mask", args[0] if args else None)
    out, weights = attend(module, q, k, v, mask, scaling=module.scaling)
    first, second = out.chunk(2, dim=2)
    plus, minus = (
        (a * b).sum(-1, dtype=torch.float32).exp().to(q.dtype)
        for a, b in ((module.lambda_q1, module.lambda_k1), (module.lambda_q2, module.lambda_k2))
    )
    out = (1 - module.lambda_init) * module.groupnorm(first - (plus - minus + module.lambda_init) * second)
    return module.o_proj(out.flatten(2)), weights


# Class -> the method that is replaced, and by what.
ADAPTERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "GPTJAttention": ("_attn", _gpt),
    "CodeGenAttention": ("_attn", _gpt),
    "GPTNeoSelfAttention": ("_attn", _gpt),
    "GPTNeoXJapaneseAttention": ("_attn", _gpt),
    "Attention": ("_attn", _openai),
    "MegatronBertSelfAttention": ("forward", _bert),
    "RemBertSelfAttention": ("forward", _bert),
    "GitSelfAttention": ("forward", _bert),
    "BigBirdSelfAttention": ("forward", _bert),
    "XGLMAttention": ("forward", _bart),
    "MvpAttention": ("forward", _bart),
    "TrOCRAttention": ("forward", _bart),
    "FalconAttention": ("forward", _falcon),
    "DiffLlamaAttention": ("forward", _diffllama),
}
_OPENAI = "transformers.models.openai."


def adapter(module: nn.Module) -> tuple[str, Callable[..., Any]] | None:
    """The method that an adapter replaces, and the adapter; None for a module that needs none."""
    kind = type(module)
    if kind.__name__ == "Attention" and not kind.__module__.startswith(_OPENAI):
        return None
    if kind.__name__ == "FalconAttention" and module.config.alibi:  # type: ignore[union-attr]
        return None
    return ADAPTERS.get(kind.__name__) if kind.__module__.startswith("transformers.") else None


def number_by_name(name: str, module: nn.Module) -> None:
    """Some attentions that have an adapter do not know the number of their layer; their names do."""
    if adapter(module) is not None and not isinstance(getattr(module, "layer_idx", None), int):
        module.layer_idx = next(int(part) for part in name.split(".") if part.isdigit())  # type: ignore[assignment]


def has_indexer(config: Any) -> bool:
    """Whether layers choose by an indexer which keys their attention sees (DeepSeek's sparse attention)."""
    return hasattr(config, "index_topk") or hasattr(config, "indexer_budget")


def adapt(model: nn.Module, attend: Attend) -> Callable[[], None]:
    """Lead every attention in `model` that has an adapter through `attend`, and let indexers choose nothing, until what
    is returned is called. A student needs no choice of keys, and its teacher must not have made one (see `capture`)."""
    undo: list[tuple[nn.Module, str, Any]] = []

    def replace(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        name = "_old_forward" if name == "forward" and hasattr(module, "_hf_hook") else name  # accelerate calls that
        undo.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = function

    for place, module in list(model.named_modules()):
        number_by_name(place, module)
        found = adapter(module)
        if found is not None:
            replace(module, found[0], partial(found[1], attend, module))
        indexer = getattr(module, "indexer", None)
        if isinstance(indexer, nn.Module) and hasattr(module, "layer_idx"):
            replace(indexer, "forward", _choose_nothing)

    def restore() -> None:
        for module, name, before in reversed(undo):
            module.__dict__.pop(name)
            if before is not None:
                module.__dict__[name] = before

    return restore


def _choose_nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=hidden_states.device)


def key_mask(module: nn.Module, mask: Tensor | None) -> Tensor | None:
    """The mask that an attention got, as [B, J] bool if it is one of keys [B, 1, 1, J], true or 0.0 for real ones, from
    a model that needs that shape; others as they are."""
    needs = has_indexer(getattr(module, "config", None)) or type(module).__module__.startswith(_OPENAI)
    if mask is None or not needs or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return mask
    mask = mask[:, 0, 0]
    return mask if mask.dtype == torch.bool else mask == 0
