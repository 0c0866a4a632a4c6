"""A small transfer artifact, and its pieces, for the tests of the artifact format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, ArtifactWriter

CONFIG = {"hybrid": {"window": 64, "feature_dim": 16}, "lr": 1e-2, "seed": 0}
TEACHER = {"path": "/somewhere/teacher", "model_type": "llama", "weights_sha256": "0" * 64, "layers": []}
LAYERS = [f"maps/layer-{i:03d}.safetensors" for i in range(3)]

Create = Callable[..., ArtifactWriter]


def layer_tensors(layer: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    return {
        "q_weight": torch.randn(2, 4, 3, generator=generator),
        "k_weight": torch.randn(2, 4, 3, generator=generator).to(torch.bfloat16),
        "window_logit": torch.randn(2, generator=generator),
    }


@pytest.fixture
def create(tmp_path: Path) -> Iterator[Create]:
    """`ArtifactWriter.create` with settings of a transfer, in tmp_path/a unless told otherwise."""
    writers = []

    def make(path: Path | None = None, kind: str = "transfer", **other: object) -> ArtifactWriter:
        settings = {"config": CONFIG, "teacher": TEACHER, "data": {"tokens": 100}, "tool": "test 1", **other}
        writer = ArtifactWriter.create(path or tmp_path / "a", kind, **settings)  # type: ignore[arg-type]
        writers.append(writer)
        return writer

    yield make
    for writer in writers:
        writer.close()


def write_layers_but_the_end(writer: ArtifactWriter) -> None:
    for i, name in enumerate(LAYERS):
        if not writer.has(name):
            writer.log(layer=i, loss=1 / (i + 1))
            writer.save(name, layer_tensors(i))


def write_layers(writer: ArtifactWriter) -> Artifact:
    """What a stage does: each layer that is not there yet, its metrics before it; then the end."""
    write_layers_but_the_end(writer)
    return writer.finish({"trained": len(LAYERS)})


@pytest.fixture
def artifact(create: Create) -> Artifact:
    with create() as writer:
        return write_layers(writer)


@pytest.fixture
def kit() -> SimpleNamespace:
    """This module's settings and functions, as test modules cannot import a conftest."""
    return SimpleNamespace(
        CONFIG=CONFIG,
        TEACHER=TEACHER,
        LAYERS=LAYERS,
        layer_tensors=layer_tensors,
        write_layers=write_layers,
        write_layers_but_the_end=write_layers_but_the_end,
    )
