"""The bytes that a student and its teacher keep of one sequence while they generate. `plan` uses it without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

SUM_BYTES = 4  # of an element of S and z: fp32
POSITION_BYTES = 8  # of the length


def cache_bytes(layers: Sequence[Mapping[str, Any]], tokens: int, itemsize: int) -> int:
    """The bytes of the keys and values of `tokens` tokens in softmax layers.

    layers: as in a manifest's `teacher.layers`. itemsize: bytes of a key's element.
    """
    total = 0
    for layer in layers:
        window = layer.get("sliding_window")
        seen = tokens if window is None else min(tokens, window)
        total += layer["num_key_value_heads"] * (layer["head_dim"] + value_dim(layer)) * itemsize * seen
    return total


def value_dim(layer: Mapping[str, Any]) -> int:
    """The size of a head's values."""
    return int(layer.get("v_head_dim") or layer["head_dim"])


def student_bytes(
    layers: Sequence[Mapping[str, Any]],
    hybrid: Mapping[str, Any],
    kept: Collection[int],
    tokens: int,
    itemsize: int,
    *,
    on_gpu: bool = False,
) -> int:
    """The bytes of a student's state after `tokens` tokens. They grow with the tokens in the `kept` layers, and in the
    kept heads of others, alone.

    hybrid: as `layer_config` takes it. on_gpu: where Triton decodes, keys wait for the sums in the state.
    """
    import torch
    from lolcats_kernels import HybridMaps
    from lolcats_kernels.spec import layer_config

    total = cache_bytes([layers[number] for number in kept if number < len(layers)], tokens, itemsize)
    for number, layer in enumerate(layers):
        if number not in kept and layer["num_heads"]:
            config = layer_config(hybrid, number)
            count = config.mapped_heads(layer["num_heads"], layer["num_key_value_heads"])
            with torch.device("meta"):  # shapes alone
                maps = HybridMaps(config, count, layer["head_dim"])
            keys = len(config.kept_heads)
            heads = layer["num_key_value_heads"] - keys, layer["head_dim"], value_dim(layer)
            slots = config.slots + (config.waiting if on_gpu else 0)
            total += state_bytes(count, maps.num_features, *heads, slots, itemsize)
            total += cache_bytes([{**layer, "num_key_value_heads": keys}], tokens, itemsize)
    return total


def state_bytes(
    num_heads: int,
    num_features: int,
    num_key_value_heads: int,
    head_dim: int,
    v_head_dim: int,
    slots: int,
    itemsize: int,
) -> int:
    """The bytes of the state of one layer's hybrid attention: those of the tensors of `KVState`."""
    sums = num_heads * num_features * (v_head_dim + 1) * SUM_BYTES  # S, and z as one more column
    window = num_key_value_heads * slots * (head_dim + v_head_dim) * itemsize
    return sums + window + POSITION_BYTES
