"""lolcats inspect"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lolcats_cli.commands import _options as o
from lolcats_cli.commands._tables import table
from lolcats_cli.progress import printable


def inspect(
    artifact: o.ArtifactIn,
    layer: Annotated[int | None, typer.Option(min=0, help="Show this layer's tensors and figures.")] = None,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="Show every artifact it was made from, also those not found here.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a transfer's error by layer and head, against entropy: out.png.")
    ] = None,
) -> dict[str, Any]:
    """Show what an artifact is: kind, lineage, layers, shapes, bytes, figures. Reads no weights.

    docs/glossary.md explains the figures.
    """
    from lolcats_formats import Artifact

    from lolcats_cli.artifacts.describe import describe, describe_layer, describe_lineage
    from lolcats_cli.errors import UsageError

    if lineage and layer is not None:
        raise UsageError("--lineage and --layer cannot be used together. Choose one.")
    opened = Artifact.open(o.artifact_path(artifact))
    if plot is not None:
        from lolcats_cli.artifacts.head_errors_plot import plot as draw

        draw(opened, plot)
    if lineage:
        teacher = {key: value for key, value in opened.teacher.items() if key != "layers"}
        return {"lineage": describe_lineage(opened), "teacher": teacher, "data": opened.data}
    return describe(opened) if layer is None else describe_layer(opened, layer)


def show(found: dict[str, Any], as_json: bool) -> None:
    """Prints the results of `inspect`, as indented text or as JSON."""
    print(json.dumps(found) if as_json else "\n".join(_lines(found)))


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    """A nested dict as indented text; lists of records as tables."""
    lines = []
    width = max(map(len, value), default=0)
    for name, item in value.items():
        key = printable(name)
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}", *_lines(item, indent + "  ")]
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            header = list(dict.fromkeys(name for row in item for name in row))
            rows = [header, *([_cell(row.get(name)) for name in header] for row in item)]
            lines += [f"{indent}{key}", table(rows, numbers=False, indent=indent + "  ")]
        else:
            lines.append(f"{indent}{key:<{width}}  {_cell(item)}")
    return lines


def _cell(item: object) -> str:
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, float):
        return f"{item:.0f}" if 1000 <= abs(item) < 1e9 else f"{item:.4g}"
    if isinstance(item, list):
        return printable(", ".join(map(str, item))) or "-"
    return "-" if item is None or item == {} else printable(str(item))
