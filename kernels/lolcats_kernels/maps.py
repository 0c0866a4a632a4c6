"""The trained parts of a hybrid attention layer: feature maps and the mixing factor.

Shapes: B batch, H query heads, K key heads, T time, D head, F feature size, F' features that a map gives
(2F for hedgehog, D for t2r and elu).

Source: LoLCATs, arXiv 2410.10254, section 3; Hedgehog, arXiv 2402.04347; T2R, arXiv 2103.13076.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURE_MAPS = ("hedgehog", "t2r", "elu")
LAYOUTS = ("sliding", "terraced")
LINEAR_FACTORS = ("one", "affine", "exp")

# Hedgehog's softmax features are kept from underflowing to exact zeros (as in the published code).
FEATURE_FLOOR = 1e-12
# Bounds of "exp": of a key's weight, so that sums over any context stay in fp32; of the linear term's weight beside the
# window's largest, e^0, so that it stays finite.
KEY_BOUND, QUERY_BOUND = 20.0, 60.0


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


@dataclass(frozen=True)
class HybridConfig:
    """What kind of hybrid attention a model uses. Plain data: `asdict(config)`, and back `HybridConfig(**d)`.

    feature_map: hedgehog, t2r or elu.
    feature_dim: F, the columns of Hedgehog's weights; it gives 2F features. t2r and elu ignore it and give D.
    window: keys seen by softmax (see `layout`); 0 is pure linear attention.
    layout: sliding (the last `window` keys, the query's own included) or terraced (blocks of `window` tokens
        counted from the first: the query's block up to itself and the whole block before).
    linear_factor: weight of the linear term: one; affine (1 - gamma); or exp, learned on the softmax's own scale,
        exp(lambda + u . q_n - c_n) for the query and exp(w . k_j) for each key. gamma is then 1.

    Raises ValueError naming the field when a value is not possible.
    """

    feature_map: str = "hedgehog"
    feature_dim: int = 64
    window: int = 64
    layout: str = "sliding"
    linear_factor: str = "one"

    def __post_init__(self) -> None:
        _check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        _check_count("feature_dim", self.feature_dim, 1)
        _check_count("window", self.window, 0)
        _check_choice("layout", self.layout, LAYOUTS)
        _check_choice("linear_factor", self.linear_factor, LINEAR_FACTORS)

    @property
    def slots(self) -> int:
        """C: how many keys and values a state keeps as they are."""
        return self.window * (2 if self.layout == "terraced" else 1)

    def features(self, head_dim: int) -> int:
        """F': the number of features the map gives for heads of size `head_dim`."""
        return 2 * self.feature_dim if self.feature_map == "hedgehog" else head_dim


def op_name(module: str, op: str) -> str:
    """Of a custom op. One process may hold several versions of a file: merged models bring theirs."""
    return f"lolcats::{re.sub(r'[^0-9A-Za-z_]', '_', module)}_{op}"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores, features, sums and states are held: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def common_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """With autocast, norms leave q and k wider than v; the widest is used for all."""
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _start(rows: int, columns: int) -> Tensor:
    """The identity [rows, columns].

    Columns beyond the square are cosines of rising frequency: zeros, or copies of earlier columns, would get
    equal gradients for ever and never become features of their own.
    """
    weight = torch.eye(rows, columns)
    if columns > rows:
        i = torch.arange(rows)[:, None] + 0.5
        j = torch.arange(1, columns - rows + 1)[None, :]
        weight[:, rows:] = torch.cos(math.pi / (columns - rows + 1) * i * j) * math.sqrt(2 / rows)
    return weight


class HybridMaps(nn.Module):
    """Feature maps and mixing factor of one attention layer.

    Parameters, in fp32 (these names are stored in artifacts and in merged models):
        q_weight, k_weight [H, D, F]: hedgehog and t2r (F = D for t2r); they start as the identity.
        q_bias, k_bias [H, F]: t2r only; they start at 0.
        window_logit [H]: gamma = sigmoid(window_logit), the weight of the window's terms. Not with "exp", which has
        linear_logit [H], q_slope [H, D] and k_slope [H, D]: lambda, u and w. They start at 0.

    Raises ValueError when the sizes or `window_factor` (the initial gamma, between 0 and 1) are not possible.
    """

    def __init__(self, config: HybridConfig, num_heads: int, head_dim: int, *, window_factor: float = 0.5) -> None:
        super().__init__()
        _check_count("num_heads", num_heads, 1)
        _check_count("head_dim", head_dim, 1)
        if not 0 < window_factor < 1:
            raise ValueError(f"window_factor is {window_factor!r}; it must lie between 0 and 1 (excluded).")
        self.config = config
        self.num_heads = num_heads
        self.head_dim = head_dim
        if config.feature_map != "elu":
            size = config.feature_dim if config.feature_map == "hedgehog" else head_dim
            weight = _start(head_dim, size).repeat(num_heads, 1, 1)
            self.q_weight = nn.Parameter(weight.clone())
            self.k_weight = nn.Parameter(weight)
            if config.feature_map == "t2r":
                self.q_bias = nn.Parameter(torch.zeros(num_heads, size))
                self.k_bias = nn.Parameter(torch.zeros(num_heads, size))
        if config.linear_factor == "exp":
            self.linear_logit = nn.Parameter(torch.zeros(num_heads))
            self.q_slope = nn.Parameter(torch.zeros(num_heads, head_dim))
            self.k_slope = nn.Parameter(torch.zeros(num_heads, head_dim))
        else:
            logit = math.log(window_factor / (1 - window_factor))
            self.window_logit = nn.Parameter(torch.full((num_heads,), logit))

    @property
    def num_features(self) -> int:
        """F'."""
        return self.config.features(self.head_dim)

    def extra_repr(self) -> str:
        return f"{self.config}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def q_features(self, q: Tensor) -> Tensor:
        """phi_q: q [B, H, T, D] -> [B, H, T, F'], fp32 (fp64 for fp64)."""
        return self._features(q, "q")

    def k_features(self, k: Tensor) -> Tensor:
        """phi_k: k [B, K, T, D] -> [B, H, T, F'], fp32 (fp64 for fp64), the key's weight in it. Per query head."""
        features = self._features(repeat_heads(k, self.num_heads), "k")
        logits = self.key_logits(k)
        return features if logits is None else features * logits.clamp(-KEY_BOUND, KEY_BOUND).exp()[..., None]

    def query_logits(self, q: Tensor) -> Tensor | None:
        """lambda + u . q: q [B, H, T, D] -> [B, H, T], fp32 (fp64 for fp64); None unless the linear factor is "exp"."""
        if self.config.linear_factor != "exp":
            return None
        slopes = _per_head(q, self.q_slope)
        return slopes + self.linear_logit.to(slopes.dtype)[:, None]

    def key_logits(self, k: Tensor) -> Tensor | None:
        """w . k, without its bound: k [B, K, T, D] -> [B, H, T], fp32 (fp64 for fp64); None unless "exp"."""
        return _per_head(k, self.k_slope) if self.config.linear_factor == "exp" else None

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(gamma [H], the linear term's constant factor [H]) of eq. 7, in `dtype`."""
        if self.config.linear_factor == "exp":
            ones = torch.ones(self.num_heads, dtype=dtype, device=self.linear_logit.device)
            return ones, ones
        gamma = torch.sigmoid(self.window_logit.to(dtype))
        if self.config.window == 0:
            gamma = torch.zeros_like(gamma)  # no window: the factor of the linear term would cancel
        return gamma, 1 - gamma if self.config.linear_factor == "affine" else torch.ones_like(gamma)

    def _features(self, x: Tensor, side: str) -> Tensor:
        weight, bias = (getattr(self, f"{side}_{name}", None) for name in ("weight", "bias"))
        return feature_map(self.config, x.to(compute_dtype(x.dtype)), weight, bias)


def feature_map(config: HybridConfig, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., H, T, D], weight [H, D, F] or None (elu), bias [H, F] (t2r) or None -> [..., H, T, F']."""
    if weight is None:
        return 1 + functional.elu(x)
    x = x @ weight.to(x.dtype)
    if bias is not None:
        return torch.relu(x + bias.to(x.dtype)[:, None])
    return torch.cat([torch.softmax(x, -1), torch.softmax(-x, -1)], -1).clamp(min=FEATURE_FLOOR)


def _per_head(x: Tensor, slope: Tensor) -> Tensor:
    """x [B, K, T, D] . slope [H, D] -> [B, H, T] in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    slope = slope.to(dtype).unflatten(0, (x.shape[1], -1)).transpose(1, 2)  # [K, D, G]
    return (x.to(dtype) @ slope).transpose(2, 3).flatten(1, 2)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, K, T, D] -> [B, H, T, D]: each key head serves H / K query heads that lie together."""
    batch, heads, time, size = x.shape
    if heads == num_heads:
        return x
    group = num_heads // heads
    return x[:, :, None].expand(batch, heads, group, time, size).reshape(batch, num_heads, time, size)
