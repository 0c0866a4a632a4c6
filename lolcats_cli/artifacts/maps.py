"""The files in which an artifact keeps the feature maps of its layers, and the layers without feature maps."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lolcats_formats import Artifact
from lolcats_kernels.spec import BY_LAYER, HybridConfig, layer_config

from lolcats_cli.errors import BadInput, IdentityMismatch


def maps_file(layer: int) -> str:
    """The file in which an artifact keeps a layer's maps."""
    return f"maps/layer-{layer:03d}.safetensors"


def kept_layers(artifact: Artifact) -> list[int]:
    """The layers that keep their softmax attention, in a transfer and in everything that is made from it."""
    kept: list[int] = artifact.config.get("keep_softmax", [])
    return kept


def kept_config(artifact: Artifact) -> dict[str, list[int]]:
    """The entry of a configuration with the kept layers; empty if there are none."""
    kept = kept_layers(artifact)
    return {"keep_softmax": kept} if kept else {}


def hybrid_configs(artifact: Artifact, layers: Collection[int]) -> dict[int, HybridConfig]:
    """The hybrid attention of these layers of a transfer, or of what is made from it.

    Raises `BadInput` for a configuration that contradicts itself.
    """
    try:
        return {layer: layer_config(artifact.config["hybrid"], layer) for layer in layers}
    except (ValueError, IndexError) as error:
        raise BadInput(
            f"{artifact.path} does not describe the attention of its layers ({error}). Make it again."
        ) from error


def hybrid_entry(artifact: Artifact) -> dict[str, Any]:
    """What a student's configuration says of its hybrid attention: `layer_config` takes it."""
    hybrid = artifact.config["hybrid"]
    by_layer = {name: hybrid[name] for name in (*BY_LAYER, "kept_heads") if name in hybrid}
    return HybridConfig(**{name: hybrid[name] for name in hybrid if name not in by_layer}).to_dict() | by_layer


def recorded_heads(artifact: Artifact, layers: Collection[int]) -> dict[int, tuple[int, int]]:
    """For every layer, the number of query heads that have maps, and the size of their queries, of those recorded.

    Raises `IdentityMismatch` for a layer that the capture did not record.
    """
    seen = artifact.teacher["layers"]
    missing = sorted(layer for layer in layers if layer >= len(seen) or not seen[layer]["num_heads"])
    if missing:
        raise IdentityMismatch(
            f"{artifact.path} was made from a teacher that has no softmax attention in layer {missing[0]}."
        )
    heads = {}
    for layer, config in hybrid_configs(artifact, layers).items():
        try:
            count = config.mapped_heads(seen[layer]["num_heads"], seen[layer]["num_key_value_heads"])
        except ValueError as error:
            raise IdentityMismatch(f"{artifact.path}, layer {layer}: {error}") from error
        heads[layer] = count, seen[layer]["head_dim"]
    return heads
