"""Hedgehog's features for the chunked path on CPU: as `HybridMaps` defines them, one head after the other.

Shapes: B batch, H query heads, K heads of x (H, or the key heads), T time, D head, F columns of the map.

A head's scores and softmaxes stay in the cache; forward and backward write whole tensors only once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .maps import FEATURE_FLOOR, HybridMaps, compute_dtype


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
    return _Hedgehog.apply(x.to(dtype), weight.to(dtype))


class _Hedgehog(torch.autograd.Function):
    """x [B, K, T, D], weight [H, D, F] -> max([softmax(x W), softmax(-x W)], floor) [B, H, T, 2F]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        batch, heads, time, _ = x.shape
        columns = weight.shape[2]
        out = x.new_empty(batch, weight.shape[0], time, 2 * columns)
        for row in range(batch):
            for head, w in enumerate(weight):
                y = x[row, head * heads // len(weight)] @ w
                out[row, head, :, :columns] = y.softmax(-1)
                out[row, head, :, columns:] = y.neg_().softmax(-1)
        out.clamp_(min=FEATURE_FLOOR)
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, out = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        heads, columns = x.shape[1], weight.shape[2]
        with torch.autocast(x.device.type, enabled=False):
            for row in range(x.shape[0]):
                for head, w in enumerate(weight):
                    # A feature at the floor should pass none of its gradient; it passes 1e-12 of it.
                    phi, grad = (t[row, head].unflatten(1, (2, columns)) for t in (out, grads[0]))
                    dy = phi * grad
                    dy -= phi * dy.sum(-1, keepdim=True)
                    dy = dy[:, 0] - dy[:, 1]
                    head_of_x = head * heads // len(weight)
                    if dweight is not None:
                        dweight[head].addmm_(x[row, head_of_x].T, dy)
                    if dx is not None:
                        dx[row, head_of_x].addmm_(dy, w.T)
        return dx, dweight
