"""transfer: feature maps and mixing factors, trained layer by layer from a capture.

A capture of queries, keys and values needs no teacher. One of hidden states or tokens does: it computes them again.

The artifact holds `maps/layer-LLL.safetensors` per layer: a `HybridMaps` state dict.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lolcats_formats import Artifact, ArtifactWriter
from lolcats_formats.writer import Resume
from safetensors import safe_open

from lolcats_cli import __version__, stopping
from lolcats_cli.errors import UsageError
from lolcats_cli.progress import Progress
from lolcats_cli.stages.activations import ComputedActivations, Source, StoredActivations
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.layer_training import Trained, TransferOptions, train_layers, window_errors
from lolcats_cli.stages.models import maps_file, teacher_folder
from lolcats_cli.teacher.load import LoadOptions, load_model

CARRIED = ("entropy", "head_entropy", "esl")  # of a layer's figures in the capture: shown without it too
MAX_SIZE = 256  # of heads and feature maps, in the kernels


def transfer(
    capture: Path | str,
    output: Path | str,
    *,
    options: TransferOptions = TransferOptions(),
    layers: list[int] | None = None,
    keep_softmax: Collection[int | str] = (),
    keep_auto: int = 0,
    teacher: str | None = None,
    load: LoadOptions = LoadOptions(),
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Train every layer's maps, or those of `layers` alone. Running it again resumes after the last checkpoint.

    Args:
        layers: train a part; `join` puts parts together.
        keep_softmax: layers that stay softmax in the student, by index; "sliding" stands for those whose teacher's
            attention is a sliding window.
        keep_auto: keep so many others, those whose window alone misses most of the softmax output.
        teacher: the teacher's folder, if it is needed and not where it was captured.
        load: the device to train on, and whether to trust the teacher's code; its dtype is that of the capture.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        FormatError: `capture` is not a finished capture, or `output` holds something else.
        UsageError: options that this capture cannot serve.
    """
    parent = Artifact.open(capture, "capture")
    target = load.resolved_device()
    source = _source(parent, teacher, load, target)
    if keep_auto and layers is not None:
        raise UsageError("--keep-softmax auto:N looks at all layers. With --layers, name those to keep.")
    if keep_auto and not options.hybrid.window:
        raise UsageError("--keep-softmax auto:N goes by what the window misses, and --window is 0. Name the layers.")
    if options.window_dropout and not 0 < options.hybrid.slots < parent.data["seq_len"]:
        raise UsageError(
            "--window-dropout trains on the keys before the window: it takes a --window, and rows that are longer than "
            f"what it may see ({options.hybrid.slots} of {parent.data['seq_len']} tokens)."
        )
    kept = _kept(source, keep_softmax, keep_auto)
    chosen = sorted(set(range(len(source.layers))) - kept if layers is None else set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(source.layers):
        raise UsageError(f"--layers must be between 0 and {len(source.layers) - 1}, the layers of {capture}.")
    if kept.intersection(chosen):
        raise UsageError(f"Layer {min(kept.intersection(chosen))} is in --layers and in --keep-softmax: choose one.")
    head_dim = max(info.head_dim for info in source.layers)
    if max(head_dim, options.hybrid.feature_dim) > MAX_SIZE:
        raise UsageError(
            f"Heads of {head_dim} with --feature-dim {options.hybrid.feature_dim} cannot be served: "
            f"head and feature sizes go up to {MAX_SIZE}."
        )
    if keep_auto:
        missed: dict[int, float] = {}
        for layers_together in _together(source, chosen):
            with source.running(layers_together):
                missed |= window_errors(source, layers_together, options, target)
        chosen = sorted(sorted(missed, key=lambda layer: missed[layer])[:-keep_auto])
        kept = set(range(len(source.layers))) - set(chosen)
        shown = ", ".join(f"{layer} ({error:.1%})" for layer, error in missed.items())
        progress.note(f"layers {', '.join(map(str, sorted(kept)))} stay softmax; missed by the window alone: {shown}")

    config = {key: value for key, value in asdict(options).items() if value is not None}
    if not options.window_dropout:
        del config["window_dropout"]  # as in transfers that were begun before there was such an option
    with ArtifactWriter.create(
        output,
        "transfer",
        config={**config, "layers": chosen, **({"keep_softmax": sorted(kept)} if kept else {})},
        teacher=parent.teacher,
        data=parent.data,
        parents=[parent],
        tool=f"lolcats {__version__}",
        resume=resume,
        force=force,
    ) as writer:
        if writer.finished:
            progress.note(f"{output} is finished already")
            return writer.finished
        steps = options.total_steps(source.rows["train"])
        checkpoints = Checkpoints(writer)
        with progress.task("transfer", len(chosen) * steps, "steps") as advance, stopping.deferred():
            for together in _together(source, chosen):
                if all(writer.has(maps_file(layer)) for layer in together):
                    advance(len(together) * steps)
                    continue
                stopping.check()
                with source.running(together):
                    trained = train_layers(
                        source,
                        together,
                        options,
                        device=target,
                        advance=advance,
                        checkpoints=checkpoints,
                    )
                for layer, found in trained.items():
                    if not writer.has(maps_file(layer)):
                        _save(writer, layer, found, progress)
        return writer.finish({"layers": {str(layer): _figures(writer, parent, layer) for layer in chosen}})


def _source(capture: Artifact, teacher: str | None, load: LoadOptions, device: torch.device) -> Source:
    """The activations that the capture kept, or the teacher that computes them."""
    if capture.config.get("store", "attention") == "attention":
        return StoredActivations(capture)
    folder = teacher_folder(capture, teacher)
    return ComputedActivations(
        capture, load_model(folder, replace(load, dtype=capture.config["dtype"], device="cpu")), device
    )


def _together(source: Source, chosen: list[int]) -> list[list[int]]:
    """The chosen layers, in the groups in which they are computed."""
    found = ([layer for layer in together if layer in chosen] for together in source.together)
    return [layers for layers in found if layers]


def _save(writer: ArtifactWriter, layer: int, trained: Trained, progress: Progress) -> None:
    for event in trained.events:
        writer.log(event="validation", layer=layer, **event)
    figures = trained.figures
    writer.log(event="layer", layer=layer, **figures)
    writer.save(maps_file(layer), trained.maps, {"figures": json.dumps(figures, sort_keys=True)})
    progress.note(
        f"layer {layer}: mse {figures['initial_mse']:.3g} -> {figures['mse']:.3g} "
        f"({figures['relative_mse']:.1%} of the output's power; window alone "
        f"{figures['relative_window_mse']:.1%})"
    )


def _kept(source: Source, given: Collection[int | str], others: int) -> set[int]:
    """The layers that are named to stay softmax. Raises UsageError for one that is not there, or if with so many
    others none is left to be trained."""
    kept = {layer for layer in given if isinstance(layer, int)}
    if "sliding" in given:
        kept |= {layer for layer, info in enumerate(source.layers) if info.spec.sliding_window is not None}
    unknown = kept - set(range(len(source.layers)))
    if unknown:
        raise UsageError(f"--keep-softmax {min(unknown)}: the layers are 0 to {len(source.layers) - 1}.")
    if len(kept) + others >= len(source.layers):
        raise UsageError("--keep-softmax leaves no layer to be converted.")
    return kept


def _figures(writer: ArtifactWriter, parent: Artifact, layer: int) -> dict:
    """The figures that were saved with the layer's maps, maybe by an earlier run, and what the capture measured."""
    measured = parent.summary.get("layers", {}).get(str(layer), {})
    with safe_open(writer.path / maps_file(layer), framework="pt") as file:
        figures = json.loads(file.metadata()["figures"])
    return {**figures, **{name: measured[name] for name in CARRIED if name in measured}}
