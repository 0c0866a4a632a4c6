"""The losses of `lora`, summed over tokens.

Shapes: B batch, T time, V vocabulary, N predicted tokens, L likeliest next tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not predicted
IMPOSSIBLE = -100.0  # the smallest log-probability of all other tokens together: e^-100 is 0 in fp32


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log likelihood, summed over the predicted tokens. logits: [B, T, V]. labels: [B, T]."""
    flat = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over the whole vocabulary, summed over tokens. logits, teacher: logits [N, V]."""
    wanted, found = (x.float().log_softmax(-1) for x in (teacher, logits))
    return F.kl_div(found, wanted, reduction="sum", log_target=True)


def divergence_of_likeliest(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL(teacher || student) over the teacher's likeliest tokens and one class for all others, summed over tokens.

    This is a divergence of two distributions, as TRL's `loss_add_tail` makes it, and never more than that over the
    whole vocabulary. Without the class for the rest it would be neither, and the student could lower it by giving the
    likeliest tokens more than the teacher does.

    Args:
        logits: the student's [N, V].
        ids, log_probs: [N, L] of the teacher, see `artifacts/logits.py`.
    """
    logits, wanted, ids = logits.float(), log_probs.float(), ids.long()
    total = logits.logsumexp(-1)
    likely = logits.gather(-1, ids) - total[:, None]
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - total
    rest = (1 - wanted.exp().sum(-1)).clamp(min=0)  # rounding may leave a little less than nothing
    of_rest = torch.xlogy(rest, rest) - rest * others.clamp(min=IMPOSSIBLE)
    return (wanted.exp() * (wanted - likely)).sum() + of_rest.sum()
