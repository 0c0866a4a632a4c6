"""Hedgehog's features for the chunked path on CPU: as `HybridMaps` defines them, one head after the other.

Shapes: B batch, H query heads, K heads of x (H, or the key heads), T time, D head, F columns of the map.

A head's scores and softmaxes stay in the cache; forward and backward write whole tensors only once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .maps import FEATURE_FLOOR, KEY_BOUND, HybridMaps, compute_dtype


def k_features(maps: HybridMaps, k: Tensor) -> Tensor:
    """phi_k: k [B, K, T, D] -> [B, H, T, F']."""
    return _features(maps, k, "k")


def q_features(maps: HybridMaps, q: Tensor) -> Tensor:
    """phi_q: q [B, H, T, D] -> [B, H, T, F']."""
    return _features(maps, q, "q")


def _features(maps: HybridMaps, x: Tensor, side: str) -> Tensor:
    if x.device.type != "cpu" or maps.config.feature_map != "hedgehog":
        return maps.q_features(x) if side == "q" else maps.k_features(x)
    dtype = compute_dtype(x.dtype)
    weight = maps.q_weight if side == "q" else maps.k_weight
    slope = maps.k_slope.to(dtype) if side == "k" and maps.config.linear_factor == "exp" else None
    return _Hedgehog.apply(x.to(dtype), weight.to(dtype), slope)


class _Hedgehog(torch.autograd.Function):
    """x [B, K, T, D], weight [H, D, F], slope [H, D] or None
    -> max([softmax(x W), softmax(-x W)], floor) exp(x . slope) [B, H, T, 2F]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, slope: Tensor | None) -> Tensor:
        batch, heads, time, _ = x.shape
        columns = weight.shape[2]
        out = x.new_empty(batch, weight.shape[0], time, 2 * columns)
        keys = None if slope is None else x.new_empty(batch, weight.shape[0], time, 1)  # exp(x . slope)
        both = x.new_empty(time, 2, columns)  # x W and -x W
        for row in range(batch):
            for head, w in enumerate(weight):
                one, phi = x[row, head * heads // len(weight)], out[row, head]
                torch.mm(one, w, out=both[:, 0])
                torch.neg(both[:, 0], out=both[:, 1])
                torch.softmax(both, -1, out=phi.view_as(both))
                phi.clamp_(min=FEATURE_FLOOR)
                if keys is not None and slope is not None:
                    torch.matmul(one, slope[head][:, None], out=keys[row, head])
                    phi *= keys[row, head].clamp_(-KEY_BOUND, KEY_BOUND).exp_()
        ctx.save_for_backward(x, weight, slope, out, keys)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, slope, out, keys = ctx.saved_tensors
        dx, dweight, dslope = (
            torch.zeros_like(a) if needed and a is not None else None
            for needed, a in zip(ctx.needs_input_grad, (x, weight, slope), strict=True)
        )
        heads, columns = x.shape[1], weight.shape[2]
        with torch.autocast(x.device.type, enabled=False):
            for row in range(x.shape[0]):
                for head, w in enumerate(weight):
                    head_of_x = head * heads // len(weight)
                    # A feature at the floor should pass none of its gradient; it passes 1e-12 of it.
                    phi, grad = (t[row, head].unflatten(1, (2, columns)) for t in (out, grads[0]))
                    dy = phi * grad
                    total = dy.sum(-1, keepdim=True)
                    if keys is not None:
                        key = keys[row, head]
                        # The bound passes no gradient.
                        dkey = total.sum(1).masked_fill_(key.log().abs_() >= KEY_BOUND * (1 - 1e-6), 0)
                        if dslope is not None:
                            dslope[head] += (x[row, head_of_x].T @ dkey)[:, 0]
                        if dx is not None:
                            dx[row, head_of_x].addmm_(dkey, slope[head][None])
                        total = total / key[:, None]
                    dy -= phi * total
                    dy = dy[:, 0] - dy[:, 1]
                    if dweight is not None:
                        dweight[head].addmm_(x[row, head_of_x].T, dy)
                    if dx is not None:
                        dx[row, head_of_x].addmm_(dy, w.T)
        return dx, dweight, dslope
