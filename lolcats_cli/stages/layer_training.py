"""Attention transfer for one layer (LoLCATs, arXiv 2410.10254, section 3.1): the feature maps and γ learn to give the
softmax attention's output. A layer has its own optimizer, schedule, clip, early stop and best state, so what it
becomes does not depend on which other layers are trained beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil, inf

import torch
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention, hybrid_attention_weights
from torch import Tensor

from lolcats_cli.errors import UsageError
from lolcats_cli.stages.activations import Batch, StoredActivations
from lolcats_cli.teacher.attention import softmax_attention, softmax_weights
from lolcats_cli.teacher.record import LayerInfo


@dataclass(frozen=True)
class TransferOptions:
    """How the layers are trained; the defaults are the paper's for 8B models.

    Attributes:
        hybrid: the attention that is trained.
        gamma: initial γ of every head.
        mse_factor, xent_factor: weights of the output MSE and of the attention weights' cross-entropy. The latter
            takes memory quadratic in the sequence.
        batch_size, grad_accum: rows per forward pass, and passes per optimizer step.
        epochs, steps: length of the training; `steps` wins. 0 keeps the initial maps.
        lr, clip: AdamW's learning rate; the largest gradient norm of a layer.
        eval_steps: optimizer steps between validations.
        patience: validations without improvement before the learning rate falls tenfold; after twice as many
            the layer stops.
        seed: the order of the rows.
    """

    hybrid: HybridConfig = field(default_factory=HybridConfig)
    gamma: float = 0.5
    mse_factor: float = 1000.0
    xent_factor: float = 0.0
    batch_size: int = 1
    grad_accum: int = 8
    epochs: int = 2
    steps: int | None = None
    lr: float = 1e-2
    clip: float = 1.0
    eval_steps: int = 100
    patience: int = 10
    seed: int = 0

    def total_steps(self, rows: int) -> int:
        """Optimizer steps that training on `rows` rows takes."""
        return self.epochs * ceil(rows / (self.batch_size * self.grad_accum)) if self.steps is None else self.steps


Log = Callable[..., None]


def train_layer(
    source: StoredActivations,
    layer: int,
    options: TransferOptions,
    *,
    device: torch.device,
    log: Log = lambda **event: None,
    advance: Log = lambda done=1, **figures: None,
) -> tuple[dict[str, Tensor], dict]:
    """Train one layer's maps.

    Returns:
        The best maps' tensors, and their figures on the validation rows (see `measure`) with `initial_mse`, the
        `steps` trained and the `best_step`.
    """
    info = source.layers[layer]
    maps = HybridMaps(options.hybrid, info.num_heads, info.head_dim, window_factor=options.gamma).to(device)
    optimizer = torch.optim.AdamW(maps.parameters(), lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.1, patience=options.patience, min_lr=min(1e-5, options.lr)
    )
    total = options.total_steps(source.rows["train"])
    batches = _endless(source, layer, options)
    best, best_mse, best_step, initial = _copy(maps), inf, 0, inf
    for step in range(total + 1):
        if step % options.eval_steps == 0 or step == total:
            mse = measure(source, layer, maps, options.batch_size, terms=("both",), device=device)["mse"]
            log(event="validation", layer=layer, step=step, mse=mse, lr=optimizer.param_groups[0]["lr"])
            initial = mse if step == 0 else initial
            if mse < best_mse:
                best, best_mse, best_step = _copy(maps), mse, step
            elif step - best_step > 2 * options.patience * options.eval_steps:
                break
            schedule.step(mse)
        if step == total:
            break
        optimizer.zero_grad(set_to_none=True)
        for _ in range(options.grad_accum):
            loss = _loss(next(batches).to(device), maps, info, options) / options.grad_accum
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(maps.parameters(), options.clip)
        if not torch.isfinite(norm):
            raise UsageError(
                f"The gradient of layer {layer} is {norm.item()} at step {step}. Lower --lr (now {options.lr:g})."
            )
        optimizer.step()
        advance(1, layer=layer, mse=best_mse)
    advance(total - step)
    maps.load_state_dict(best)
    figures = measure(source, layer, maps, options.batch_size, device=device)
    return best, {**figures, "initial_mse": initial, "steps": step, "best_step": best_step}


@torch.no_grad()
def measure(
    source: StoredActivations,
    layer: int,
    maps: HybridMaps,
    batch_size: int,
    *,
    terms: tuple[str, ...] = ("both", "window"),
    device: torch.device,
) -> dict:
    """A layer's figures on the validation rows: `mse` of the attention's output, `relative_mse` (to the softmax
    output's power), `window_mse` (with the linear term zeroed) and `gamma` (least, mean and largest of the heads).
    """
    info = source.layers[layer]
    errors, power, count = dict.fromkeys(terms, 0.0), 0.0, 0
    for batch in source.batches(layer, "validation", batch_size):
        batch = batch.to(device)
        target = softmax_attention(batch.q, batch.k, batch.v, info.spec, batch.valid).float()
        for term in terms:
            out = _hybrid(batch, maps, info, term)
            errors[term] += (out.float() - target).square().sum(dtype=torch.float64).item()
        power += target.square().sum(dtype=torch.float64).item()
        count += target.numel() if batch.valid is None else int(batch.valid.sum()) * info.num_heads * info.head_dim
    gamma = torch.sigmoid(maps.window_logit.float())
    figures: dict = {
        "mse": errors["both"] / count,
        "relative_mse": errors["both"] / max(power, 1e-30),
        "gamma": {"min": gamma.min().item(), "mean": gamma.mean().item(), "max": gamma.max().item()},
    }
    if "window" in errors:
        figures |= {
            "window_mse": errors["window"] / count,
            "relative_window_mse": errors["window"] / max(power, 1e-30),
        }
    return figures


def _hybrid(batch: Batch, maps: HybridMaps, info: LayerInfo, terms: str = "both") -> Tensor:
    return hybrid_attention(batch.q, batch.k, batch.v, maps, scaling=info.spec.scaling, valid=batch.valid, terms=terms)


def _loss(batch: Batch, maps: HybridMaps, info: LayerInfo, options: TransferOptions) -> Tensor:
    """mse_factor · mean((y − ŷ)²) + xent_factor · mean(CE(a, â)) over the real tokens (section 3.1; Hedgehog)."""
    tokens = batch.q.shape[0] * batch.q.shape[2] if batch.valid is None else int(batch.valid.sum())
    loss = torch.zeros((), device=batch.q.device)
    if options.mse_factor:
        with torch.no_grad():
            target = softmax_attention(batch.q, batch.k, batch.v, info.spec, batch.valid).float()
        error = (_hybrid(batch, maps, info).float() - target).square().sum()
        loss = loss + options.mse_factor * error / (tokens * info.num_heads * info.head_dim)
    if options.xent_factor:
        with torch.no_grad():
            wanted = softmax_weights(batch.q, batch.k, info.spec, batch.valid)
        given = hybrid_attention_weights(
            batch.q, batch.k, maps, scaling=info.spec.scaling, valid=batch.valid
        ).clamp_min(1e-12)  # as far as the maps' own floor
        loss = loss - options.xent_factor * (wanted * given.log()).sum() / (tokens * info.num_heads)
    return loss


def _endless(source: StoredActivations, layer: int, options: TransferOptions) -> Iterator[Batch]:
    """Batches epoch after epoch, in an order that depends on seed and epoch alone."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        yield from source.batches(layer, "train", options.batch_size, generator)
        epoch += 1


def _copy(maps: HybridMaps) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in maps.state_dict().items()}
