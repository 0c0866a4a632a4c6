"""What a transfer is asked for, and whether it fits the capture. It is checked without torch, as mistakes are told at
once; the stage checks again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lolcats_formats import Artifact

from lolcats_cli.errors import UsageError
from lolcats_cli.stages.kept import Kept, check_there, counted


@dataclass(frozen=True)
class Asked:
    """What a transfer is asked to convert, what it is to choose by importance, and the options that this depends on.

    Attributes:
        layers, keep_softmax, keep_auto, keep_heads, auto, block_size: as for `transfer`.
        by_layer: by the name of its option in `TransferOptions` the numbers that are given for every layer.
        feature_map, window, layout: those of `HybridConfig`. window_dropout: that of `TransferOptions`.
        feature_dim: that of `HybridConfig`, if it is given.
    """

    layers: Sequence[int] | None = None
    keep_softmax: Collection[int | str | tuple[int, int]] = ()
    keep_auto: int = 0
    keep_heads: int = 0
    auto: Collection[str] = ()
    block_size: int | None = None
    by_layer: Mapping[str, Sequence[int]] = field(default_factory=dict)
    feature_map: str = "hedgehog"
    window: int = 64
    layout: str = "sliding"
    window_dropout: float = 0.0
    feature_dim: int | None = None

    def check(self, capture: Artifact) -> tuple[list[int], Kept]:
        """The layers to train and what keeps softmax attention, before more is kept by importance.

        Raises UsageError for options that do not fit this capture, or each other.
        """
        teacher = capture.teacher["layers"]
        if self.block_size and capture.config.get("store") != "tokens":
            raise UsageError(
                f"--block-size is for captures made with --store tokens, and {capture.path} holds activations. Leave "
                "it out."
            )
        kept = Kept.named(teacher, self.keep_softmax)
        kept.check_rest(teacher, self.keep_auto, self.keep_heads)
        if self.feature_map != "hedgehog" and (self.feature_dim or "feature_dims" in {*self.auto, *self.by_layer}):
            raise UsageError(
                f"--feature-dim and --feature-dims are for Hedgehog's maps. Those of {self.feature_map} have a head's "
                "size. Leave these options out."
            )
        for name, numbers in self.by_layer.items():
            if len(numbers) != len(teacher):
                raise UsageError(
                    f"{option(name)} gives {counted(len(numbers), 'number')}, and the teacher has "
                    f"{counted(len(teacher), 'layer')}. Give one for each."
                )
        seq_len, seen = capture.data["seq_len"], self.window * (2 if self.layout == "terraced" else 1)
        if self.window_dropout and not 0 < seen < seq_len:
            raise UsageError(
                "--window-dropout trains on the keys before the window. It needs a --window above 0, and rows that "
                f"are longer than the {seen} tokens that the window can see. These rows have {seq_len} tokens."
            )
        chosen = self._chosen(capture, kept)
        self._check_importance(chosen)
        return chosen, kept

    def window_of(self, layer: int) -> int:
        """The window that is given for this layer."""
        return self.by_layer["windows"][layer] if "windows" in self.by_layer else self.window

    def _chosen(self, capture: Artifact, kept: Kept) -> list[int]:
        """The layers to train."""
        teacher = capture.teacher["layers"]
        if self.layers is None:
            return sorted(set(range(len(teacher))) - kept.layers)
        chosen = sorted(set(self.layers))
        if not chosen:
            raise UsageError("--layers names no layer. Name some, or leave it out.")
        check_there("--layers", chosen, teacher)
        if other := [layer for layer in chosen if not teacher[layer]["num_heads"]]:
            raise UsageError(f"Layer {other[0]} has no softmax attention to convert. Leave it out of --layers.")
        if both := kept.layers.intersection(chosen):
            raise UsageError(f"Layer {min(both)} is in --layers and in --keep-softmax. Choose one.")
        return chosen

    def _check_importance(self, chosen: Collection[int]) -> None:
        """Raises UsageError for choices by importance that do not fit the other options."""
        auto, partial = self.auto, self.layers is not None
        without = [layer for layer in chosen if not self.window_of(layer)]
        zero = f"--windows gives layer {without[0]} none" if without and "windows" in self.by_layer else "--window is 0"
        for word, what, wanted in (("auto:N", "layers", self.keep_auto), ("heads:N", "heads", self.keep_heads)):
            if wanted and partial:
                raise UsageError(f"--keep-softmax {word} looks at all layers. With --layers, name the {what} to keep.")
            if wanted and without:
                raise UsageError(
                    f"--keep-softmax {word} measures what layers lose with a window, and {zero}. Name the {what}."
                )
        if auto and partial:
            raise UsageError(f"{option(min(auto))} auto looks at all layers. With --layers, give every layer's.")
        for name in ("feature_dims", "steps"):
            if name in auto and without:
                raise UsageError(
                    f"{option(name)} auto goes by what layers lose with a window, and {zero}. Give every layer's."
                )
        if "windows" in auto and not self.window:
            raise UsageError("--windows auto shares out the memory of --window, which is 0. Give it a window.")


def option(name: str) -> str:
    """The option that gives this field of `TransferOptions`."""
    return f"--{name.replace('_', '-')}"
