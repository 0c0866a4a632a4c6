"""What the predictions of a teacher lose if some of its attentions are replaced.

Shapes: B batch, H query heads, K key heads, T time, D head, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from lolcats_kernels import HybridConfig
from lolcats_kernels.hf_attention import HybridAttention
from lolcats_kernels.softmax import AttentionSpec, softmax_attention
from torch import Tensor

from lolcats_cli.artifacts.stores import blocks
from lolcats_cli.progress import Progress
from lolcats_cli.stages.activations import Batch
from lolcats_cli.stages.layer_start import start_at_softmax_mass
from lolcats_cli.teacher.blocks import block
from lolcats_cli.teacher.data import Rows
from lolcats_cli.teacher.record import LayerInfo, replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 8  # layers that are on the device at a time
DIGITS = 3  # that are kept of a measured loss


class Change(Protocol):
    """What computes some attentions in place of softmax attention; called as `replacing` says."""

    @property
    def first(self) -> int:
        """The first layer that it changes."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, spec: AttentionSpec
    ) -> Tensor | None: ...


class Trained:
    """The attentions of these layers are a student's."""

    def __init__(self, hybrids: Mapping[int, HybridAttention]) -> None:
        self.hybrids = hybrids
        self.first = min(hybrids)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, spec: AttentionSpec
    ) -> Tensor | None:
        return _attend(self.hybrids[layer], q, k, v, valid, spec) if layer in self.hybrids else None


class Untrained:
    """The attention of a layer, or of one of its key heads alone, has maps as a training starts with them: Hedgehog's,
    with a window, and a linear term with the mass that the softmax gives the older keys of the first row."""

    def __init__(self, layer: int, window: int, key_head: int | None = None) -> None:
        self.first, self.key_head = layer, key_head
        self._config = HybridConfig(window=window, linear_factor="exp")
        self._hybrid: HybridAttention | None = None

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, spec: AttentionSpec
    ) -> Tensor | None:
        if layer != self.first:
            return None
        if self._hybrid is None:
            info = LayerInfo(q.shape[1], k.shape[1], q.shape[3], spec, v.shape[3])
            hybrid = HybridAttention(self._config, info.num_heads, info.head_dim, layer).to(q.device)
            start_at_softmax_mass({0: hybrid}, [{0: Batch(q, k, v, valid)}], [info])
            self._hybrid = hybrid.requires_grad_(False)
        out = _attend(self._hybrid, q, k, v, valid, spec)
        if self.key_head is None:
            return out
        heads = q.shape[1] // k.shape[1]
        own = slice(self.key_head * heads, (self.key_head + 1) * heads)
        others = softmax_attention(q, k, v, spec, valid).transpose(1, 2).contiguous()
        others[:, :, own] = out[:, :, own]
        return others


def _attend(
    hybrid: HybridAttention, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """[B, T, H, D]"""
    out: Tensor = hybrid(q, k, v, valid, spec.scaling, spec.softcap, spec.sinks, spec.sliding_window)
    return out


def divergences(
    model: PreTrainedModel,
    rows: Rows,
    changes: Sequence[Change],
    device: torch.device,
    progress: Progress,
) -> list[float]:
    """KL(teacher || changed teacher) in nats per token, for each of the changes alone.

    model: the teacher, on the CPU or the device. It runs block by block, and the hidden states [T, E] of every change
    are held on the CPU between two blocks.
    """
    total = [0.0] * len(changes)
    with progress.task("rank", len(rows) * (len(changes) + 1), "passes") as advance:
        for number in range(len(rows)):
            row = rows.select(torch.tensor([number]))
            for index, found in enumerate(_row_divergences(model, row, changes, device, advance)):
                total[index] += found
    return [float(f"{x / max(1, rows.tokens):.{DIGITS}g}") for x in total]


@torch.no_grad()
def _row_divergences(
    model: PreTrainedModel,
    row: Rows,
    changes: Sequence[Change],
    device: torch.device,
    advance: Any,
) -> list[float]:
    """Those of one row, summed over its tokens."""
    count = model.config.get_text_config().num_hidden_layers
    hidden: dict[Change | None, Tensor | None] = {None: None}  # of the teacher as it is, and of what was changed
    found: dict[Change | None, float] = {}
    expected = torch.empty(0)
    for layers in blocks(count, BLOCK):
        with block(model, layers, device, logits=True) as run, replacing(model) as use:
            behind: dict[Change | None, Tensor | None] = {}
            for change in [*hidden, *(change for change in changes if change.first in layers)]:
                use(change)
                out = run(row.input_ids, row.valid, hidden[change if change in hidden else None])
                assert out is not None, "the last block gives logits"
                if layers.stop < count:
                    behind[change] = out.cpu()
                    continue
                predicted = (out[0] if row.valid is None else out[row.valid.to(out.device)]).float().log_softmax(-1)
                if change is None:
                    expected = predicted
                found[change] = F.kl_div(predicted, expected, reduction="sum", log_target=True).item()
                advance(1)
            hidden = behind
    return [found[change] for change in changes]
