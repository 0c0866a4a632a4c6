"""Where an artifact keeps the feature maps of its layers, and which layers have none."""

from __future__ import annotations

from lolcats_formats import Artifact


def maps_file(layer: int) -> str:
    """Where an artifact keeps a layer's maps."""
    return f"maps/layer-{layer:03d}.safetensors"


def kept_layers(artifact: Artifact) -> list[int]:
    """The layers that a transfer, and all that is made from it, leaves softmax."""
    return artifact.config.get("keep_softmax", [])


def kept_config(artifact: Artifact) -> dict[str, list[int]]:
    """The entry of a configuration that says so; empty if there are none."""
    kept = kept_layers(artifact)
    return {"keep_softmax": kept} if kept else {}
