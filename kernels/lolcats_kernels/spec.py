"""What a call of hybrid attention can choose: its configuration, and the call's own options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .feature_map import FeatureMap
from .map_elu import ELU
from .map_hedgehog import HEDGEHOG
from .map_t2r import T2R

MAPS = {record.name: record for record in (HEDGEHOG, T2R, ELU)}
FEATURE_MAPS = tuple(MAPS)
LAYOUTS = ("sliding", "terraced")
LINEAR_FACTORS = ("one", "affine", "exp")
TERMS = ("both", "window", "linear")
# What a model's configuration may have for every layer of the model, where layers differ -> the field that it gives.
BY_LAYER = {"windows": "window", "feature_dims": "feature_dim"}

# Bounds of the exponents of "exp". A key's: sums over any context stay finite in fp32. The linear weight's, beside the
# window's largest, e^0: it stays finite. Kept keys of the sparse cache have the second bound too.
KEY_BOUND, QUERY_BOUND = 20.0, 60.0

# Keys that wait for S where Triton decodes. To write S takes as long as to read it, so it is written once for so many
# keys. 16 is the least that matrix units take.
WAITING = 16


class NoRoom(ValueError):
    """A GPU lacks what the Triton kernels need for heads and features of these sizes."""


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError, naming the option, unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}. Choose one of {', '.join(choices)}.")


def check_count(name: str, value: object, least: int) -> None:
    """Raises ValueError, naming the option, unless the value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}. It must be a whole number of at least {least}.")


@dataclass(frozen=True)
class HybridConfig:
    """What kind of hybrid attention a model uses. Plain data: `config.to_dict()`, and back `HybridConfig(**d)`.

    feature_map: hedgehog, t2r or elu.
    feature_dim: F, the size of Hedgehog's weights; it gives 2F features. t2r and elu ignore it: their F is D.
    window: keys seen by softmax (see `layout`); 0 is pure linear attention.
    layout: sliding (the last `window` keys, the query's own included) or terraced (blocks of `window` tokens
        counted from the first: the query's block up to itself and the whole block before).
    linear_factor: what the weight λ of the linear term is: one; affine (1 - gamma); or exp, learned on the softmax's
        own scale, exp(l + u . q_n - c_n) for the query and exp(w . k_j) for each key. gamma is then 1.
    decay: whether the linear term forgets: each key that enters the sums shrinks what is in them, by a factor that is
        learned from the key.
    kept_heads: the key heads of the layer that keep softmax attention, in order, with their query heads. They have no
        maps: `hybrid_attention` is for the other heads, and `HybridAttention` (hf_attention.py) for all of them.

    Raises ValueError naming the field when a value is not possible.
    """

    feature_map: str = "hedgehog"
    feature_dim: int = 64
    window: int = 64
    layout: str = "sliding"
    linear_factor: str = "one"
    decay: bool = False
    kept_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("feature_map", self.feature_map, tuple(MAPS))
        check_count("feature_dim", self.feature_dim, 1)
        check_count("window", self.window, 0)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("linear_factor", self.linear_factor, LINEAR_FACTORS)
        if not isinstance(self.decay, bool):
            raise ValueError(f"The decay is {self.decay!r}. It must be true or false.")
        for head in self.kept_heads:
            check_count("A kept head", head, 0)
        if list(self.kept_heads) != sorted(set(self.kept_heads)):
            raise ValueError(f"The kept heads are {list(self.kept_heads)}. They must be in order, each once.")

    def to_dict(self) -> dict[str, Any]:
        """The fields; `decay` and `kept_heads` only where there are some, as configurations were before."""
        return {name: value for name, value in asdict(self).items() if name not in ("decay", "kept_heads") or value}

    def mapped_heads(self, num_heads: int, num_key_value_heads: int) -> int:
        """The number of a layer's query heads that have maps, of so many query and key heads.

        Raises ValueError if a kept head is not there, or no other head is."""
        if not self.kept_heads:
            return num_heads
        if not max(self.kept_heads) < num_key_value_heads > len(self.kept_heads):
            raise ValueError(f"The kept heads {list(self.kept_heads)} must be some of {num_key_value_heads} key heads.")
        return num_heads - len(self.kept_heads) * (num_heads // num_key_value_heads)

    @property
    def map(self) -> FeatureMap:
        """The feature map's record."""
        return MAPS[self.feature_map]

    @property
    def slots(self) -> int:
        """How many keys and values a state keeps as they are, beside those that wait for the sums."""
        return self.window * (2 if self.layout == "terraced" else 1)

    @property
    def waiting(self) -> int:
        """How many keys wait for the sums at most, in a state in which keys wait. Those of a terrace come
        together."""
        return 0 if self.layout == "terraced" else WAITING


def layer_config(hybrid: Mapping[str, Any], layer: int) -> HybridConfig:
    """A layer's configuration from a model's: the fields of `HybridConfig`, with those of `BY_LAYER` in place of the
    model's own; and `kept_heads`, by the number of a layer as text its key heads that keep softmax.

    Raises TypeError or ValueError for what they cannot be.
    """
    fields = {name: value for name, value in hybrid.items() if name not in BY_LAYER}
    sizes = {field: hybrid[name][layer] for name, field in BY_LAYER.items() if name in hybrid}
    kept = hybrid.get("kept_heads", {}).get(str(layer), ())
    return HybridConfig(**fields | sizes | {"kept_heads": tuple(kept)})


def widest_config(configs: Iterable[HybridConfig]) -> HybridConfig:
    """The configuration with the largest sizes of these: what has room for its state has room for theirs."""
    first, *others = configs
    return replace(first, **{name: max(getattr(x, name) for x in (first, *others)) for name in BY_LAYER.values()})


@dataclass(frozen=True)
class CallSpec:
    """All that a call of hybrid attention is told besides tensors; as for `hybrid_attention`.

    Operators that are registered with torch take numbers and strings only: they get `*spec.encode()`, which their
    schema calls `CallSpec.SCHEMA`, and make a spec of it by `CallSpec.decode`.
    """

    config: HybridConfig
    scaling: float
    softcap: float | None = None
    terms: str = "both"

    SCHEMA: ClassVar[str] = (
        "str feature_map, int feature_dim, int window, str layout, str linear_factor, bool decay, "
        "float scaling, float? softcap, str terms"
    )

    def __post_init__(self) -> None:
        check_choice("terms", self.terms, TERMS)
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap is {self.softcap!r}. It must be above 0, or None.")

    def encode(self) -> tuple[Any, ...]:
        """The values of SCHEMA."""
        return (
            *astuple(self.config)[:-1],
            self.scaling,
            self.softcap,
            self.terms,
        )  # but `kept_heads`: a call is for the others

    @classmethod
    def decode(
        cls,
        feature_map: str,
        feature_dim: int,
        window: int,
        layout: str,
        linear_factor: str,
        decay: bool,
        scaling: float,
        softcap: float | None,
        terms: str,
    ) -> CallSpec:
        """What `encode` was called on."""
        config = HybridConfig(feature_map, feature_dim, window, layout, linear_factor, decay)
        return cls(config, scaling, softcap, terms)

    @property
    def has_window(self) -> bool:
        """Whether there is a softmax term."""
        return self.config.window > 0 and self.terms != "linear"

    @property
    def has_linear(self) -> bool:
        """Whether there is a linear term."""
        return self.terms != "window"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores, features, sums and states are held: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def common_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """With autocast, norms leave q and k wider than v; the widest is used for all."""
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def op_name(module: str, op: str) -> str:
    """Of a custom operator. One process may hold several versions of a file: merged models bring theirs."""
    return f"lolcats::{re.sub(r'[^0-9A-Za-z_]', '_', module)}_{op}"
