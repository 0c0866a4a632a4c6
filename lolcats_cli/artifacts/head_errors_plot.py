"""The picture of a transfer: the error of every head, by layer and by the entropy of the attention that it imitates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lolcats_formats import Artifact

from lolcats_cli.errors import BadInput, UsageError

ENTROPY, ERROR = "head_entropy", "head_relative_mse"  # of a layer's figures in the summary


def plot(artifact: Artifact, file: Path) -> None:
    """Draws a transfer's figures into `file`. The end of its name tells the format.

    Raises:
        UsageError: matplotlib is not installed, or does not know the format.
        BadInput: the artifact is not a transfer, or has no figures by head.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib. Install it with: pip install 'lolcats[plot]'.") from error

    if artifact.kind != "transfer":
        raise BadInput(f"--plot shows a transfer's error, and {artifact.path} is a {artifact.kind} artifact.")
    found = artifact.summary.get("layers", {})
    layers = {layer: found[str(layer)] for layer in range(len(artifact.teacher["layers"])) if str(layer) in found}
    heads = [[len(figures.get(name, ())) for name in (ENTROPY, ERROR)] for figures in layers.values()]
    if not layers or not all(entropies == errors > 0 for entropies, errors in heads):
        raise BadInput(
            f"{artifact.path} does not hold the error and the attention entropy of every head. It, or its capture, was "
            "made by an earlier lolcats. Make both again."
        )
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    if file.suffix.removeprefix(".").lower() not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"--plot {file}: The name must end in the format of a picture, such as .png, .svg or .pdf.")
    scatter, grid = figure.subplots(1, 2)

    colors = matplotlib.colormaps["viridis"].resampled(len(layers))
    for place, (layer, figures) in enumerate(layers.items()):
        scatter.scatter(_floats(figures[ENTROPY]), _floats(figures[ERROR]), s=22, color=colors(place), label=layer)
    scatter.set(xlabel="entropy of the softmax attention (nats)", ylabel="squared error / output's power", yscale="log")
    scatter.legend(title="layer", fontsize="small", ncols=1 + len(layers) // 12, loc="best")
    scatter.set_title("every head", fontsize="medium")

    errors = [_floats(figures[ERROR]) for figures in layers.values()]
    width = max(map(len, errors))
    image = grid.imshow(
        [row + [float("nan")] * (width - len(row)) for row in errors], norm="log", cmap="viridis", aspect="auto"
    )
    shown = range(0, len(layers), 1 + len(layers) // 16)
    grid.set_yticks(shown, [list(layers)[place] for place in shown])
    grid.set(xlabel="head", ylabel="layer")
    grid.set_title("squared error / output's power", fontsize="medium")
    figure.colorbar(image, ax=grid)
    figure.suptitle(f"{artifact.path.name}, {artifact.id[:12]}", fontsize="medium")
    figure.savefig(file, dpi=150)


def _floats(values: list[Any]) -> list[float]:
    """The values as numbers. A manifest writes NaN and infinities as words."""
    return [float(value) for value in values]
