"""The trained parts of a hybrid attention layer: feature maps and the weights of the two terms.

Letters: see ../README.md. Source: LoLCATs, arXiv 2410.10254, section 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .equation import repeat_heads
from .feature_map import FeatureMap
from .spec import KEY_BOUND, HybridConfig, check_count, compute_dtype


class TermWeights(NamedTuple):
    """What is the same for every token of a head: gamma [H], of the window's terms, and the linear term's λ [H]. With
    "exp" both are 1: λ then depends on the query, see `HybridMaps.query_logits`."""

    gamma: Tensor
    linear_weight: Tensor


class MapParameters(NamedTuple):
    """Parameters of one side's features, of all heads or some: each None where there is none."""

    weight: Tensor | None  # [H, D, F]
    bias: Tensor | None  # [H, F]
    slope: Tensor | None  # [H, D]: k's with "exp"


class HybridMaps(nn.Module):
    """Feature maps and weights of the terms, of one attention layer.

    Parameters, in fp32 (these names are stored in artifacts and in merged models):
        q_weight, k_weight [H, D, F]: hedgehog and t2r; they start as the identity.
        q_bias, k_bias [H, F]: t2r only; they start at 0.
        window_logit [H]: gamma = sigmoid(window_logit), the weight of the window's terms. Not with "exp", which has
        linear_logit [H], q_slope [H, D] and k_slope [H, D]: l, u and w of the equation. They start at 0.
        decay_bias [H] and decay_slope [H, D]: with `decay`, b and a of the equation. They start at -4 and 0: sums
        fall by 1/e over 55 keys.

    Raises ValueError when the sizes or `window_factor` (the initial gamma, between 0 and 1) are not possible.
    """

    def __init__(self, config: HybridConfig, num_heads: int, head_dim: int, *, window_factor: float = 0.5) -> None:
        super().__init__()
        check_count("num_heads", num_heads, 1)
        check_count("head_dim", head_dim, 1)
        if not 0 < window_factor < 1:
            raise ValueError(f"window_factor is {window_factor!r}. It must be above 0 and below 1.")
        self.config = config
        self.num_heads = num_heads
        self.head_dim = head_dim
        if config.map.has_weight:
            weight = _start(head_dim, self.feature_dim).repeat(num_heads, 1, 1)
            self.q_weight = nn.Parameter(weight.clone())
            self.k_weight = nn.Parameter(weight)
        if config.map.has_bias:
            self.q_bias = nn.Parameter(torch.zeros(num_heads, self.feature_dim))
            self.k_bias = nn.Parameter(torch.zeros(num_heads, self.feature_dim))
        if config.linear_factor == "exp":
            self.linear_logit = nn.Parameter(torch.zeros(num_heads))
            self.q_slope = nn.Parameter(torch.zeros(num_heads, head_dim))
            self.k_slope = nn.Parameter(torch.zeros(num_heads, head_dim))
        else:
            logit = math.log(window_factor / (1 - window_factor))
            self.window_logit = nn.Parameter(torch.full((num_heads,), logit))
        if config.decay:
            self.decay_bias = nn.Parameter(torch.full((num_heads,), -4.0))
            self.decay_slope = nn.Parameter(torch.zeros(num_heads, head_dim))

    @property
    def feature_map(self) -> FeatureMap:
        return self.config.map

    @property
    def feature_dim(self) -> int:
        """F."""
        return self.feature_map.feature_dim(self.head_dim, self.config.feature_dim)

    @property
    def num_features(self) -> int:
        """F'."""
        return self.feature_map.num_features(self.feature_dim)

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
        """l + u . q, of which λ is exp(l + u . q - c_n): q [B, H, T, D] -> [B, H, T], fp32 (fp64 for fp64); None unless
        the linear factor is "exp"."""
        if self.config.linear_factor != "exp":
            return None
        slopes = _per_head(q, self.q_slope)
        return slopes + self.linear_logit.to(slopes.dtype)[:, None]

    def key_logits(self, k: Tensor) -> Tensor | None:
        """w . k, without its bound: k [B, K, T, D] -> [B, H, T], fp32 (fp64 for fp64); None unless "exp"."""
        return _per_head(k, self.k_slope) if self.config.linear_factor == "exp" else None

    def decays(self, k: Tensor) -> Tensor | None:
        """g of the equation, softplus(b + a . k): k [B, K, T, D] -> [B, H, T], fp32 (fp64 for fp64); None without
        `decay`."""
        if not self.config.decay:
            return None
        slopes = _per_head(k, self.decay_slope)
        return softplus(slopes + self.decay_bias.to(slopes.dtype)[:, None])

    def term_weights(self, dtype: torch.dtype = torch.float32) -> TermWeights:
        """gamma and the constant λ of eq. 7, in `dtype`."""
        if self.config.linear_factor == "exp":
            ones = torch.ones(self.num_heads, dtype=dtype, device=self.linear_logit.device)
            return TermWeights(ones, ones)
        gamma = torch.sigmoid(self.window_logit.to(dtype))
        if self.config.window == 0:
            gamma = torch.zeros_like(gamma)  # no window: a weight of the linear term would cancel
        return TermWeights(gamma, 1 - gamma if self.config.linear_factor == "affine" else torch.ones_like(gamma))

    def q_parameters(self, dtype: torch.dtype) -> MapParameters:
        """What phi_q is made with, in `dtype`. The weight of the query is not in its features."""
        return MapParameters(self.parameter("q_weight", dtype), self.parameter("q_bias", dtype), None)

    def k_parameters(self, dtype: torch.dtype) -> MapParameters:
        """What phi_k is made with, in `dtype`."""
        return MapParameters(*(self.parameter(name, dtype) for name in ("k_weight", "k_bias", "k_slope")))

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A parameter in `dtype`; None if this layer has none of that name."""
        found = getattr(self, name, None)
        return None if found is None else found.to(dtype)

    def _features(self, x: Tensor, side: str) -> Tensor:
        weight, bias = (getattr(self, f"{side}_{name}", None) for name in ("weight", "bias"))
        return self.feature_map(x.to(compute_dtype(x.dtype)), weight, bias)


def _start(head_dim: int, feature_dim: int) -> Tensor:
    """The identity [D, F].

    What lies beyond the square are cosines of rising frequency: zeros, or copies of what is in the square, would get
    equal gradients for ever and never become features of their own.
    """
    weight = torch.eye(head_dim, feature_dim)
    more = feature_dim - head_dim
    if more > 0:
        i = torch.arange(head_dim)[:, None] + 0.5
        j = torch.arange(1, more + 1)[None, :]
        weight[:, head_dim:] = torch.cos(math.pi / (more + 1) * i * j) * math.sqrt(2 / head_dim)
    return weight


def _per_head(x: Tensor, slope: Tensor) -> Tensor:
    """x [B, K, T, D] . slope [H, D] -> [B, H, T] in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    slope = slope.to(dtype).unflatten(0, (x.shape[1], -1)).transpose(1, 2)  # [K, D, G]
    return (x.to(dtype) @ slope).transpose(2, 3).flatten(1, 2)
