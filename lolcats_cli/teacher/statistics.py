"""How far back a layer's softmax attention looks, and how widely: two figures of every row and head.

They cost 45% of the forward pass of the embedded teacher (one core, rows of 1,024 tokens), whose model is small beside
its attention; by operations, about 1% of an 8B model's.

Shapes: H query heads, K key heads, T time, D head, b queries of a block.
"""

from __future__ import annotations

import torch
from lolcats_kernels.softmax import AttentionSpec
from torch import Tensor

BLOCK_SCORES = {"cpu": 2**18, "gpu": 2**25}  # at a time, over all heads: what the cache holds; few kernels
UNSEEN = -1e30  # finite, so that its product with a weight of 0 is 0


@torch.no_grad()
def attention_statistics(
    q: Tensor, k: Tensor, spec: AttentionSpec, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Entropy and effective sequence length of one row, by head, from its weights a_ij of key j for query i.

    Args:
        q: [H, T, D], after RoPE.
        k: [K, T, D], not repeated to the query heads.
        spec: the layer's scaling, sliding window, soft cap and sinks.
        valid: [T] bool, true for real tokens; the others are left out.

    Returns:
        Entropy Σ_i Σ_j −a_ij log a_ij, in nats, and effective sequence length Σ_i Σ_j (i − j) a_ij (LoLCATs,
        arXiv 2410.10254), both [H] in fp32. A sink is one more key of every query, at no distance.
    """
    if valid is not None:
        q, k = q[:, valid], k[:, valid]
    (heads, time, dim), key_heads = q.shape, k.shape[0]
    keys = k.float().transpose(1, 2)  # [K, D, T]
    place = torch.arange(time, device=q.device)
    entropy, distance = (torch.zeros(heads, dtype=torch.float64, device=q.device) for _ in range(2))
    block = max(1, BLOCK_SCORES["cpu" if q.device.type == "cpu" else "gpu"] // (heads * max(time, 1)))
    for start in range(0, time, block):
        stop = min(start + block, time)
        first = 0 if spec.sliding_window is None else max(0, start - spec.sliding_window + 1)
        queries = q[:, start:stop].float() * spec.scaling
        # Key heads are not repeated: [K, H/K · b, D] @ [K, D, keys].
        scores = (queries.reshape(key_heads, -1, dim) @ keys[..., first:stop]).view(heads, stop - start, -1)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        age = place[start:stop, None] - place[None, first:stop]
        seen = age >= 0 if spec.sliding_window is None else (age >= 0) & (age < spec.sliding_window)
        scores += torch.where(seen, 0.0, UNSEEN)
        if spec.sinks is not None:
            sinks = spec.sinks.to(scores)[:, None, None].expand(heads, stop - start, 1)
            scores = torch.cat([scores, sinks], -1)
        scores -= scores.amax(-1, keepdim=True)
        weights = scores.softmax(-1)
        # log a_ij = scores_ij - log of the sum of their exponentials, which is 1 / the largest weight.
        entropy -= weights.amax(-1).log().sum(1, dtype=torch.float64)
        entropy -= (weights * scores).sum(-1).sum(1, dtype=torch.float64)
        weights = weights[..., : stop - first]
        # i - j is the place of i in the block + the distance of j from the block's start.
        back = (weights.reshape(-1, stop - first) @ (start - place[first:stop]).float()).view(heads, -1)
        seen_by = 1 if spec.sinks is None else weights.sum(-1)
        distance += (back + seen_by * (place[start:stop] - start)).sum(1, dtype=torch.float64)
    return entropy.float(), distance.float()
