"""Attention transfer, layer by layer (LoLCATs, arXiv 2410.10254, section 3.1): the feature maps and the linear term's
weight learn to give the softmax attention's output. A layer has its own optimizer, schedule, clip, early stop and best
state, so what it becomes does not depend on which other layers are trained beside it. Layers that a source computes
together are trained side by side, from the same pass over the rows.

Shapes: B batch, H query heads, T time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import ceil, inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention, hybrid_attention_weights
from lolcats_kernels.equation import key_masks
from lolcats_kernels.map_hedgehog import FEATURE_FLOOR
from lolcats_kernels.softmax import softmax_attention, softmax_scores, softmax_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from lolcats_cli.errors import UsageError
from lolcats_cli.progress import Advance
from lolcats_cli.stages.activations import Batch, Source
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.teacher.record import LayerInfo

# What a recipe means, where an option does not say otherwise. lolcats: the paper's, as in TransferOptions; best: what
# did better at the same number of tokens (docs/quality.md).
RECIPES: dict[str, dict[str, Any]] = {
    "best": {"linear_factor": "exp", "grad_accum": 2, "lr": 2e-2, "eval_steps": 400},
    "lolcats": {"linear_factor": "one", "grad_accum": 8, "lr": 1e-2, "eval_steps": 100},
}


@dataclass(frozen=True)
class TransferOptions:
    """How the layers are trained; the defaults are the paper's for 8B models.

    Attributes:
        hybrid: the attention that is trained. With the linear factor "exp" the linear term starts with the mass that
            the softmax gives the keys before the window, and a head that is better without it ends without it.
        gamma: initial γ of every head.
        mse_factor, xent_factor: weights of the output MSE and of the attention weights' cross-entropy. The latter
            takes memory quadratic in the sequence.
        window_dropout: the probability that a batch is trained with the linear term alone; it falls linearly from this
            to 0 over the training (scheduled window dropout, arXiv 2510.05901).
        batch_size, grad_accum: rows per forward pass, and passes per optimizer step.
        epochs, steps: length of the training; `steps` wins. 0 keeps the initial maps.
        lr, clip: AdamW's learning rate; the largest gradient norm of a layer.
        eval_steps: optimizer steps between validations.
        patience: validations without improvement before the learning rate falls tenfold; after twice as many
            the layer stops.
        seed: the order of the rows, and which batches the window dropout takes.
    """

    hybrid: HybridConfig = field(default_factory=HybridConfig)
    gamma: float = 0.5
    mse_factor: float = 1000.0
    xent_factor: float = 0.0
    window_dropout: float = 0.0
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


OFF = -1e4  # a linear_logit that no score can make up for: the head is its window alone
WINDOW_ROWS = 8  # that `window_error` looks at
# What `_start_at_softmax_mass` looks at: so many tokens of a row, in memory quadratic in them; at most so many rows,
# until every head has so many queries with keys before the window.
FIT_TOKENS, FIT_ROWS, FIT_QUERIES = 2048, 64, 256


RUN_NUMBERS = ("step", "best_mse", "best_step", "initial_mse", "stopped", "events")  # of a run, in its checkpoint


class LayerRun:
    """One layer's training, as far as it has come: what a checkpoint holds."""

    def __init__(self, maps: HybridMaps, options: TransferOptions) -> None:
        self.maps = maps
        self.optimizer = torch.optim.AdamW(maps.parameters(), lr=options.lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.1, patience=options.patience, min_lr=min(1e-5, options.lr)
        )
        self.step = 0  # optimizer steps done
        self.best, self.best_mse, self.best_step = _copy(maps), inf, 0
        self.initial_mse = inf
        self.stopped = False  # by the early stop
        self.events: list[dict[str, float]] = []  # the validations so far

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def save(self, folder: Path, layer: int) -> None:
        """Write all of it into `folder`, by the layer's name: tensors as safetensors, numbers as JSON."""
        tensors = {f"maps.{name}": tensor for name, tensor in _copy(self.maps).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / f"{layer}.safetensors")
        numbers = {name: getattr(self, name) for name in (*RUN_NUMBERS, "lr")}
        numbers["schedule"] = self.schedule.state_dict()
        (folder / f"{layer}.json").write_text(json.dumps(numbers))

    def load(self, folder: Path, layer: int) -> None:
        """Continue from what `save` wrote."""
        numbers = json.loads((folder / f"{layer}.json").read_text())
        lr, schedule = numbers.pop("lr"), numbers.pop("schedule")
        for name in RUN_NUMBERS:
            setattr(self, name, numbers[name])
        parts: dict[str, dict[str, Tensor]] = {"maps": {}, "best": {}, "optimizer": {}}
        for name, tensor in load_file(folder / f"{layer}.safetensors").items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.maps.load_state_dict(parts["maps"])
        self.best = parts["best"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, rest = name.partition(".")
            moments.setdefault(int(index), {})[rest] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.optimizer.param_groups[0]["lr"] = lr
        self.schedule.load_state_dict(schedule)


class Trained(NamedTuple):
    """A layer's best maps.

    Attributes:
        maps: their tensors.
        figures: theirs on the validation rows (see `measure`), with `initial_mse`, the `steps` trained and `best_step`.
        events: the validations on the way, each with `step`, `mse` and `lr`.
    """

    maps: dict[str, Tensor]
    figures: dict
    events: list[dict[str, float]]


def train_layers(
    source: Source,
    layers: list[int],
    options: TransferOptions,
    *,
    device: torch.device,
    advance: Advance = lambda done=1, **figures: None,
    checkpoints: Checkpoints | None = None,
) -> dict[int, Trained]:
    """Train the maps of some layers that are computed together, from their checkpoint if there is one.

    The layers take the same rows at the same time and share nothing else. `advance` counts the steps of all of them.
    """
    runs = begin(source, layers, options, device)
    total, step = options.total_steps(source.rows["train"]), 0
    saved = checkpoints.folder(_checkpoint_name(layers)) if checkpoints else None
    if saved:
        step = int(saved.name.rpartition("-")[2])
        for layer, run in runs.items():
            run.load(saved, layer)
        advance(sum(run.step for run in runs.values()))
    batches = _endless(source, layers, options, skip=step * options.grad_accum)
    while True:
        # A checkpoint is taken after the validation of its step, which is not done again.
        if not saved and (step % options.eval_steps == 0 or step == total):
            validate(source, runs, options, device)
        if checkpoints and not saved and step and checkpoints.due():
            checkpoints.save(f"{_checkpoint_name(layers)}{step:07d}", partial(_save, runs))
        saved = None
        training = {layer: run for layer, run in runs.items() if not run.stopped}
        if step == total or not training:
            break
        accumulate(training, batches, source.layers, options, total, device)
        for layer, run in training.items():
            norm = torch.nn.utils.clip_grad_norm_(run.maps.parameters(), options.clip)
            if not torch.isfinite(norm):
                raise UsageError(
                    f"The gradient of layer {layer} is {norm.item()} at step {run.step}. "
                    f"Lower --lr (now {options.lr:g})."
                )
            run.optimizer.step()
            run.step += 1
            advance(1, layer=layer, mse=run.best_mse)
        step += 1
    advance(sum(total - run.step for run in runs.values()))
    return finish(source, runs, options, device)


def _checkpoint_name(layers: list[int]) -> str:
    """What their checkpoints are called, before the number of steps."""
    return "layers-" + "".join(f"{layer:03d}-" for layer in (layers[0], layers[-1]))


def _save(runs: dict[int, LayerRun], folder: Path) -> None:
    for layer, run in runs.items():
        run.save(folder, layer)


def begin(source: Source, layers: list[int], options: TransferOptions, device: torch.device) -> dict[int, LayerRun]:
    """The layers' training before its first step."""
    maps = {
        layer: HybridMaps(options.hybrid, info.num_heads, info.head_dim, window_factor=options.gamma).to(device)
        for layer, info in ((layer, source.layers[layer]) for layer in layers)
    }
    if options.hybrid.linear_factor == "exp":
        _start_at_softmax_mass(maps, source.batches(layers, "train", 1), source.layers)
    return {layer: LayerRun(maps[layer], options) for layer in layers}


def validate(source: Source, runs: dict[int, LayerRun], options: TransferOptions, device: torch.device) -> None:
    """Measure the layers that are still trained: note their best state, lower their rates, stop those that are done."""
    training = {layer: run for layer, run in runs.items() if not run.stopped}
    maps = {layer: run.maps for layer, run in training.items()}
    found = measure(source, maps, options.batch_size, terms=("both",), device=device)
    for layer, run in training.items():
        mse = found[layer]["mse"]
        run.events.append({"step": run.step, "mse": mse, "lr": run.lr})
        run.initial_mse = mse if run.step == 0 else run.initial_mse
        if mse < run.best_mse:
            run.best, run.best_mse, run.best_step = _copy(run.maps), mse, run.step
        elif run.step - run.best_step > 2 * options.patience * options.eval_steps:
            run.stopped = True
            continue
        run.schedule.step(mse)


def accumulate(
    runs: dict[int, LayerRun],
    batches: Iterator[dict[int, Batch]],
    layers: Sequence[LayerInfo],
    options: TransferOptions,
    total: int,
    device: torch.device,
) -> None:
    """The gradients of the layers' next step, of `total`, from the next of `batches`."""
    for run in runs.values():
        run.optimizer.zero_grad(set_to_none=True)
    step = next(iter(runs.values())).step
    for index in range(step * options.grad_accum, (step + 1) * options.grad_accum):
        terms = "linear" if _drops_window(options, index, total * options.grad_accum) else "both"
        found = next(batches)
        for layer, run in runs.items():
            loss = _loss(found[layer].to(device), run.maps, layers[layer], options, terms) / options.grad_accum
            loss.backward()


def finish(
    source: Source, runs: dict[int, LayerRun], options: TransferOptions, device: torch.device
) -> dict[int, Trained]:
    """What `train_layers` returns, from the best states of a training. With the linear factor "exp" heads that are
    better without the linear term lose it."""
    maps = {layer: run.maps for layer, run in runs.items()}
    for layer, run in runs.items():
        maps[layer].load_state_dict(run.best)
    if options.hybrid.linear_factor == "exp" and options.hybrid.window:
        for layer, found in _errors(source, maps, options.batch_size, ("both", "window"), device).items():
            maps[layer].linear_logit.data[found.errors["both"] > found.errors["window"]] = OFF
    figures = measure(source, maps, options.batch_size, device=device)
    return {
        layer: Trained(
            _copy(run.maps),
            figures[layer] | {"initial_mse": run.initial_mse, "steps": run.step, "best_step": run.best_step},
            run.events,
        )
        for layer, run in runs.items()
    }


@torch.no_grad()
def _start_at_softmax_mass(
    maps: dict[int, HybridMaps], batches: Iterable[dict[int, Batch]], layers: Sequence[LayerInfo]
) -> None:
    """Sets each head's `linear_logit` so that, on average over queries, the log of what the keys before the window sum
    to in the linear term is that of the softmax. A layer looks at rows until every head has seen enough; a head that
    never sees such a key is switched off."""
    sums = {layer: torch.zeros(2, m.num_heads, device=m.linear_logit.device) for layer, m in maps.items()}
    wanting = set(maps)
    for batch in islice(batches, FIT_ROWS):
        for layer in sorted(wanting):
            gap = _mass_gap(batch[layer], maps[layer], layers[layer])
            usable = gap.isfinite()
            sums[layer] += torch.stack([torch.where(usable, gap, 0).sum(-1), usable.sum(-1)])
            if sums[layer][1].min() >= FIT_QUERIES:
                wanting.remove(layer)
        if not wanting:
            break
    for layer, (total, count) in sums.items():
        maps[layer].linear_logit.copy_(torch.where(count > 0, total / count.clamp(min=1), OFF))


def _mass_gap(batch: Batch, maps: HybridMaps, info: LayerInfo) -> Tensor:
    """By how much the linear term's log mass of the keys before the window falls short of the softmax's, of each query
    of a row [H, T]; not finite where there is no such key."""
    keep = slice(FIT_TOKENS) if batch.valid is None else batch.valid[0].nonzero()[:FIT_TOKENS, 0]
    q, k = (x[:1, :, keep].to(maps.linear_logit.device) for x in (batch.q, batch.k))
    position = torch.arange(q.shape[2], device=q.device)
    _, old = key_masks(position, position, maps.config)
    wanted = softmax_scores(q, k, info.spec).masked_fill(~old, -torch.inf).logsumexp(-1)
    given = (maps.q_features(q) @ maps.k_features(k).transpose(-1, -2) * old).sum(-1).log()
    return (wanted - given)[0]


@torch.no_grad()
def measure(
    source: Source,
    maps: dict[int, HybridMaps],
    batch_size: int,
    *,
    terms: tuple[str, ...] = ("both", "window"),
    device: torch.device,
) -> dict[int, dict]:
    """Figures of the layers on the validation rows: `mse` of the attention's output, `relative_mse` (to the softmax
    output's power), `head_relative_mse` (of every head, to its own power), `window_mse` (with the linear term zeroed),
    and `gamma` (least, mean and largest of the heads), or with the linear factor "exp" `heads_off`, the number of heads
    that are their window alone.
    """
    found = _errors(source, maps, batch_size, terms, device)
    return {layer: _figures(found[layer], maps[layer]) for layer in maps}


def _figures(found: Errors, maps: HybridMaps) -> dict:
    errors = {term: error.sum().item() for term, error in found.errors.items()}
    by_head = (found.errors["both"] / found.powers.clamp(min=1e-30)).tolist()
    power = max(found.powers.sum().item(), 1e-30)
    figures: dict = {
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


def window_errors(
    source: Source, layers: list[int], options: TransferOptions, device: torch.device
) -> dict[int, float]:
    """What the window alone misses of each layer's softmax output, beside the output's power, on some validation rows.
    The layers are computed together."""
    maps = {
        layer: HybridMaps(options.hybrid, source.layers[layer].num_heads, source.layers[layer].head_dim).to(device)
        for layer in layers
    }
    found = _errors(source, maps, 1, ("window",), device, limit=WINDOW_ROWS)
    return {
        layer: errors.errors["window"].sum().item() / max(errors.powers.sum().item(), 1e-30)
        for layer, errors in found.items()
    }


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
def _errors(
    source: Source,
    maps: dict[int, HybridMaps],
    batch_size: int,
    terms: tuple[str, ...],
    device: torch.device,
    limit: int | None = None,
) -> dict[int, Errors]:
    """The layers' errors on the validation rows, or on `limit` batches of them."""
    zeros = {layer: torch.zeros(source.layers[layer].num_heads, dtype=torch.float64) for layer in maps}
    found = {layer: Errors({term: zero.clone() for term in terms}, zero) for layer, zero in zeros.items()}
    for batches in islice(source.batches(list(maps), "validation", batch_size), limit):
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
    return hybrid_attention(
        batch.q,
        batch.k,
        batch.v,
        maps,
        scaling=info.spec.scaling,
        softcap=info.spec.softcap,
        sinks=_sinks(batch, info),
        valid=batch.valid,
        terms=terms,
    )


def _sinks(batch: Batch, info: LayerInfo) -> Tensor | None:
    return None if info.spec.sinks is None else info.spec.sinks.to(batch.q.device)


def _drops_window(options: TransferOptions, index: int, total: int) -> bool:
    """Whether batch `index` of `total` is trained with the linear term alone: drawn from the seed and the index, so
    that a resumed training draws the same."""
    share = options.window_dropout * (1 - index / total)
    return random.Random(f"window dropout {options.seed} {index}").random() < share


def _loss(batch: Batch, maps: HybridMaps, info: LayerInfo, options: TransferOptions, terms: str = "both") -> Tensor:
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
            scaling=info.spec.scaling,
            softcap=info.spec.softcap,
            sinks=_sinks(batch, info),
            valid=batch.valid,
            terms=terms,
        ).clamp_min(FEATURE_FLOOR)
        loss = loss - options.xent_factor * (wanted * given.log()).sum() / (tokens * info.num_heads)
    return loss


def _endless(source: Source, layers: list[int], options: TransferOptions, skip: int = 0) -> Iterator[dict[int, Batch]]:
    """Batches epoch after epoch, in an order that depends on seed and epoch alone, after the first `skip`."""
    epoch, skip = divmod(skip, ceil(source.rows["train"] / options.batch_size))
    while True:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        yield from source.batches(layers, "train", options.batch_size, generator, skip)
        epoch, skip = epoch + 1, 0


def _copy(maps: HybridMaps) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in maps.state_dict().items()}
