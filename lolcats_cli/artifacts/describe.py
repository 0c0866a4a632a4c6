"""inspect: reads what an artifact's manifest and headers say, without torch."""

from __future__ import annotations

from typing import Any

from lolcats_formats import Artifact

from lolcats_cli.errors import UsageError

# As `lolcats_kernels.spec` has it, which needs torch. A test compares the two.
BY_LAYER = {"windows": "window", "feature_dims": "feature_dim"}
IMPORTANCE_FILE = "importance.json"  # of a transfer: what the teacher loses with untrained maps


def describe(artifact: Artifact) -> dict[str, Any]:
    """The artifact as one document: identity, lineage, settings, and one record per layer."""
    teacher = artifact.teacher
    sizes = {name: entry["size"] for name, entry in artifact.files.items()}
    return {
        "path": str(artifact.path),
        "kind": artifact.kind,
        "id": artifact.id,
        "created": artifact.manifest["created"]["time"],
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "teacher": {
            key: teacher[key] for key in ("path", "revision", "architecture", "num_hidden_layers") if key in teacher
        },
        "data": artifact.data,
        "config": artifact.config,
        "parents": [{"kind": p["kind"], "id": p["id"], "path": p["path"]} for p in artifact.parents],
        "summary": {key: value for key, value in artifact.summary.items() if key != "layers"},
        "layers": [_layer(artifact, index, layer) for index, layer in enumerate(teacher.get("layers", []))],
    }


def describe_lineage(artifact: Artifact) -> list[dict[str, Any]]:
    """The artifact and its ancestors, nearest first, each with its recorded path and whether it is there now."""
    here: dict[str, Any] = {
        "id": artifact.id,
        "kind": artifact.kind,
        "path": str(artifact.path),
        "parents": artifact.parents,
    }
    found: list[dict[str, Any]] = []
    todo = [(here, 0)]
    while todo:
        entry, depth = todo.pop(0)
        found.append({key: entry[key] for key in ("kind", "id", "path")} | {"here": depth == 0 or _is_there(entry)})
        todo = [(parent, depth + 1) for parent in entry["parents"]] + todo
    return found


def _is_there(entry: dict[str, Any]) -> bool:
    try:
        return bool(Artifact.open(entry["path"], entry["kind"]).id == entry["id"])
    except (OSError, ValueError):  # nothing there, or no path at all
        return False


def describe_layer(artifact: Artifact, layer: int) -> dict[str, Any]:
    """One layer: its attention, its tensors by file, and its figures. Raises `UsageError` for an unknown layer."""
    layers = artifact.teacher.get("layers", [])
    if layer >= len(layers):
        raise UsageError(f"{artifact.path} has no layer {layer}. Its layers are 0 to {len(layers) - 1}.")
    tensors = [
        {"file": name, "tensor": tensor, "dtype": info.dtype, "shape": list(info.shape)}
        for name in _files(artifact, layer)
        for tensor, info in artifact.header(name).items()
        if artifact.kind != "student" or f".{layer}." in tensor
    ]
    events = [event for event in artifact.metrics() if event.get("layer") == layer and event["event"] == "validation"]
    figures = artifact.summary.get("layers", {}).get(str(layer), {})
    columns = {name: figures[f"head_{name}"] for name in ("relative_mse", "entropy") if f"head_{name}" in figures}
    by_head = [
        {"head": head, **dict(zip(columns, values, strict=True))}
        for head, values in enumerate(zip(*columns.values(), strict=False))
    ]
    return {**_layer(artifact, layer, layers[layer]), "by_head": by_head, "tensors": tensors, "validation": events}


def _layer(artifact: Artifact, index: int, layer: dict[str, Any]) -> dict[str, Any]:
    figures = artifact.summary.get("layers", {}).get(str(index), {})
    hybrid = artifact.config.get("hybrid", {})
    kept_heads = hybrid.get("kept_heads")
    return {
        "layer": index,
        "heads": layer["num_heads"],
        "key_heads": layer["num_key_value_heads"],
        "head_dim": layer["head_dim"],
        "scaling": layer["scaling"],
        "bytes": None
        if artifact.kind == "student"
        else sum(artifact.files[name]["size"] for name in _files(artifact, index)),
        **{
            key: figures[key]
            for key in ("mse", "relative_mse", "relative_window_mse", "entropy", "esl")
            if key in figures
        },
        **({"gamma": figures["gamma"]["mean"]} if "gamma" in figures else {}),
        **{field: hybrid[name][index] for name, field in BY_LAYER.items() if name in hybrid},
        **({"kept_heads": kept_heads.get(str(index), [])} if kept_heads else {}),
        **_losses(artifact, index),
    }


def _losses(artifact: Artifact, layer: int) -> dict[str, float]:
    """What converting this attention costs the teacher with some windows, before training, if that was measured."""
    if IMPORTANCE_FILE not in artifact.files:
        return {}
    found = artifact.read_json(IMPORTANCE_FILE)
    losses = found["layers"].get(str(layer), [])
    return {f"loss@{window}": loss for window, loss in zip(found["windows"], losses, strict=False)}


def _files(artifact: Artifact, layer: int) -> list[str]:
    if artifact.kind == "student":
        return [name for name in sorted(artifact.files) if name.endswith(".safetensors")]
    prefixes = (f"layers/{layer:03d}/", f"maps/layer-{layer:03d}.")
    return [name for name in sorted(artifact.files) if name.startswith(prefixes)]
