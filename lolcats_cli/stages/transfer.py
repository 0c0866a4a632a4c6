"""transfer: trains feature maps and mixing factors layer by layer from a capture.

A capture of queries, keys and values needs no teacher. For a capture of hidden states or tokens, the teacher computes
queries, keys and values again.

The artifact holds `maps/layer-LLL.safetensors` for every layer: a `HybridMaps` state dict.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from lolcats_formats import Artifact, ArtifactWriter, begun_config
from lolcats_formats.place import Resume
from safetensors import safe_open

from lolcats_cli import ranks, stopping
from lolcats_cli.artifacts.describe import IMPORTANCE_FILE
from lolcats_cli.artifacts.maps import maps_file
from lolcats_cli.errors import UsageError
from lolcats_cli.evaluation.importance import Importance, measure_importance, share_out
from lolcats_cli.loading.student import load_captured
from lolcats_cli.progress import Progress
from lolcats_cli.stages.activations import ComputedActivations, Source, StoredActivations
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.curves import LayerCurves, tensorboard_folder
from lolcats_cli.stages.layer_training import Trained, train_layers
from lolcats_cli.stages.rolling import RollingActivations
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.stages.writing import Making, make_artifact
from lolcats_cli.teacher.load import LoadOptions

LONGEST_WINDOW = 3  # an automatic window is at most this part of a row: maps learn from the keys before it
CARRIED = ("entropy", "head_entropy", "esl")  # of a layer's figures in the capture: shown without it too
T = TypeVar("T")


def transfer(
    capture: Path | str,
    output: Path | str,
    *,
    options: TransferOptions = TransferOptions(),
    layers: list[int] | None = None,
    keep_softmax: Collection[int | str] = (),
    keep_auto: int = 0,
    auto_windows: bool = False,
    block_size: int | None = None,
    teacher: str | None = None,
    load: LoadOptions = LoadOptions(),
    log_to: str | None = None,
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Trains the maps of every layer, or of `layers` alone. Running it again resumes after the last checkpoint.

    Args:
        layers: train these layers only; `join` puts the parts together.
        keep_softmax: layers that keep softmax attention in the student, by index. "sliding" stands for the layers whose
            teacher has a sliding window.
        keep_auto: keep softmax attention in this number of other layers: those whose window alone costs the teacher's
            predictions most (`evaluation/importance.py`).
        auto_windows: give each layer a window of its own. Together they take no more memory than
            `options.hybrid.window` in every layer; layers that the predictions need get longer ones.
        block_size: train this number of layers at a time from a capture of tokens. Only their weights are in memory,
            and the hidden states in front of them are on disk.
        teacher: the teacher's folder, if it is needed and has moved.
        load: the device to train on, and whether to trust the teacher's code. The dtype is that of the capture.
        log_to: "tensorboard" writes every layer's curves for TensorBoard.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        FormatError: `capture` is not a finished capture, or `output` holds something else.
        UsageError: the options do not fit this capture.
    """
    parent = Artifact.open(capture, "capture")
    device = load.resolved_device()
    with ranks.joined(device.type):
        rolling = Path(output) / f".hidden-{ranks.rank()}"
        source = _source(parent, teacher, load, device, block_size, rolling, progress)
        given = _kept(source, keep_softmax, keep_auto)
        chosen, kept = _choose(source, options, layers, given, keep_auto, auto_windows)
        importance = None
        if keep_auto or auto_windows:
            importance = ranks.share(lambda: _importance(source, output, force, teacher, load, device, progress))
            worst = importance.by_loss(chosen, options.hybrid.window)
            kept |= set(worst[:keep_auto])
            chosen = sorted(worst[keep_auto:])
            if auto_windows:
                options = replace(options, windows=_windows(source, chosen, options, importance))
            _tell(chosen, kept, options, progress)
        fields: dict[str, Any] = {
            "config": {**options.to_config(), "layers": chosen, **({"keep_softmax": sorted(kept)} if kept else {})},
            "teacher": parent.teacher,
            "data": parent.data,
            "parents": [parent],
        }

        def work(making: Making) -> dict[str, Any]:
            curves = LayerCurves(tensorboard_folder(output)) if log_to else None
            if making.main is not None and importance is not None:
                making.main.write_json(IMPORTANCE_FILE, importance.to_json())
            _train(source, chosen, options, device, making, progress, curves)
            if isinstance(source, RollingActivations):
                source.remove()
            if making.main is None:
                return {}
            making.main.order_metrics(lambda event: event["layer"])
            return {"layers": {str(layer): _figures(making.main, parent, layer) for layer in chosen}}

        return make_artifact(output, "transfer", fields, work, resume=resume, force=force, progress=progress)


def _train(
    source: Source,
    chosen: list[int],
    options: TransferOptions,
    device: torch.device,
    making: Making,
    progress: Progress,
    curves: LayerCurves | None,
) -> None:
    """Trains this rank's share of the layers."""
    written = making.completed_files()
    steps, mine = options.total_steps(source.rows["train"]), _share(_together(source, chosen))
    with (
        making.part() as (writer, _),
        progress.task("transfer", sum(map(len, mine)) * steps, "steps") as advance,
        stopping.deferred(),
    ):
        checkpoints = Checkpoints(writer)
        for together in mine:
            missing = [layer for layer in together if maps_file(layer) not in written.union(writer.files)]
            if not missing:
                advance(len(together) * steps)
                continue
            stopping.check()
            with source.running(together):
                trained = train_layers(
                    source,
                    together,
                    options,
                    device=device,
                    advance=advance,
                    checkpoints=checkpoints,
                    log=None if curves is None else curves.log,
                )
            for layer in missing:
                _save(writer, layer, trained[layer], progress)


def _choose(
    source: Source,
    options: TransferOptions,
    layers: list[int] | None,
    kept: set[int],
    keep_auto: int,
    auto_windows: bool,
) -> tuple[list[int], set[int]]:
    """The layers to train and those that keep softmax. Raises UsageError for options that do not fit this capture."""
    if keep_auto and layers is not None:
        raise UsageError("--keep-softmax auto:N looks at all layers. With --layers, name the layers to keep.")
    if keep_auto and not options.hybrid.window:
        raise UsageError("--keep-softmax auto:N measures what the window misses, and --window is 0. Name the layers.")
    if auto_windows and layers is not None:
        raise UsageError("--windows auto looks at all layers. With --layers, give every layer's window.")
    if auto_windows and not options.hybrid.window:
        raise UsageError("--windows auto shares out the memory of --window, which is 0. Give it a window.")
    if options.windows is not None and len(options.windows) != len(source.layers):
        raise UsageError(f"--windows has {len(options.windows)} windows; the teacher has {len(source.layers)} layers.")
    seq_len = source.capture.data["seq_len"]
    if options.window_dropout and not 0 < options.hybrid.slots < seq_len:
        raise UsageError(
            "--window-dropout trains on the keys before the window. It needs a --window above 0, and rows that are "
            f"longer than the {options.hybrid.slots} tokens that the window can see. These rows have {seq_len} tokens."
        )
    chosen = sorted(set(range(len(source.layers))) - kept if layers is None else set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(source.layers):
        raise UsageError(
            f"--layers must be between 0 and {len(source.layers) - 1}, the layers of {source.capture.path}."
        )
    if other := sorted(set(chosen) - {i for i, info in enumerate(source.layers) if info.has_attention}):
        raise UsageError(f"Layer {other[0]} has no softmax attention to convert. Leave it out of --layers.")
    if kept.intersection(chosen):
        raise UsageError(f"Layer {min(kept.intersection(chosen))} is in --layers and in --keep-softmax. Choose one.")
    return chosen, kept


def _importance(
    source: Source,
    output: Path | str,
    force: bool,
    teacher: str | None,
    load: LoadOptions,
    device: torch.device,
    progress: Progress,
) -> Importance:
    """What every layer's loss needs of the keys before a window. A transfer that is continued has it already."""
    begun = Path(output) / IMPORTANCE_FILE
    if begun.is_file() and begun_config(output, force) is not None and not force:
        return Importance.from_json(json.loads(begun.read_text(encoding="utf-8")))
    model = source.teacher or load_captured(source.capture, teacher, load, progress)
    return measure_importance(model, source.tokens["validation"], source.layers, device, progress)


def _windows(source: Source, chosen: list[int], options: TransferOptions, importance: Importance) -> tuple[int, ...]:
    """Every layer's window; 0 for those that are not converted."""
    costs = {i: info.num_key_value_heads * (info.head_dim + info.v_head_dim) for i, info in enumerate(source.layers)}
    losses = {layer: importance.curve(layer) for layer in chosen}
    longest = max(options.hybrid.window, source.capture.data["seq_len"] // LONGEST_WINDOW)
    found = share_out(losses, costs, options.hybrid.window, longest)
    return tuple(found.get(layer, 0) for layer in range(len(source.layers)))


def _tell(chosen: list[int], kept: set[int], options: TransferOptions, progress: Progress) -> None:
    """Say what was chosen by importance."""
    if kept:
        progress.note(f"layers {', '.join(map(str, sorted(kept)))} stay softmax")
    if options.windows is not None:
        progress.note(f"windows: {', '.join(f'{options.windows[layer]} in layer {layer}' for layer in chosen)}")


def _share(groups: list[list[int]]) -> list[list[int]]:
    """This rank's neighbouring groups of layers. If there are more ranks than groups, groups are cut into pieces."""
    if len(groups) < ranks.size():
        pieces = -(-ranks.size() // len(groups))
        groups = [part for layers in groups for part in _pieces(layers, pieces) if part]
    return _pieces(groups, ranks.size())[ranks.rank()]


def _pieces(items: list[T], count: int) -> list[list[T]]:
    """The items in order, cut into `count` pieces of nearly equal length. Some pieces may be empty."""
    ends = [len(items) * number // count for number in range(count + 1)]
    return [items[start:stop] for start, stop in pairwise(ends)]


def _source(
    capture: Artifact,
    teacher: str | None,
    load: LoadOptions,
    device: torch.device,
    block_size: int | None,
    folder: Path,
    progress: Progress,
) -> Source:
    """The activations that the capture kept, or the teacher that computes them, block by block with a `block_size`."""
    if block_size and capture.config.get("store") != "tokens":
        raise UsageError(
            f"--block-size is for captures made with --store tokens, and {capture.path} holds activations. Leave it "
            "out."
        )
    if capture.config.get("store", "attention") == "attention":
        return StoredActivations(capture)
    model = load_captured(capture, teacher, load, progress)
    if block_size:
        return RollingActivations(capture, model, device, block_size, folder, progress)
    return ComputedActivations(capture, model, device)


def _together(source: Source, chosen: list[int]) -> list[list[int]]:
    """The chosen layers, in the groups in which they are computed."""
    found = ([layer for layer in together if layer in chosen] for together in source.together)
    return [layers for layers in found if layers]


def _save(writer: ArtifactWriter, layer: int, trained: Trained, progress: Progress) -> None:
    for event in trained.events:
        writer.log(layer=layer, **event)
    figures = trained.figures
    writer.log(event="layer", layer=layer, **figures)
    writer.save(maps_file(layer), trained.maps, {"figures": json.dumps(figures, sort_keys=True)})
    progress.note(
        f"layer {layer}: mse {figures['initial_mse']:.3g} -> {figures['mse']:.3g} "
        f"({figures['relative_mse']:.1%} of the output's power; window alone "
        f"{figures['relative_window_mse']:.1%})"
    )


def _kept(source: Source, given: Collection[int | str], others: int) -> set[int]:
    """The layers that keep softmax attention by name.

    Raises UsageError for a layer that does not exist, or if no layer is left to be trained when `others` are kept too.
    """
    kept = {layer for layer in given if isinstance(layer, int)}
    if "sliding" in given:
        kept |= {layer for layer, info in enumerate(source.layers) if info.spec.sliding_window is not None}
    unknown = kept - set(range(len(source.layers)))
    if unknown:
        raise UsageError(f"--keep-softmax {min(unknown)}: The layers are 0 to {len(source.layers) - 1}.")
    kept |= {layer for layer, info in enumerate(source.layers) if not info.has_attention}
    if len(kept) + others >= len(source.layers):
        raise UsageError("--keep-softmax leaves no layer to convert. Keep fewer layers.")
    return kept


def _figures(writer: ArtifactWriter, parent: Artifact, layer: int) -> dict[str, Any]:
    """The figures that were saved with the layer's maps, perhaps by an earlier run, and those of the capture."""
    measured = parent.summary.get("layers", {}).get(str(layer), {})
    with safe_open(writer.path / maps_file(layer), framework="pt") as file:
        figures = json.loads(file.metadata()["figures"])
    return {**figures, **{name: measured[name] for name in CARRIED if name in measured}}
