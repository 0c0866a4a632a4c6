"""The loss that a layer's feature maps are trained on, and the error of their attention compared with softmax.

Shapes: B batch, H query heads, T time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from lolcats_kernels import HybridMaps, hybrid_attention, hybrid_attention_weights
from lolcats_kernels.map_hedgehog import FEATURE_FLOOR
from lolcats_kernels.softmax import softmax_attention, softmax_weights
from torch import Tensor

from lolcats_cli.stages.activations import Batch, Source
from lolcats_cli.stages.layer_start import OFF
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.record import LayerInfo


def drops_window(options: TransferOptions, index: int, total: int) -> bool:
    """Whether batch `index` of `total` is trained with the linear term alone. It is drawn from the seed and the index,
    so that a resumed training draws the same."""
    share = options.window_dropout * (1 - index / total)
    return random.Random(f"window dropout {options.seed} {index}").random() < share


def layer_loss(
    batch: Batch, maps: HybridMaps, info: LayerInfo, options: TransferOptions, terms: str = "both"
) -> Tensor:
    """mse_factor · mean((y − ŷ)²) + xent_factor · mean(CE(a, â)) over the real tokens (section 3.1; Hedgehog)."""
    tokens = batch.q.shape[0] * batch.q.shape[2] if batch.valid is None else max(1, int(batch.valid.sum()))
    loss = torch.zeros((), device=batch.q.device)
    if options.mse_factor:
        with torch.no_grad():
            target = softmax_attention(batch.q, batch.k, batch.v, info.spec, batch.valid).float()
        error = (_hybrid(batch, maps, info, terms).float() - target).square().sum()
        loss = loss + options.mse_factor * error / (tokens * info.num_heads * info.v_head_dim)
    if options.xent_factor:
        with torch.no_grad():
            wanted = softmax_weights(batch.q, batch.k, info.spec, batch.valid)
        given = hybrid_attention_weights(
            batch.q,
            batch.k,
            maps,
            **_options(batch, info, terms),
        ).clamp_min(FEATURE_FLOOR)
        loss = loss - options.xent_factor * (wanted * given.log()).sum() / (tokens * info.num_heads)
    return loss


@torch.no_grad()
def measure(
    source: Source,
    maps: dict[int, HybridMaps],
    batch_size: int,
    *,
    terms: tuple[str, ...] = ("both", "window"),
    device: torch.device,
) -> dict[int, dict[str, Any]]:
    """The figures of the layers on the validation rows.

    `mse` is that of the attention's output, `relative_mse` the same divided by the mean square of the softmax output,
    `head_relative_mse` the same for every head, and `window_mse` that with the linear term zeroed. `gamma` has the
    least, the mean and the largest of the heads. With the linear factor "exp", `heads_off` is the number of heads that
    use their window alone.
    """
    found = errors_of(source, maps, batch_size, terms, device)
    return {layer: _figures(found[layer], maps[layer]) for layer in maps}


def _figures(found: Errors, maps: HybridMaps) -> dict[str, Any]:
    errors = {term: error.sum().item() for term, error in found.errors.items()}
    by_head = (found.errors["both"] / found.powers.clamp(min=1e-30)).tolist()
    power = max(found.powers.sum().item(), 1e-30)
    figures: dict[str, Any] = {
        "mse": errors["both"] / found.count,
        "relative_mse": errors["both"] / power,
        "head_relative_mse": by_head,
    }
    if maps.config.linear_factor == "exp":
        figures["heads_off"] = int((maps.linear_logit <= OFF).sum())
    else:
        gamma = torch.sigmoid(maps.window_logit.float())
        figures["gamma"] = {"min": gamma.min().item(), "mean": gamma.mean().item(), "max": gamma.max().item()}
    if "window" in errors:
        figures |= {
            "window_mse": errors["window"] / found.count,
            "relative_window_mse": errors["window"] / power,
        }
    return figures


@dataclass
class Errors:
    """A layer's errors on some rows.

    Attributes:
        errors: per term the squared error of every head [H] in fp64.
        powers: every head's power of the softmax output [H] in fp64.
        count: the number of the output's elements.
    """

    errors: dict[str, Tensor]
    powers: Tensor
    count: int = 0


@torch.no_grad()
def errors_of(
    source: Source,
    maps: dict[int, HybridMaps],
    batch_size: int,
    terms: tuple[str, ...],
    device: torch.device,
) -> dict[int, Errors]:
    """The layers' errors on the validation rows."""
    zeros = {layer: torch.zeros(source.layers[layer].num_heads, dtype=torch.float64) for layer in maps}
    found = {layer: Errors({term: zero.clone() for term in terms}, zero) for layer, zero in zeros.items()}
    for batches in source.batches(list(maps), "validation", batch_size):
        for layer, errors in found.items():
            batch, info = batches[layer].to(device), source.layers[layer]
            target = softmax_attention(batch.q, batch.k, batch.v, info.spec, batch.valid).float()
            for term in terms:
                out = _hybrid(batch, maps[layer], info, term)
                errors.errors[term] += (out.float() - target).square().sum((0, 2, 3), dtype=torch.float64).cpu()
            errors.powers += target.square().sum((0, 2, 3), dtype=torch.float64).cpu()
            tokens = batch.q.shape[0] * batch.q.shape[2] if batch.valid is None else int(batch.valid.sum())
            errors.count += tokens * info.num_heads * info.v_head_dim
    return found


def _hybrid(batch: Batch, maps: HybridMaps, info: LayerInfo, terms: str = "both") -> Tensor:
    out: Tensor = hybrid_attention(batch.q, batch.k, batch.v, maps, **_options(batch, info, terms))
    return out


def _options(batch: Batch, info: LayerInfo, terms: str) -> dict[str, Any]:
    """What the hybrid attention of a layer takes beside queries, keys, values and maps."""
    sinks = None if info.spec.sinks is None else info.spec.sinks.to(batch.q.device)
    return {
        "scaling": info.spec.scaling,
        "softcap": info.spec.softcap,
        "sinks": sinks,
        "valid": batch.valid,
        "terms": terms,
    }
