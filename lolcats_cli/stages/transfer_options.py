"""The options of attention transfer, and the recipes that choose them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from lolcats_kernels import HybridConfig
from lolcats_kernels.spec import BY_LAYER, layer_config

TRAINED_WINDOW = 64  # a longer window of a single layer is used, but not trained with


@dataclass(frozen=True)
class TransferOptions:
    """How the layers are trained; the defaults are of the recipe "best".

    Attributes:
        hybrid: the attention that is trained. With the linear factor "exp" the linear term starts with the mass that
            the softmax gives the keys before the window, and a head that is better without it, with the window of the
            training, ends without it.
        windows, feature_dims: the window and the feature size of every layer of the teacher, in place of `hybrid`'s.
        kept_heads: layer and key head of those that keep softmax attention, in order.
        gamma: initial γ of every head.
        mse_factor, xent_factor: weights of the output MSE and of the attention weights' cross-entropy. The latter
            takes memory quadratic in the sequence.
        window_dropout: the probability that a batch is trained with the linear term alone; it falls linearly from this
            to 0 over the training (scheduled window dropout, arXiv 2510.05901).
        batch_size, grad_accum: rows per forward pass, and passes per optimizer step.
        epochs, steps: length of the training; `steps` wins. One number, or one for each layer of the teacher; 0
            keeps the initial maps.
        lr, clip: AdamW's learning rate; the largest gradient norm of a layer.
        eval_steps: optimizer steps between validations.
        patience: validations without improvement before the learning rate falls tenfold; after twice as many
            the layer stops.
        seed: the order of the rows, and which batches the window dropout takes.
    """

    hybrid: HybridConfig = field(default_factory=lambda: HybridConfig(linear_factor="exp"))
    windows: tuple[int, ...] | None = None
    feature_dims: tuple[int, ...] | None = None
    kept_heads: tuple[tuple[int, int], ...] = ()
    gamma: float = 0.5
    mse_factor: float = 1000.0
    xent_factor: float = 0.0
    window_dropout: float = 0.0
    batch_size: int = 1
    grad_accum: int = 2
    epochs: int = 2
    steps: int | tuple[int, ...] | None = None
    lr: float = 2e-2
    clip: float = 1.0
    eval_steps: int = 400
    patience: int = 10
    seed: int = 0

    @property
    def by_layer(self) -> dict[str, tuple[int, ...]]:
        """By their names, the fields that have a number for every layer."""
        return {name: x for name in (*BY_LAYER, "steps") if isinstance(x := getattr(self, name), tuple)}

    def layer_hybrid(self, layer: int) -> HybridConfig:
        """The attention that this layer gets."""
        return layer_config(self.to_config()["hybrid"], layer)

    def trained_hybrid(self, layer: int) -> HybridConfig:
        """The attention that this layer's maps are trained in. With the linear factor "exp" maps hold for any window,
        and a long one leaves them little to learn: they would recall less (docs/quality.md)."""
        hybrid = self.layer_hybrid(layer)
        return replace(hybrid, window=min(hybrid.window, TRAINED_WINDOW)) if hybrid.linear_factor == "exp" else hybrid

    def to_config(self) -> dict[str, Any]:
        """As an artifact records them."""
        config = {name: value for name, value in asdict(self).items() if value is not None}
        config["hybrid"] = self.hybrid.to_dict()
        if not self.window_dropout:
            del config["window_dropout"]  # as in transfers that were begun before there was such an option
        config["hybrid"] |= {name: list(config.pop(name)) for name in BY_LAYER if name in config}
        kept = config.pop("kept_heads")
        if kept:
            config["hybrid"]["kept_heads"] = {str(i): [head for j, head in kept if j == i] for i, _ in kept}
        return config

    def total_steps(self, layer: int, rows: int) -> int:
        """Optimizer steps that training this layer on `rows` rows takes."""
        if isinstance(self.steps, tuple):
            return self.steps[layer]
        return self.epochs * ceil(rows / (self.batch_size * self.grad_accum)) if self.steps is None else self.steps


# The options that a recipe stands for. Options that are given win. "lolcats" has the paper's for 8B models, and "best"
# has those that gave better students with the same number of tokens (docs/quality.md).
RECIPES = {
    "best": TransferOptions(),
    "lolcats": TransferOptions(HybridConfig(linear_factor="one"), gamma=0.1, grad_accum=8, lr=1e-2, eval_steps=100),
}


def recipe_for(name: str, head_dim: int, window: int) -> TransferOptions:
    """The options of a recipe, for a teacher whose heads have this size, and a student with this window.

    Without a window "best" has a decay: the linear term alone must then find the last keys, which text needs most.
    The paper gives heads of 128 Hedgehog maps of 64 columns, as many features as the head has dimensions. "lolcats"
    does so for every size.
    """
    base = RECIPES[name]
    if name == "best":
        return replace(base, hybrid=replace(base.hybrid, decay=window == 0))
    return replace(base, hybrid=replace(base.hybrid, feature_dim=max(1, head_dim // 2)))
