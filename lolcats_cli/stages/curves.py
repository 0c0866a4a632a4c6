"""The curves of a training, for an experiment tracker (`--log-to`). They lie beside an artifact, never in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerCallback

SHOWN = ("mse", "loss", "grad_norm", "lr")  # of a layer's events


def tensorboard_folder(output: Path | str) -> Path:
    """Where TensorBoard's files of this artifact go: TENSORBOARD_LOGGING_DIR, or `OUTPUT-runs`."""
    return Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or f"{Path(output)}-runs").expanduser()


@contextmanager
def trainer_callback(log_to: str | None, output: Path | str) -> Iterator[TrainerCallback | None]:
    """transformers' own callback for "tensorboard", "wandb" or "trackio", for a training in this block.

    None for no tracker. What libraries print in the block goes to stderr, as stdout is for the result.
    """
    with redirect_stdout(sys.stderr):
        if log_to is None:
            yield None
            return
        from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

        callback = get_reporting_integration_callbacks([log_to])[0]()
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(tensorboard_folder(output))
        yield callback
        if log_to == "wandb":
            import wandb

            wandb.finish()  # else it would print at the end of the process


class LayerCurves:
    """A transfer's curves in TensorBoard: each layer is a run of its own, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: dict[int, SummaryWriter] = {}

    def log(self, layer: int, event: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if layer not in self.writers:
            self.writers[layer] = SummaryWriter(str(self.folder / f"layer-{layer:03d}"))
        for name in SHOWN:
            if name in event:
                self.writers[layer].add_scalar(name, event[name], event["step"])
        self.writers[layer].flush()
