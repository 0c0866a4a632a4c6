"""transfer: trains feature maps and mixing factors layer by layer from a capture.

A capture of queries, keys and values needs no teacher. For a capture of hidden states or tokens, the teacher computes
queries, keys and values again.

The artifact holds `maps/layer-LLL.safetensors` for every layer: a `HybridMaps` state dict.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lolcats_formats import Artifact, ArtifactWriter, Damaged, begun_config
from lolcats_formats.place import Resume
from safetensors import safe_open

from lolcats_cli import ranks, stopping
from lolcats_cli.artifacts.describe import IMPORTANCE_FILE
from lolcats_cli.artifacts.maps import maps_file
from lolcats_cli.errors import IdentityMismatch
from lolcats_cli.loading.student import load_captured
from lolcats_cli.progress import Progress
from lolcats_cli.stages.activations import ComputedActivations, MappedHeads, Source, StoredActivations
from lolcats_cli.stages.asked import Asked
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.choice import Chosen, choose
from lolcats_cli.stages.curves import LayerCurves, tensorboard_folder
from lolcats_cli.stages.importance import Importance, measure_importance
from lolcats_cli.stages.kept import Kept
from lolcats_cli.stages.layer_training import Trained, train_layers
from lolcats_cli.stages.rolling import RollingActivations
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.stages.writing import Making, check_config, make_artifact
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.record import LayerInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARRIED = ("entropy", "head_entropy", "esl")  # of a layer's figures in the capture: shown without it too
T = TypeVar("T")


def transfer(
    capture: Path | str,
    output: Path | str,
    *,
    options: TransferOptions = TransferOptions(),
    layers: list[int] | None = None,
    keep_softmax: Collection[int | str | tuple[int, int]] = (),
    keep_auto: int = 0,
    keep_heads: int = 0,
    auto: Collection[str] = (),
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
            teacher has a sliding window. A pair of a layer and a key head keeps that head and its query heads.
        keep_auto: keep softmax attention in this number of other layers: those whose conversion costs the teacher's
            predictions most (`stages/importance.py`).
        keep_heads: keep softmax attention in this number of key heads of all other layers, chosen in the same way. A
            layer whose key heads are all kept is a kept layer.
        auto: the sizes that are chosen for each layer by what the predictions need. "feature_dims": layers that need
            little beyond any window get half of the columns. "windows": the memory that is left, if all layers are to
            take no more than with `options.hybrid` in each, goes to layers that need longer ones. "steps": half of the
            steps of all layers go to those whose conversion costs most.
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
        hybrid = options.hybrid
        asked = Asked(
            layers,
            keep_softmax,
            keep_auto,
            keep_heads,
            auto,
            block_size,
            options.by_layer,
            hybrid.feature_map,
            hybrid.window,
            hybrid.layout,
            options.window_dropout,
        )
        converted, kept = asked.check(parent)
        source = _source(parent, teacher, load, device, block_size, rolling, progress)

        def measure(heads_window: int | None) -> Importance:
            settings, unknown = _unmeasured(options, asked, converted, kept, begun_config(output) or {})
            check_config(output, "transfer", settings, force=force, unknown=unknown)
            return ranks.share(
                lambda: _importance(source, heads_window, output, force, teacher, load, device, progress)
            )

        chosen = choose(source, options, asked, converted, kept, measure)
        if chosen.importance is not None:
            _tell(chosen, progress)
        fields: dict[str, Any] = {
            "config": _config(chosen.options, chosen.layers, chosen.kept),
            "teacher": parent.teacher,
            "data": parent.data,
            "parents": [parent],
        }
        if not check_config(output, "transfer", fields["config"], force=force):
            source.teacher()  # loaded before anything is written

        def work(making: Making) -> dict[str, Any]:
            curves = LayerCurves(tensorboard_folder(output)) if log_to else None
            if making.main is not None and chosen.importance is not None:
                making.main.write_json(IMPORTANCE_FILE, chosen.importance.to_json())
            _train(source, chosen.layers, chosen.options, device, making, progress, curves)
            if isinstance(source, RollingActivations):
                source.remove()
            if making.main is None:
                return {}
            making.main.order_metrics(lambda event: event["layer"])
            return {"layers": {str(layer): _figures(making.main, parent, layer) for layer in chosen.layers}}

        return make_artifact(output, "transfer", fields, work, resume=resume, force=force, progress=progress)


def _config(options: TransferOptions, layers: list[int], kept: Kept) -> dict[str, Any]:
    return {
        **options.to_config(),
        "layers": layers,
        **({"keep_softmax": sorted(kept.layers)} if kept.layers else {}),
    }


def _unmeasured(
    options: TransferOptions, asked: Asked, layers: list[int], kept: Kept, begun: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """The configuration before importance is measured, with words for what is to be chosen; and the entries of which
    no more can be compared with the configuration that was begun."""
    config = _config(replace(options, kept_heads=tuple(sorted(kept.heads))), layers, kept)
    hybrid, found = config["hybrid"], begun.get("hybrid")
    begun_hybrid = found if isinstance(found, dict) else {}
    unknown: set[str] = set()
    if asked.keep_auto or asked.keep_heads:
        unknown = {"layers", "keep_softmax", "hybrid.kept_heads"}
    if asked.keep_auto and "keep_softmax" not in begun:
        config["keep_softmax"] = f"auto:{asked.keep_auto}"
        unknown.remove("keep_softmax")
    elif asked.keep_heads and "keep_softmax" not in begun and "kept_heads" not in begun_hybrid:
        hybrid["kept_heads"] = f"heads:{asked.keep_heads}"
        unknown.remove("hybrid.kept_heads")
    for name in asked.auto:
        here, there = (config, begun) if name == "steps" else (hybrid, begun_hybrid)
        here[name] = "auto"
        if isinstance(there.get(name), list):
            unknown.add(name if name == "steps" else f"hybrid.{name}")
    return config, unknown


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
    mapped = MappedHeads(source, options.kept_heads) if options.kept_heads else source
    written = making.completed_files()
    steps = {layer: options.total_steps(layer, source.rows["train"]) for layer in chosen}
    mine = _share(_together(source, chosen), steps)
    with (
        making.part() as (writer, _),
        progress.task("transfer", sum(steps[layer] for together in mine for layer in together), "steps") as advance,
        stopping.deferred(),
    ):
        checkpoints = Checkpoints(writer)
        for together in mine:
            missing = [layer for layer in together if maps_file(layer) not in written.union(writer.files)]
            if not missing:
                advance(sum(steps[layer] for layer in together))
                continue
            stopping.check()
            with mapped.running(together):
                trained = train_layers(
                    mapped,
                    together,
                    options,
                    device=device,
                    advance=advance,
                    checkpoints=checkpoints,
                    log=None if curves is None else curves.log,
                )
            for layer in missing:
                figures, heads = trained[layer].figures, options.layer_hybrid(layer).kept_heads
                errors = _of_all_heads(figures["head_relative_mse"], source.layers[layer], heads)
                figures["head_relative_mse"] = errors
                _save(writer, layer, trained[layer], progress)


def _measured_before(output: Path) -> Importance | None:
    """What the transfer in `output` was begun with. Raises Damaged if it cannot be read."""
    file = output / IMPORTANCE_FILE
    try:
        return Importance.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{file} has changed since it was completed. Remove {output}, and start again.") from error


def _importance(
    source: Source,
    heads_window: int | None,
    output: Path | str,
    force: bool,
    teacher: str | None,
    load: LoadOptions,
    device: torch.device,
    progress: Progress,
) -> Importance:
    """What every layer's loss needs of the keys before a window. A transfer that is continued has it already.

    Raises IdentityMismatch if `output` holds a transfer that was made without it, Damaged if it cannot be read there.
    """
    if not force and begun_config(output) is not None:
        found = _measured_before(Path(output))
        if found is not None and (heads_window is None or found.heads):
            return found
        if found is not None or (Path(output) / maps_file(0)).parent.is_dir():
            what = "anything chosen by importance (auto, heads:N)" if found is None else "measuring single key heads"
            raise IdentityMismatch(
                f"{output} holds a transfer that was made without {what}. Choose another output directory, give the "
                "settings it was made with, or replace it with --force."
            )
    model = source.teacher() or load_captured(source.capture, teacher, load, progress)
    return measure_importance(model, source.tokens["validation"], source.layers, device, progress, heads_window)


def _tell(chosen: Chosen, progress: Progress) -> None:
    """Say what was chosen by importance."""
    for words in chosen.kept.words():
        progress.note(words)
    for name, what in (("windows", "windows"), ("feature_dims", "feature sizes"), ("steps", "steps")):
        sizes = getattr(chosen.options, name)
        if isinstance(sizes, tuple):
            progress.note(f"{what}: {', '.join(f'{sizes[layer]} in layer {layer}' for layer in chosen.layers)}")


def _share(groups: list[list[int]], steps: Mapping[int, int]) -> list[list[int]]:
    """This rank's neighbouring groups of layers. If there are more ranks than groups, groups are cut into pieces.

    steps: of every layer.
    """
    if len(groups) < ranks.size():
        pieces = -(-ranks.size() // len(groups))
        groups = [part for layers in groups for part in _pieces(layers, pieces, [1] * len(layers)) if part]
    costs = [1 + sum(steps[layer] for layer in layers) for layers in groups]
    return _pieces(groups, ranks.size(), costs)[ranks.rank()]


def _pieces(items: list[T], count: int, costs: list[int]) -> list[list[T]]:
    """The items in order, cut into `count` pieces of nearly equal cost. Some pieces may be empty."""
    found: list[list[T]] = [[] for _ in range(count)]
    for item, cost, end in zip(items, costs, accumulate(costs), strict=True):
        found[int((end - cost / 2) * count / sum(costs))].append(item)  # where its middle lies
    return found


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
    if capture.config.get("store", "attention") == "attention":
        return StoredActivations(capture)

    def model() -> PreTrainedModel:
        return load_captured(capture, teacher, load, progress)

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


def _of_all_heads(values: list[float], info: LayerInfo, kept: Collection[int]) -> list[float]:
    """Errors of the query heads that have maps -> of all query heads; those of kept key heads have none."""
    found, group = iter(values), info.num_heads // info.num_key_value_heads
    return [0.0 if head // group in kept else next(found) for head in range(info.num_heads)]


def _figures(writer: ArtifactWriter, parent: Artifact, layer: int) -> dict[str, Any]:
    """The figures that were saved with the layer's maps, perhaps by an earlier run, and those of the capture."""
    measured = parent.summary.get("layers", {}).get(str(layer), {})
    with safe_open(writer.path / maps_file(layer), framework="pt") as file:
        figures = json.loads(file.metadata()["figures"])
    return {**figures, **{name: measured[name] for name in CARRIED if name in measured}}
