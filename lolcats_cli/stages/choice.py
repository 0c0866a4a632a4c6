"""What a transfer trains: which layers are converted, which layers and heads keep softmax, and every layer's sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from lolcats_kernels.spec import BY_LAYER

from lolcats_cli.errors import UsageError
from lolcats_cli.stages.activations import Source
from lolcats_cli.stages.importance import Importance, loss_at, share_out, share_steps, unit
from lolcats_cli.stages.kept import Kept
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.student.memory import cache_bytes, student_bytes

LONGEST_WINDOW = 3  # an automatic window is at most this part of a row: maps learn from the keys before it


@dataclass(frozen=True)
class Asked:
    """What a transfer is asked to convert, and what it is to choose by importance.

    Attributes:
        layers: convert these alone.
        kept: what keeps softmax attention.
        keep_auto, keep_heads: how many more layers and key heads are to keep it.
        auto: the names, in `TransferOptions`, of the sizes by layer that are to be chosen.
    """

    layers: list[int] | None
    kept: Kept
    keep_auto: int
    keep_heads: int
    auto: Collection[str]


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
    source: Source, options: TransferOptions, asked: Asked, measure: Callable[[int | None], Importance]
) -> Chosen:
    """What is trained. Layers that are not converted get the window 0 and no steps, where these are chosen.

    measure: measures the importance of the layers; with a window that of single key heads too. It is called if
        anything is to be chosen by importance, after all checks that need none.
    Raises UsageError for options that do not fit this capture.
    """
    layers, kept, importance = _layers(source, options, asked), asked.kept, None
    if asked.keep_auto or asked.keep_heads or asked.auto:
        importance = measure(options.hybrid.window if asked.keep_heads else None)
        kept = _with_most_needed(source, layers, asked, options.hybrid.window, importance)
        layers = [layer for layer in layers if layer not in kept.layers]
    options = replace(options, kept_heads=tuple(sorted(kept.heads)))
    if importance is not None:
        for name, with_sizes in _BY_IMPORTANCE.items():
            if name in asked.auto:
                options = with_sizes(source, layers, options, importance)
    return Chosen(layers, kept, options, importance)


def _layers(source: Source, options: TransferOptions, asked: Asked) -> list[int]:
    """The layers to train, before more are kept. Raises UsageError for options that do not fit this capture."""
    layers, kept = asked.layers, asked.kept
    kept.check_rest(source.layers, asked.keep_auto, asked.keep_heads)
    _check_importance(options, asked)
    for name in (*BY_LAYER, "steps"):
        given = getattr(options, name)
        if isinstance(given, tuple) and len(given) != len(source.layers):
            raise UsageError(
                f"{_option(name)} gives {len(given)} numbers; the teacher has {len(source.layers)} layers."
            )
    seq_len = source.capture.data["seq_len"]
    if options.window_dropout and not 0 < options.hybrid.slots < seq_len:
        raise UsageError(
            "--window-dropout trains on the keys before the window. It needs a --window above 0, and rows that are "
            f"longer than the {options.hybrid.slots} tokens that the window can see. These rows have {seq_len} tokens."
        )
    chosen = sorted(set(range(len(source.layers))) - kept.layers if layers is None else set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(source.layers):
        raise UsageError(
            f"--layers must be between 0 and {len(source.layers) - 1}, the layers of {source.capture.path}."
        )
    if other := sorted(set(chosen) - {i for i, info in enumerate(source.layers) if info.has_attention}):
        raise UsageError(f"Layer {other[0]} has no softmax attention to convert. Leave it out of --layers.")
    if both := kept.layers.intersection(chosen):
        raise UsageError(f"Layer {min(both)} is in --layers and in --keep-softmax. Choose one.")
    if "windows" in asked.auto:
        _check_memory(source, chosen, options, asked.keep_auto)
    return chosen


def _check_importance(options: TransferOptions, asked: Asked) -> None:
    """Raises UsageError for choices by importance that do not fit the other options."""
    auto, partial, window = asked.auto, asked.layers is not None, options.hybrid.window
    for word, what, wanted in (("auto:N", "layers", asked.keep_auto), ("heads:N", "heads", asked.keep_heads)):
        if wanted and partial:
            raise UsageError(f"--keep-softmax {word} looks at all layers. With --layers, name the {what} to keep.")
        if wanted and not window:
            raise UsageError(
                f"--keep-softmax {word} measures what layers lose with a window, and --window is 0. Name the {what}."
            )
    if "windows" in auto and (asked.keep_heads or asked.kept.heads):
        raise UsageError(
            "--windows auto goes by what whole layers lose, and --keep-softmax keeps some of their heads. Leave one of "
            "them out."
        )
    if auto and partial:
        raise UsageError(f"{_option(min(auto))} auto looks at all layers. With --layers, give every layer's.")
    if "feature_dims" in auto and options.hybrid.feature_map != "hedgehog":
        raise UsageError("--feature-dims auto is for Hedgehog's maps; those of others have the size of a head.")
    for name in ("feature_dims", "steps"):
        if name in auto and not window:
            raise UsageError(
                f"{_option(name)} auto goes by what layers lose with a window, and --window is 0. Give every layer's."
            )
    if "windows" in auto and not window:
        raise UsageError("--windows auto shares out the memory of --window, which is 0. Give it a window.")


def _with_most_needed(source: Source, chosen: list[int], asked: Asked, window: int, importance: Importance) -> Kept:
    """What keeps softmax: also those layers, and then those key heads of the others, that the loss needs most.

    Raises UsageError if no layer is left to be converted.
    """
    worst, kept = importance.by_loss(chosen, window), asked.kept
    heads = importance.heads_by_loss(worst[asked.keep_auto :]) if asked.keep_heads else []
    heads = [one for one in heads if one not in kept.heads][: asked.keep_heads]
    return Kept.of(source.layers, {*kept.layers, *worst[: asked.keep_auto]}, {*kept.heads, *heads})


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
    """With the memory that the feature sizes leave in longer windows of the layers that need them.

    Raises UsageError if feature sizes that were given leave none.
    """
    infos, hybrid = source.capture.teacher["layers"], options.hybrid
    _check_memory(source, chosen, options)
    left = sum(_memory(source, i, replace(options, feature_dims=None)) - _memory(source, i, options) for i in chosen)
    costs = {i: cache_bytes([infos[i]], 1, _itemsize(source)) * hybrid.slots // hybrid.window for i in chosen}
    losses = {layer: importance.curve(layer) for layer in chosen}
    longest = max(hybrid.window, source.capture.data["seq_len"] // LONGEST_WINDOW)
    found = share_out(losses, costs, hybrid.window, longest, left)
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
