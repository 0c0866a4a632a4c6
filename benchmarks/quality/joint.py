"""Joint training of all layers, as in the paper's code: the loss is the mean over the layers, so that they share one
gradient clip, one learning-rate schedule, one early stop and one best step (compare `layer_training.train_layers`).
"""

from __future__ import annotations

from itertools import chain
from math import inf
from statistics import mean
from typing import Any

import torch

from lolcats_cli.stages.activations import Source
from lolcats_cli.stages.layer_losses import measure
from lolcats_cli.stages.layer_training import (
    LayerRun,
    Trained,
    _copy,
    _endless,
    accumulate,
    begin,
    finish,
)
from lolcats_cli.stages.transfer_options import TransferOptions


class Jointly:
    """In place of `transfer.train_layers`: trains all layers when it is asked for the first. No resume in between."""

    def __init__(self) -> None:
        self._runs: list[LayerRun] = []

    def __call__(
        self, source: Source, layers: list[int], options: TransferOptions, *, device: torch.device, **rest: Any
    ) -> dict[int, Trained]:
        self._runs = self._runs or train(source, options, device)
        return finish(source, {layer: self._runs[layer] for layer in layers}, options, device)


def train(source: Source, options: TransferOptions, device: torch.device) -> list[LayerRun]:
    """Every layer's training, in lockstep to the end."""
    layers, total = range(len(source.layers)), options.total_steps(0, source.rows["train"])
    runs = [begin(source, [layer], options, device)[layer] for layer in layers]
    batches = [_endless(source, [layer], options) for layer in layers]
    # AdamW takes steps of the same size whatever the loss is multiplied by: the sum over the layers, and a clip that is
    # as much larger, are the mean over the layers.
    parameters, clip = list(chain.from_iterable(run.maps.parameters() for run in runs)), options.clip * len(runs)
    best, best_step = inf, 0
    for step in range(total + 1):
        if step % options.eval_steps == 0 or step == total:
            found = [
                measure(source, {layer: run.maps}, options.batch_size, terms=("both",), device=device)[layer]["mse"]
                for layer, run in enumerate(runs)
            ]
            for run, mse in zip(runs, found, strict=True):
                run.initial_mse = mse if step == 0 else run.initial_mse
                run.schedule.step(mean(found))
            if mean(found) < best:
                best, best_step = mean(found), step
                for run in runs:
                    run.best, run.best_step = _copy(run.maps), step
            elif step - best_step > 2 * options.patience * options.eval_steps:
                break
        if step == total:
            break
        for layer, run in enumerate(runs):
            accumulate({layer: run}, batches[layer], source.layers, options, device)
        torch.nn.utils.clip_grad_norm_(parameters, clip, error_if_nonfinite=True)
        for run in runs:
            run.optimizer.step()
            run.step += 1
    return runs
