"""What a transfer trains: which layers are converted, which layers and heads keep softmax, and every layer's sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from lolcats_cli.errors import UsageError
from lolcats_cli.stages.activations import Source
from lolcats_cli.stages.asked import Asked
from lolcats_cli.stages.importance import Importance, loss_at, share_out, share_steps, unit
from lolcats_cli.stages.kept import Kept
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.student.memory import cache_bytes, student_bytes

LONGEST_WINDOW = 3  # an automatic window is at most this part of a row: maps learn from the keys before it


class Chosen(NamedTuple):
    """What a transfer trains.

    Attributes:
        layers: that are converted.
        kept: what keeps softmax attention.
        options: with the kept heads, and with the sizes by layer that were chosen.
        importance: what they were chosen by, if anything was.
    """

    layers: list[int]
    kept: Kept
    options: TransferOptions
    importance: Importance | None


def choose(
    source: Source,
    options: TransferOptions,
    asked: Asked,
    layers: list[int],
    kept: Kept,
    measure: Callable[[int | None], Importance],
) -> Chosen:
    """What is trained. Layers that are not converted get the window 0 and no steps, where these are chosen.

    layers, kept: as `asked.check` gives them.
    measure: measures the importance of the layers; with a window that of single key heads too. It is called if
        anything is to be chosen by importance, after all checks that need none.
    Raises UsageError if feature sizes that were given leave no memory for windows, or no layer is left to be converted.
    """
    options, importance = replace(options, kept_heads=tuple(sorted(kept.heads))), None
    by_heads = asked.keep_heads or (kept.heads and "windows" in asked.auto)
    if "windows" in asked.auto and not asked.keep_heads:  # else the heads decide what memory is left
        _check_memory(source, layers, options, asked.keep_auto)
    if asked.keep_auto or asked.keep_heads or asked.auto:
        importance = measure(max(map(asked.window_of, layers)) if by_heads else None)
        kept = _with_most_needed(source, layers, kept, asked, importance)
        layers = [layer for layer in layers if layer not in kept.layers]
    options = replace(options, kept_heads=tuple(sorted(kept.heads)))
    if importance is not None:
        for name, with_sizes in _BY_IMPORTANCE.items():
            if name in asked.auto:
                options = with_sizes(source, layers, options, importance)
    return Chosen(layers, kept, options, importance)


def _with_most_needed(source: Source, chosen: list[int], kept: Kept, asked: Asked, importance: Importance) -> Kept:
    """What keeps softmax: also those layers, and then those key heads of the others, that the loss needs most.

    Raises UsageError if no layer is left to be converted.
    """
    worst = importance.by_loss({layer: asked.window_of(layer) for layer in chosen})
    heads = importance.heads_by_loss(worst[asked.keep_auto :]) if asked.keep_heads else []
    heads = [one for one in heads if one not in kept.heads][: asked.keep_heads]
    return Kept.of(source.capture.teacher["layers"], {*kept.layers, *worst[: asked.keep_auto]}, {*kept.heads, *heads})


def _with_feature_dims(
    source: Source, chosen: list[int], options: TransferOptions, importance: Importance
) -> TransferOptions:
    """With half of the columns in layers that need little beyond any window."""
    wide, whole = importance.beyond_windows(chosen), options.hybrid.feature_dim
    return replace(
        options, feature_dims=tuple(whole if i in wide else -(-whole // 2) for i in range(len(source.layers)))
    )


def _with_windows(
    source: Source, chosen: list[int], options: TransferOptions, importance: Importance
) -> TransferOptions:
    """With the memory that the feature sizes leave in longer windows of the layers that need them. What kept heads of a
    layer lose and take is left out of both.

    Raises UsageError if feature sizes that were given leave none.
    """
    infos, hybrid = source.capture.teacher["layers"], options.hybrid
    _check_memory(source, chosen, options)
    left = sum(_memory(source, i, replace(options, feature_dims=None)) - _memory(source, i, options) for i in chosen)
    kept = {i: options.layer_hybrid(i).kept_heads for i in chosen}
    costs = {}
    for i in chosen:
        others = {**infos[i], "num_key_value_heads": infos[i]["num_key_value_heads"] - len(kept[i])}
        costs[i] = cache_bytes([others], 1, _itemsize(source)) * hybrid.slots // hybrid.window
    losses = {layer: importance.curve(layer, kept[layer]) for layer in chosen}
    longest = max(hybrid.window, source.capture.data["seq_len"] // LONGEST_WINDOW)
    # More than the teacher sees would harm.
    most = {i: min(longest, infos[i].get("sliding_window") or longest) for i in chosen}
    found = share_out(losses, costs, hybrid.window, most, left)
    return replace(options, windows=tuple(found.get(layer, 0) for layer in range(len(source.layers))))


def _check_memory(source: Source, layers: list[int], options: TransferOptions, fewer: int = 0) -> None:
    """Raises UsageError if the shortest automatic windows of these layers, or of any that are so many fewer, take more
    memory than all layers alike: feature sizes were given that leave none."""
    alike = replace(options, feature_dims=None)
    least = replace(options, windows=(unit(options.hybrid.window),) * len(source.layers))
    left = sorted(_memory(source, layer, alike) - _memory(source, layer, least) for layer in layers)
    if sum(left[fewer:]) < 0:
        raise UsageError("--feature-dims leave no memory for --windows auto. Give fewer columns, or a longer --window.")


def _memory(source: Source, layer: int, options: TransferOptions) -> int:
    """The bytes that a sequence takes in this layer."""
    infos = source.capture.teacher["layers"]
    others = set(range(len(infos))) - {layer}
    return student_bytes(infos, options.to_config()["hybrid"], others, 0, _itemsize(source))


def _itemsize(source: Source) -> int:
    """The bytes of an element of a key."""
    return int(getattr(torch, source.capture.config["dtype"]).itemsize)


def _with_steps(source: Source, chosen: list[int], options: TransferOptions, importance: Importance) -> TransferOptions:
    """With as many steps in all, more of them for the layers that lose most with their windows."""
    rows = source.rows["train"]
    losses = {layer: loss_at(importance.curve(layer), options.layer_hybrid(layer).window) for layer in chosen}
    found = share_steps(losses, sum(options.total_steps(layer, rows) for layer in chosen))
    return replace(options, steps=tuple(found.get(layer, 0) for layer in range(len(source.layers))))


# In this order: windows take what columns leave, and steps go by the loss with the windows.
_BY_IMPORTANCE = {"feature_dims": _with_feature_dims, "windows": _with_windows, "steps": _with_steps}
