"""What an artifact was made from, and the figures of each step for people. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_formats import Artifact


@dataclass(frozen=True)
class Step:
    """One artifact of a lineage.

    Attributes:
        path: its path when the next artifact was made from it.
        artifact: None if it is no longer there, or if another artifact lies there.
    """

    kind: str
    id: str
    path: str
    artifact: Artifact | None

    @property
    def summary(self) -> dict[str, Any]:
        """Its results; empty if the artifact is no longer there."""
        return self.artifact.summary if self.artifact else {}


def history(artifact: Artifact) -> list[Step]:
    """The artifact and its ancestors, nearest first. Each is looked for at its recorded path and beside `artifact`."""
    steps = [Step(artifact.kind, artifact.id, str(artifact.path), artifact)]
    todo = list(artifact.parents)
    while todo:
        entry = todo.pop(0)
        steps.append(Step(entry["kind"], entry["id"], entry["path"], _find(entry, artifact.path)))
        todo = entry["parents"] + todo
    return steps


def _find(entry: dict[str, Any], near: Path) -> Artifact | None:
    recorded = Path(entry["path"])
    for place in (recorded, near.absolute().parent / recorded.name):
        with suppress(OSError, ValueError):  # nothing there, or no path at all
            found = Artifact.open(place, entry["kind"])
            if found.id == entry["id"]:
                return found
    return None


@dataclass(frozen=True)
class Figure:
    """One result of a stage, in words."""

    stage: str
    name: str
    value: str


def figures(steps: Iterable[Step]) -> list[Figure]:
    """The results of every step whose artifact is there, nearest first."""
    return [Figure(step.kind, name, value) for step in steps for name, value in _of(step)]


def _of(step: Step) -> list[tuple[str, str]]:
    summary, found = step.summary, []
    if step.kind == "lora":
        first, last = number(summary.get("initial_loss")), number(summary.get("loss"))
        if last is not None:
            before = "" if first is None else f"{first:.3f} → "
            found.append(("validation loss, nats per token", f"{before}{last:.3f}"))
            before = "" if first is None else f"{_perplexity(first)} → "
            found.append(("validation perplexity", f"{before}{_perplexity(last)}"))
        if (steps := number(summary.get("steps"))) is not None:
            found.append(("optimizer steps", f"{steps:,.0f}"))
    elif step.kind == "transfer":
        layers = layer_figures(summary)
        for key, name in (("relative_mse", "attention error"), ("relative_window_mse", "error of the window alone")):
            errors = [layer[key] for layer in layers.values() if key in layer]
            if errors:
                worst = max(errors)
                found.append((f"{name}, mean of the layers", f"{sum(errors) / len(errors):.2%} (worst {worst:.1%})"))
        off = [layer["heads_off"] for layer in layers.values() if "heads_off" in layer]
        if off:
            found.append(("heads that use their window alone", f"{sum(off):.0f}"))
    elif step.kind == "capture" and step.artifact is not None:
        tokens = step.artifact.data.get("tokens")
        if isinstance(tokens, dict):
            found.append(("tokens for training and validation", " and ".join(f"{n:,}" for n in tokens.values())))
    elif step.kind == "student" and (folded := number(summary.get("folded"))) is not None:
        found.append(("modules with an adapter folded in", f"{folded:.0f}"))
    return found


def _perplexity(nats: float) -> str:
    return f"{math.exp(nats):.4g}" if nats < 700 else "over 1e304"


def transfer_summary(steps: Iterable[Step]) -> dict[str, Any]:
    """The summary that holds the transfer's figures by layer: the transfer's own, or LoRA's, which repeats them."""
    known = {step.kind: step.summary for step in steps if isinstance(step.summary.get("layers"), dict)}
    return known.get("transfer") or known.get("lora") or {}


def layer_figures(summary: dict[str, Any]) -> dict[int, dict[str, float]]:
    """The finite numbers of every layer of a transfer's summary, by layer and name."""
    layers = summary.get("layers")
    given = layers if isinstance(layers, dict) else {}
    named = {int(layer): values for layer, values in given.items() if layer.isdecimal() and isinstance(values, dict)}
    return {
        layer: {name: found for name, value in named[layer].items() if (found := number(value)) is not None}
        for layer in sorted(named)
    }


def head_errors(summary: dict[str, Any]) -> dict[int, list[float]]:
    """The relative squared error of every head, by layer. Layers without these figures are left out."""
    layers = summary.get("layers")
    found = layers if isinstance(layers, dict) else {}
    errors = {
        int(layer): [number(value) for value in values["head_relative_mse"]]
        for layer, values in found.items()
        if layer.isdecimal() and isinstance(values, dict) and isinstance(values.get("head_relative_mse"), list)
    }
    return {layer: [math.nan if e is None else e for e in errors[layer]] for layer in sorted(errors)}


def number(value: Any) -> float | None:
    """A finite number, unchanged; None for everything else, also for the strings that stand for NaN and infinity."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
