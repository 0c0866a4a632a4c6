"""What the predictions of a teacher lose by each of its attentions that is converted, before anything is trained.

The attention of a layer becomes hybrid attention with maps as a training starts with them, everything else stays as it
is, and the KL divergence of the predictions from the teacher's is measured (arXiv 2512.20569 chooses softmax layers by
it, with trained maps). The order of the layers is that of trained maps. The errors of attention outputs, and what a
window alone misses, give another one (docs/quality.md).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from lolcats_formats import Artifact

from lolcats_cli.artifacts.layout import tokens_name
from lolcats_cli.loading.student import load_captured, load_hybrids
from lolcats_cli.progress import Progress
from lolcats_cli.stages.divergence import Change, Trained, Untrained, divergences
from lolcats_cli.teacher.data import Rows
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.record import LayerInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 4  # that are looked at
WINDOWS = (16, 64, 256, 1024, 4096, 16384)  # those below the length of the rows are measured
UNITS = 4  # a window grows by the mean window's part of this
HEADS_WINDOW = 64  # with which `rank` measures single heads


def measured_windows(seq_len: int) -> list[int]:
    """The windows that rows of this length can tell something about."""
    return [window for window in WINDOWS if window < seq_len] or [max(1, seq_len // 2)]


@dataclass(frozen=True)
class Importance:
    """What the teacher loses with each attention converted, in nats per token.

    Attributes:
        windows: that were measured.
        losses: by layer the loss with each of them.
        tokens: that were looked at.
        heads_window: with which single key heads were measured, if they were.
        heads: by layer the loss of every key head alone.
    """

    windows: tuple[int, ...]
    losses: dict[int, tuple[float, ...]]
    tokens: int
    heads_window: int | None = None
    heads: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def curve(self, layer: int, kept_heads: Collection[int] = ()) -> dict[int, float]:
        """By window the loss of this layer, without the part that these of its key heads have in the loss of all."""
        part = 1.0
        if kept_heads and (lost := sum(self.heads[layer])):
            part -= sum(self.heads[layer][head] for head in kept_heads) / lost
        return {window: loss * part for window, loss in zip(self.windows, self.losses[layer], strict=True)}

    def by_loss(self, windows: Mapping[int, int]) -> list[int]:
        """The layers whose windows these are, those first that lose most with them."""
        return sorted(windows, key=lambda layer: -loss_at(self.curve(layer), windows[layer]))

    def heads_by_loss(self, layers: Collection[int]) -> list[tuple[int, int]]:
        """Layer and key head of these layers' heads, those first that lose most."""
        losses = {(layer, head): loss for layer in layers for head, loss in enumerate(self.heads[layer])}
        return sorted(losses, key=lambda one: -losses[one])

    def beyond_windows(self, layers: Collection[int]) -> set[int]:
        """The layers that lose at least the mean of these layers with the longest window that was measured: what they
        look for lies beyond any window, so their features must hold it."""
        lost = {layer: self.losses[layer][-1] for layer in layers}
        return {layer for layer in layers if lost[layer] * len(lost) >= sum(lost.values())}

    def to_json(self) -> dict[str, Any]:
        """As `importance.json` holds it."""
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "windows": list(self.windows),
            "layers": {str(k): list(v) for k, v in self.losses.items()},
        }
        if self.heads_window is not None:
            found |= {"heads_window": self.heads_window, "heads": {str(k): list(v) for k, v in self.heads.items()}}
        return found

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Importance:
        """What `to_json` was called on."""
        losses, heads = (
            {int(layer): tuple(values) for layer, values in found.get(name, {}).items()} for name in ("layers", "heads")
        )
        return cls(tuple(found["windows"]), losses, found["tokens"], found.get("heads_window"), heads)


def measure_importance(
    model: PreTrainedModel,
    rows: Rows,
    layers: Sequence[LayerInfo],
    device: torch.device,
    progress: Progress,
    heads_window: int | None = None,
) -> Importance:
    """That of every layer with softmax attention, on the first of the rows.

    heads_window: measure single key heads too, with the longest measured window that is no longer than this.
    """
    rows, windows = _first(rows), measured_windows(rows.input_ids.shape[1])
    numbers = [number for number, info in enumerate(layers) if info.has_attention]
    changes = {number: [Untrained(number, window) for window in windows] for number in numbers}
    progress.note(f"measuring what {len(changes)} converted layers cost with windows of {', '.join(map(str, windows))}")
    found = Importance(tuple(windows), _by_layer(model, rows, changes, device, progress), rows.tokens)
    if heads_window is None:
        return found
    window = max((w for w in windows if w <= heads_window), default=windows[0])
    changes = {n: [Untrained(n, window, head) for head in range(layers[n].num_key_value_heads)] for n in numbers}
    progress.note(
        f"measuring what {sum(map(len, changes.values()))} converted key heads cost with a window of {window}"
    )
    return replace(found, heads_window=window, heads=_by_layer(model, rows, changes, device, progress))


def rank_capture(
    capture: Artifact, heads: bool, teacher: str | None, load: LoadOptions, progress: Progress
) -> dict[str, Any]:
    """Measures the layers of a captured teacher, and with `heads` every key head, on the capture's validation rows;
    -> what `Importance.to_json` gives.

    teacher: its folder, if it has moved. load: the device, and whether to trust the teacher's code.
    """
    layers = [LayerInfo.from_dict(layer) for layer in capture.teacher["layers"]]
    rows, device = Rows.from_tensors(capture.load(tokens_name("validation"))), load.resolved_device()
    model = load_captured(capture, teacher, load, progress)
    return measure_importance(model, rows, layers, device, progress, HEADS_WINDOW if heads else None).to_json()


def rank_transfer(transfer: Artifact, teacher: str | None, load: LoadOptions, progress: Progress) -> dict[str, Any]:
    """Measures what the converted layers cost the teacher's predictions, on the validation rows of the capture.

    Returns {"tokens": that were looked at, "all": the loss with all of them, "layers": by layer "alone", the loss with
    this one converted, and "others", that with all converted but this one}. Arguments as of `rank_capture`. Raises
    FormatError if the capture is gone.
    """
    capture, device = transfer.ancestor("capture"), load.resolved_device()
    rows = _first(Rows.from_tensors(capture.load(tokens_name("validation"))))
    hybrids = {layer: hybrid.to(device) for layer, hybrid in load_hybrids(transfer).items()}
    layers = tuple(sorted(hybrids))
    without = {layer: tuple(other for other in layers if other != layer) for layer in layers}
    asked = {layers, *((layer,) for layer in layers), *filter(None, without.values())}
    changes = {converted: Trained({layer: hybrids[layer] for layer in converted}) for converted in sorted(asked)}
    model = load_captured(capture, teacher, load, progress)
    found = divergences(model, rows, list(changes.values()), device, progress)
    losses = {(): 0.0} | dict(zip(changes, found, strict=True))
    return {
        "tokens": rows.tokens,
        "all": losses[layers],
        "layers": {str(i): {"alone": losses[i,], "others": losses[without[i]]} for i in layers},
    }


def _first(rows: Rows) -> Rows:
    """The rows that are looked at."""
    return rows.select(torch.arange(min(ROWS, len(rows))))


def _by_layer(
    model: PreTrainedModel,
    rows: Rows,
    changes: Mapping[int, Sequence[Change]],
    device: torch.device,
    progress: Progress,
) -> dict[int, tuple[float, ...]]:
    """By layer the divergences of its changes."""
    found = iter(divergences(model, rows, [x for several in changes.values() for x in several], device, progress))
    return {number: tuple(next(found) for _ in several) for number, several in changes.items()}


def unit(window: int) -> int:
    """The shortest window that `share_out` gives, by which it makes others longer."""
    return max(1, window // UNITS)


def share_out(
    losses: Mapping[int, Mapping[int, float]],
    costs: Mapping[int, int],
    window: int,
    most: Mapping[int, int],
    spare: int = 0,
) -> dict[int, int]:
    """Windows of the layers that lose least in sum and take no more memory than `window` in each of them.

    Args:
        losses: by layer the loss with each window that was measured.
        costs: by layer the bytes of a key and its value.
        window: keys, of every layer if all were alike.
        most: by layer the longest window that it gets.
        spare: bytes that they may take besides.

    Between and beyond the measured windows, the logarithm of a loss is a straight line over that of the window. Windows
    grow from a fourth of `window` in steps of that size, where a byte saves most.
    """
    step = unit(window)
    windows = {layer: min(step, most[layer]) for layer in losses}
    left = spare + sum(costs[layer] * (window - windows[layer]) for layer in losses)

    @cache
    def loss(layer: int, size: int) -> float:
        return loss_at(losses[layer], size)

    while True:
        best: tuple[float, int, int] | None = None
        for layer, now in windows.items():
            for longer in range(now + step, min(most[layer], now + left // costs[layer]) + 1, step):
                saved = (loss(layer, now) - loss(layer, longer)) / (costs[layer] * (longer - now))
                if saved > 0 and (best is None or saved > best[0]):
                    best = saved, layer, longer
        if best is None:
            return windows
        _, layer, longer = best
        left -= costs[layer] * (longer - windows[layer])
        windows[layer] = longer


def share_steps(losses: Mapping[int, float], total: int) -> dict[int, int]:
    """Steps of the layers, about `total` together: half of them in equal parts, half in proportion to the losses."""
    count, lost, even = len(losses), sum(losses.values()), total / len(losses)
    return {layer: round(even * (1 + (loss * count / lost if lost else 1)) / 2) for layer, loss in losses.items()}


def loss_at(measured: Mapping[int, float], window: int) -> float:
    """The loss with a window, from those with the measured ones."""
    points = [(math.log(w), math.log(max(loss, 1e-9))) for w, loss in sorted(measured.items())]
    if len(points) == 1:  # as if half the keys were missed twice as much
        return measured[min(measured)] * min(measured) / window
    x = math.log(window)
    after = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(after - 1, 0)], points[max(after, 1)]
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
