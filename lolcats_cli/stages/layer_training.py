"""Attention transfer, layer by layer (LoLCATs, arXiv 2410.10254, section 3.1): the feature maps and the linear term's
weight learn to give the softmax attention's output. A layer has its own optimizer, schedule, clip, early stop and best
state, so what it becomes does not depend on which other layers are trained beside it. Layers that a source computes
together are trained side by side, from the same pass over the rows.

Shapes: B batch, H query heads, T time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil, inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lolcats_kernels import HybridMaps
from safetensors.torch import load_file, save_file
from torch import Tensor

from lolcats_cli.errors import UsageError
from lolcats_cli.progress import Advance
from lolcats_cli.stages.activations import Batch, Source
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.layer_losses import drops_window, errors_of, layer_loss, measure
from lolcats_cli.stages.layer_start import OFF, start_at_softmax_distance, start_at_softmax_mass
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.record import LayerInfo

POINTS = 200  # roughly the number of training losses that are logged of a layer
RUN_NUMBERS = ("step", "best_mse", "best_step", "initial_mse", "stopped", "losses", "events")  # of a run's checkpoint


class LayerRun:
    """The state of one layer's training, which a checkpoint holds."""

    def __init__(self, maps: HybridMaps, options: TransferOptions, total: int) -> None:
        self.maps = maps
        self.total = total  # optimizer steps to do
        self.optimizer = torch.optim.AdamW(maps.parameters(), lr=options.lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.1, patience=options.patience, min_lr=min(1e-5, options.lr)
        )
        self.step = 0  # optimizer steps done
        self.best, self.best_mse, self.best_step = _copy(maps), inf, 0
        self.initial_mse = inf
        self.stopped = False  # by the early stop
        self.losses: list[float] = []  # of the steps since the last event that tells them
        self.events: list[dict[str, Any]] = []  # what `metrics.jsonl` will say, so far
        self.log: Callable[[dict[str, Any]], None] = lambda event: None

    @property
    def training(self) -> bool:
        """Whether there are steps to do."""
        return not self.stopped and self.step < self.total

    def due(self, options: TransferOptions) -> bool:
        """Whether the layer is measured after this step."""
        return not self.stopped and (self.step % options.eval_steps == 0 or self.step == self.total)

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def tell(self, event: str, **figures: float) -> None:
        """Add an event of this step."""
        self.events.append({"event": event, "step": self.step, **figures, "lr": self.lr})
        self.log(self.events[-1])

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
            setattr(self, name, numbers.get(name, getattr(self, name)))  # older checkpoints have no losses
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
        maps: the tensors of the maps.
        figures: their figures on the validation rows (see `measure`), with `initial_mse`, the number of `steps` and
            `best_step`.
        events: the events of the training. One of "validation" has the `step`, `mse` and `lr`. One of "train" has the
            `step`, the mean `loss` since the last such event, the `grad_norm` before clipping and the `lr`.
    """

    maps: dict[str, Tensor]
    figures: dict[str, Any]
    events: list[dict[str, Any]]


def train_layers(
    source: Source,
    layers: list[int],
    options: TransferOptions,
    *,
    device: torch.device,
    advance: Advance = lambda done=1, **figures: None,
    checkpoints: Checkpoints | None = None,
    log: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[int, Trained]:
    """Train the maps of some layers that are computed together, from their checkpoint if there is one.

    The layers take the same rows at the same time and share nothing else. `advance` counts the steps of all of them.
    `log` is told the events of each layer as they come.
    """
    runs = begin(source, layers, options, device)
    for layer, run in runs.items():
        if log is not None:
            run.log = partial(log, layer)
    step = 0
    saved = checkpoints.folder(_checkpoint_name(layers)) if checkpoints else None
    if saved:
        step = int(saved.name.rpartition("-")[2])
        for layer, run in runs.items():
            run.load(saved, layer)
        advance(sum(run.step for run in runs.values()))
    batches = _endless(source, layers, options, skip=step * options.grad_accum)
    while True:
        # A checkpoint is taken after the validation of its step, which is not done again.
        due = {layer: run for layer, run in runs.items() if run.step == step and run.due(options)}
        if due and not saved:
            validate(source, due, options, device)
        if checkpoints and not saved and step and checkpoints.due():
            checkpoints.save(f"{_checkpoint_name(layers)}{step:07d}", partial(_save, runs))
        saved = None
        training = {layer: run for layer, run in runs.items() if run.training}
        if not training:
            break
        accumulate(training, batches, source.layers, options, device)
        for layer, run in training.items():
            norm = torch.nn.utils.clip_grad_norm_(run.maps.parameters(), options.clip)
            if not torch.isfinite(norm):
                raise UsageError(
                    f"The gradient of layer {layer} is {norm.item()} at step {run.step}. "
                    f"Lower --lr (now {options.lr:g})."
                )
            run.optimizer.step()
            run.step += 1
            if run.step % max(1, run.total // POINTS) == 0:
                mean = sum(run.losses) / len(run.losses)
                run.tell("train", loss=mean, grad_norm=norm.item())
                run.losses = []
            advance(1, layer=layer, mse=run.best_mse)
        step += 1
    advance(sum(run.total - run.step for run in runs.values()))
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
        layer: HybridMaps(options.trained_hybrid(layer), info.num_heads, info.head_dim, window_factor=options.gamma).to(
            device
        )
        for layer, info in ((layer, source.layers[layer]) for layer in layers)
    }
    if options.hybrid.decay:
        start_at_softmax_distance(maps, source.batches(layers, "train", 1), source.layers)
    if options.hybrid.linear_factor == "exp":
        start_at_softmax_mass(maps, source.batches(layers, "train", 1), source.layers)
    rows = source.rows["train"]
    return {layer: LayerRun(maps[layer], options, options.total_steps(layer, rows)) for layer in layers}


def validate(source: Source, runs: dict[int, LayerRun], options: TransferOptions, device: torch.device) -> None:
    """Measures the layers: keeps their best state, lowers their rates, stops those that no longer improve."""
    maps = {layer: run.maps for layer, run in runs.items()}
    found = measure(source, maps, options.batch_size, terms=("both",), device=device)
    for layer, run in runs.items():
        mse = found[layer]["mse"]
        run.tell("validation", mse=mse)
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
    device: torch.device,
) -> None:
    """The gradients of the layers' next step, from the next of `batches`. The loss joins a run's losses."""
    for run in runs.values():
        run.optimizer.zero_grad(set_to_none=True)
    losses = {layer: torch.zeros((), device=device) for layer in runs}
    step = next(iter(runs.values())).step
    for index in range(step * options.grad_accum, (step + 1) * options.grad_accum):
        found = next(batches)
        for layer, run in runs.items():
            terms = "linear" if drops_window(options, index, run.total * options.grad_accum) else "both"
            loss = layer_loss(found[layer].to(device), run.maps, layers[layer], options, terms) / options.grad_accum
            loss.backward()
            losses[layer] += loss.detach()
    for layer, run in runs.items():
        run.losses.append(losses[layer].item())


def finish(
    source: Source, runs: dict[int, LayerRun], options: TransferOptions, device: torch.device
) -> dict[int, Trained]:
    """The result of `train_layers`, from the best states of a training. With the linear factor "exp", heads that are
    better without the linear term lose it: with the window that they were trained with, as few tokens need keys that
    lie further back, and recall is in these. But it must not see keys that the teacher's sliding window hides."""
    maps = {layer: run.maps for layer, run in runs.items()}
    for layer, run in runs.items():
        maps[layer].load_state_dict(run.best)
        if source.layers[layer].spec.sliding_window is not None:
            maps[layer].config = options.layer_hybrid(layer)
    windowed = {layer: m for layer, m in maps.items() if m.config.window and m.config.linear_factor == "exp"}
    if windowed:
        for layer, found in errors_of(source, windowed, options.batch_size, ("both", "window"), device).items():
            maps[layer].linear_logit.data[found.errors["both"] > found.errors["window"]] = OFF
    for layer in maps:  # its own window, which may be longer than that of the training
        maps[layer].config = options.layer_hybrid(layer)
    figures = measure(source, maps, options.batch_size, device=device)
    return {
        layer: Trained(
            _copy(run.maps),
            figures[layer] | {"initial_mse": run.initial_mse, "steps": run.step, "best_step": run.best_step},
            run.events,
        )
        for layer, run in runs.items()
    }


def _endless(source: Source, layers: list[int], options: TransferOptions, skip: int = 0) -> Iterator[dict[int, Batch]]:
    """Batches epoch after epoch, in an order that depends on seed and epoch alone, after the first `skip`."""
    epoch, skip = divmod(skip, ceil(source.rows["train"] / options.batch_size))
    while True:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        yield from source.batches(layers, "train", options.batch_size, generator, skip)
        epoch, skip = epoch + 1, 0


def _copy(maps: HybridMaps) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in maps.state_dict().items()}
