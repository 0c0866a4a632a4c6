"""Softmax attention recomputed from what was recorded: the target of attention transfer.

Shapes: B batch, H query heads, K key heads, T time, D head.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """What besides q, k and v decides a layer's softmax attention, as the model passed it."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None

    def to_dict(self) -> dict:
        return asdict(self)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, valid: Tensor | None = None) -> Tensor:
    """Causal softmax attention.

    Args:
        q: [B, H, T, D], after RoPE.
        k, v: [B, K, T, D], not repeated to the query heads.
        spec: the layer's scaling, sliding window and soft cap.
        valid: [B, T] bool, true for real tokens; the output of the others is zero.

    Returns:
        [B, H, T, D] in q's dtype.
    """
    groups, time = q.shape[1] // k.shape[1], q.shape[2]
    if valid is None and spec.softcap is None and (spec.sliding_window is None or spec.sliding_window >= time):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scaling, enable_gqa=groups > 1)
    allowed = _allowed(time, spec.sliding_window, q.device)
    if valid is not None:
        # A padded query would have no key at all and give NaN: let it see everything, then zero it.
        allowed = (allowed & valid[:, None, None, :]) | ~valid[:, None, :, None]
    if spec.softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=spec.scaling, enable_gqa=groups > 1)
    else:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = spec.softcap * torch.tanh(q.float() @ k.float().transpose(-1, -2) * spec.scaling / spec.softcap)
        out = (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)
    return out if valid is None else out * valid[:, None, :, None]


def softmax_scores(q: Tensor, k: Tensor, spec: AttentionSpec, valid: Tensor | None = None) -> Tensor:
    """What `softmax_attention` takes the exponentials of, [B, H, T, T] in fp32: -inf for keys that are not seen.
    A padded query sees every key."""
    groups = q.shape[1] // k.shape[1]
    scores = q.float() @ k.repeat_interleave(groups, dim=1).float().transpose(-1, -2) * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    allowed = _allowed(q.shape[2], spec.sliding_window, q.device)
    if valid is not None:
        allowed = (allowed & valid[:, None, None, :]) | ~valid[:, None, :, None]
    return scores.masked_fill(~allowed, float("-inf"))


def softmax_weights(q: Tensor, k: Tensor, spec: AttentionSpec, valid: Tensor | None = None) -> Tensor:
    """The attention weights [B, H, T, T] in fp32 behind `softmax_attention`; rows of padded queries are zero."""
    weights = softmax_scores(q, k, spec, valid).softmax(-1)
    return weights if valid is None else weights * valid[:, None, :, None]


def _allowed(time: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[T, T] bool: which keys (columns) a query (row) sees."""
    age = torch.arange(time, device=device)[:, None] - torch.arange(time, device=device)[None, :]
    allowed = age >= 0
    return allowed if sliding_window is None else allowed & (age < sliding_window)
