"""Where an artifact keeps the feature maps of its layers, and which layers have none."""

from __future__ import annotations

from collections.abc import Collection

from lolcats_formats import Artifact

from lolcats_cli.errors import IdentityMismatch


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


def recorded_heads(artifact: Artifact, layers: Collection[int]) -> dict[int, tuple[int, int]]:
    """By layer the number of query heads, and the size of their queries, as the capture saw them.

    Raises `IdentityMismatch` for a layer that it did not see.
    """
    seen = artifact.teacher["layers"]
    heads = {layer: (seen[layer]["num_heads"], seen[layer]["head_dim"]) for layer in layers if layer < len(seen)}
    missing = sorted(set(layers) - {layer for layer, (count, _) in heads.items() if count})
    if missing:
        raise IdentityMismatch(f"{artifact.path} is of a teacher that has no softmax attention in layer {missing[0]}.")
    return heads
