"""Softmax attention: that of the teacher, which the transfer imitates, and that of a student's layers that keep it.

Letters: see ../README.md; J keys, of which the queries' are the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .equation import cap_scores, repeat_heads


@dataclass(frozen=True)
class AttentionSpec:
    """The settings of a layer's softmax attention, which the model passes in addition to q, k and v.

    sinks [H]: a logit for each head, in the softmax besides those of the keys, with the value 0.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        known = {"scaling": self.scaling, "sliding_window": self.sliding_window, "softcap": self.softcap}
        return known if self.sinks is None else known | {"sinks": self.sinks.tolist()}

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> AttentionSpec:
        sinks = spec.get("sinks")
        return cls(**spec | {"sinks": None if sinks is None else torch.tensor(sinks, dtype=torch.float32)})


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, valid: Tensor | None = None) -> Tensor:
    """Causal softmax attention of the last T of J tokens.

    q [B, H, T, D], after RoPE; k and v [B, K, J, D], not repeated to the query heads; valid [B, J or more, the last of
    which count] bool, True for real tokens. -> [B, H, T, D] in q's dtype; the output of tokens that are not real is 0.
    """
    new, seen = q.shape[2], k.shape[2]
    whole = spec.sliding_window is None or spec.sliding_window >= seen
    by_scores = spec.softcap is not None or spec.sinks is not None
    if valid is None and not by_scores and whole and new in (1, seen):
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=new > 1, scale=spec.scaling, enable_gqa=gqa)
    if not by_scores:
        allowed, gqa = _allowed(q, k, spec, valid), q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=spec.scaling, enable_gqa=gqa)
    else:
        weights = _weights(q, k, spec, valid)
        out = (weights @ repeat_heads(v, q.shape[1]).float()).to(q.dtype)
    return out if valid is None else out * valid[:, None, -new:, None]


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, seen: Tensor) -> Tensor:
    """Softmax attention of one token, q [B, H, 1, D], to the keys where seen [B, J] bool, at least one in a row, in any
    order. Other arguments and result as for `softmax_attention`; the spec's window is not looked at."""
    allowed = seen[:, None, None]
    if spec.softcap is None and spec.sinks is None:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=spec.scaling, enable_gqa=gqa)
    weights = _normalise(_scores(q, k, spec).masked_fill(~allowed, -torch.inf), spec)
    return (weights @ repeat_heads(v, q.shape[1]).float()).to(q.dtype)


def softmax_scores(q: Tensor, k: Tensor, spec: AttentionSpec, valid: Tensor | None = None) -> Tensor:
    """What `softmax_attention` takes the exponentials of, [B, H, T, J] in fp32: -inf for keys that are not seen.
    A padded query sees every key."""
    return _scores(q, k, spec).masked_fill(~_allowed(q, k, spec, valid), -torch.inf)


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    scores = q.float() @ repeat_heads(k, q.shape[1]).float().transpose(-1, -2) * spec.scaling
    return cap_scores(scores, spec.softcap)


def softmax_weights(q: Tensor, k: Tensor, spec: AttentionSpec, valid: Tensor | None = None) -> Tensor:
    """The attention weights [B, H, T, J] in fp32 behind `softmax_attention`; rows of padded queries are zero,
    the others sum to 1, with sinks to less."""
    weights = _weights(q, k, spec, valid)
    return weights if valid is None else weights * valid[:, None, -q.shape[2] :, None]


def _weights(q: Tensor, k: Tensor, spec: AttentionSpec, valid: Tensor | None) -> Tensor:
    return _normalise(softmax_scores(q, k, spec, valid), spec)


def _normalise(scores: Tensor, spec: AttentionSpec) -> Tensor:
    if spec.sinks is None:
        return scores.softmax(-1)
    sinks = spec.sinks.to(scores)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def _allowed(q: Tensor, k: Tensor, spec: AttentionSpec, valid: Tensor | None) -> Tensor:
    """[T, J] or [B, 1, T, J] bool: which keys a query sees."""
    new, seen = q.shape[2], k.shape[2]
    position = torch.arange(seen, device=q.device)
    age = position[seen - new :, None] - position
    allowed = age >= 0
    if spec.sliding_window is not None:
        allowed &= age < spec.sliding_window
    if valid is not None:
        valid = valid[:, -seen:]
        # A query that sees no key gives NaN: one in padding may see all, and its output is put to 0.
        allowed = (allowed & valid[:, None, None]) | ~valid[:, None, -new:, None]
    return allowed
