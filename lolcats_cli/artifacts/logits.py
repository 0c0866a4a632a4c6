"""The likeliest next tokens of a teacher, as a capture stores them.

Log-probabilities rather than logits are kept, normalised over the whole vocabulary: so the mass of all other tokens is
known. They are kept as float16, whose rounding moves the KL divergence from a student by 8e-5 per token where it is
0.17 (root mean square; bfloat16 by 7e-4), because likely tokens have log-probabilities near 0.

Shapes: T tokens, V vocabulary, L likeliest next tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats_cli.errors import BadInput

DTYPES = {"ids": torch.int32, "log_probs": torch.float16}  # of the tensors of a file


def likeliest(logits: Tensor, count: int, valid: Tensor | None) -> dict[str, Tensor]:
    """`ids` and `log_probs` [T, L] of the next tokens that one row's logits [T, V] make likeliest, the likeliest first.

    Both are 0 behind padding. valid: [T] bool, which tokens are real; None: all are.

    Raises `BadInput` for logits that are NaN.
    """
    found, ids = logits.float().log_softmax(-1).topk(count)
    found = found.clamp(min=torch.finfo(DTYPES["log_probs"]).min)  # the probability is 0 there and below
    if valid is not None:
        padding = ~valid.to(logits.device)[:, None]
        found, ids = found.masked_fill(padding, 0), ids.masked_fill(padding, 0)
    if found.isnan().any():
        raise BadInput("The teacher predicts NaN, so its predictions cannot be stored. Try --dtype float32.")
    return {"ids": ids.to(DTYPES["ids"]), "log_probs": found.to(DTYPES["log_probs"])}
