"""What differs between two artifacts, in the words of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lolcats_cli.teacher.identity import PARTS

MOST, LONGEST = 5, 60  # differences that are told; characters of a value
# By kind, the entries of a configuration that an option of another name gives.
RENAMED = {
    "capture": {"stored": "--store-dtype", "logits": "--store-logits"},
    "transfer": {"kept_heads": "--keep-softmax"},
    "lora": {"train_maps": "--freeze-maps", "logits": "the stored predictions"},
    "student": {"max_shard_bytes": "--max-shard-size"},
}
THINGS = {"teacher": "the teacher", "data": "the data", "parents": "the artifact that it is made from"}


def in_words(kind: str, field: str) -> str:
    """What people call a field of an artifact's manifest, such as `config.hybrid.window`: the option that gives it, or
    the thing that it is of."""
    top, _, rest = field.partition(".")
    if top in THINGS:
        return f"the teacher's {PARTS[rest]}" if top == "teacher" and rest in PARTS else THINGS[top]
    entry, _, inner = rest.partition(".")
    if entry == "imported":
        return "the checkpoint"
    if kind in ("lora", "student") and entry in ("hybrid", "keep_softmax"):
        return "the transfer"
    key = inner.partition(".")[0] if inner and entry in ("hybrid", "data") else entry
    return RENAMED.get(kind, {}).get(key, f"--{key.replace('_', '-')}")


def say(kind: str, found: Mapping[str, tuple[Any, Any]]) -> str:
    """In words, what differs between an artifact of this kind that is there and the one that is to be made.

    found: by field the value there and the value here, as `lolcats_formats.differences` finds them.
    """
    values: dict[str, tuple[list[str], list[str]]] = {}
    for field, pair in found.items():
        for value, side in zip(pair, values.setdefault(in_words(kind, field), ([], [])), strict=True):
            if value is not None:
                side.append(_value(field, value))
    if "--keep-softmax" in values:
        values.pop("--layers", None)  # the others
    said = []
    for what, (there, here) in values.items():
        if what.startswith("--"):
            said.append(f"{what} is {','.join(there) or 'not given'} there and {','.join(here) or 'not given'} here")
        else:
            said.append(f"{what} {'differ' if what.endswith('s') else 'differs'}")
    return "; ".join(said[:MOST]) + (f"; and {len(said) - MOST} more" if len(said) > MOST else "")


def _value(field: str, value: Any) -> str:
    """As it is written on the command line."""
    above, _, key = field.rpartition(".")
    if key == "kept_heads" and isinstance(value, dict):
        text = ",".join(_value(f"{field}.{layer}", heads) for layer, heads in value.items())
    elif above.endswith(".kept_heads") and isinstance(value, list):
        text = ",".join(f"{key}.{head}" for head in value)
    elif isinstance(value, list):
        text = ("-" if key == "samples" else ",").join(map(str, value))
    elif isinstance(value, bool):
        text = "on" if value is not (key == "train_maps") else "off"
    elif key == "max_shard_bytes" and isinstance(value, int | float):
        text = f"{value / 1e9:g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
