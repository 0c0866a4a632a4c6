"""inspect's figures by head, and the picture of them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, artifact_id
from lolcats_kernels import HybridConfig, HybridMaps
from lolcats_kernels.softmax import softmax_attention

from lolcats_cli.artifacts.describe import describe, describe_layer
from lolcats_cli.artifacts.head_errors_plot import plot
from lolcats_cli.artifacts.maps import maps_file
from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.stages.activations import StoredActivations
from lolcats_cli.stages.layer_losses import _hybrid


def edited(artifact: Path, folder: Path, change) -> Artifact:
    """A copy whose summary of layers is changed, with an id that fits."""
    shutil.copytree(artifact, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["summary"]["layers"])
    manifest["id"] = artifact_id(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.open(folder)


def test_errors_by_head_are_those_of_the_maps(pipeline: SimpleNamespace) -> None:
    artifact = Artifact.open(pipeline.transfer)
    source = StoredActivations(Artifact.open(pipeline.capture))
    for layer, info in enumerate(source.layers):
        maps = HybridMaps(HybridConfig(**artifact.config["hybrid"]), info.num_heads, info.head_dim)
        maps.load_state_dict(artifact.load(maps_file(layer)))
        (batch,) = (batches[layer] for batches in source.batches([layer], "validation", 1))
        target = softmax_attention(batch.q, batch.k, batch.v, info.spec)
        with torch.no_grad():
            error = (_hybrid(batch, maps, info) - target).square().sum((0, 2, 3)) / target.square().sum((0, 2, 3))
        assert artifact.summary["layers"][str(layer)]["head_relative_mse"] == pytest.approx(error.tolist(), rel=1e-4)


def test_inspect_shows_what_the_capture_measured_beside_the_error(pipeline: SimpleNamespace) -> None:
    """Without the capture at hand: the transfer carries it along."""
    captured = Artifact.open(pipeline.capture).summary["layers"]
    for artifact in (pipeline.capture, pipeline.transfer):
        for layer, shown in enumerate(describe(Artifact.open(artifact))["layers"]):
            assert (shown["entropy"], shown["esl"]) == (captured[str(layer)]["entropy"], captured[str(layer)]["esl"])
            assert ("relative_mse" in shown) == (artifact == pipeline.transfer)
    heads = describe_layer(Artifact.open(pipeline.transfer), 1)["by_head"]
    assert [head["head"] for head in heads] == [0, 1, 2, 3]
    assert [head["entropy"] for head in heads] == captured["1"]["head_entropy"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_every_head_is_drawn(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple] = []
    scatter = Axes.scatter
    monkeypatch.setattr(
        Axes, "scatter", lambda self, *args, **options: (drawn.append(args), scatter(self, *args, **options))[1]
    )
    artifact = Artifact.open(pipeline.transfer)
    plot(artifact, tmp_path / f"out{suffix}")
    figures = artifact.summary["layers"].values()
    assert drawn == [(layer["head_entropy"], layer["head_relative_mse"]) for layer in figures]
    assert (tmp_path / f"out{suffix}").read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_values_that_are_no_numbers_and_layers_of_other_sizes(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    def change(layers: dict) -> None:
        layers["0"] |= {"head_relative_mse": ["NaN", 0, 0.5], "head_entropy": [1, 2, 3]}
        layers["first"] = layers.pop("1") | {"head_entropy": []}  # of no layer

    plot(edited(pipeline.transfer, tmp_path / "t", change), tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_what_cannot_be_drawn(pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="is a lora artifact"):
        plot(Artifact.open(pipeline.lora), tmp_path / "out.png")
    with pytest.raises(UsageError, match=r"out\.txt: The name must end in the format of a picture"):
        plot(Artifact.open(pipeline.transfer), tmp_path / "out.txt")
    old = edited(pipeline.transfer, tmp_path / "old", lambda layers: layers["1"].pop("head_entropy"))
    with pytest.raises(BadInput, match="made by an earlier lolcats"):
        plot(old, tmp_path / "out.png")
    short = edited(pipeline.transfer, tmp_path / "short", lambda layers: layers["1"]["head_entropy"].pop())
    with pytest.raises(BadInput, match="does not hold the error and the attention entropy of every head"):
        plot(short, tmp_path / "out.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'lolcats\[plot\]'"):
        plot(Artifact.open(pipeline.transfer), tmp_path / "out.png")
    assert not list(tmp_path.glob("out.*"))


def test_a_figure_that_is_no_number_is_refused_by_the_reader(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    from lolcats_formats import Damaged

    for number, value in enumerate(("high", ["x"], {"mean": 1}, None)):
        with pytest.raises(Damaged, match=r"summary\.layers\.0"):
            edited(pipeline.transfer, tmp_path / str(number), lambda layers, v=value: layers["0"].update(entropy=v))
