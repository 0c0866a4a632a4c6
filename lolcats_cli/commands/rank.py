"""lolcats rank"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.commands._tables import table


def rank(
    capture: o.ArtifactIn,
    heads: Annotated[bool, typer.Option("--heads", help="Measure every key head alone too, with one window.")] = False,
    teacher: o.Teacher = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
) -> dict[str, Any]:
    """Show which layers the teacher's predictions need to see far back: what is lost if one sees a window alone.

    `transfer --windows auto`, `--keep-softmax auto:N` and `heads:N` measure the same.
    """
    asked = locals()
    given = o.artifact_path(capture)
    opened = checks.artifact(given, "capture", teacher, needs_teacher=True)

    from lolcats_cli.evaluation.importance import rank_capture
    from lolcats_cli.teacher.load import LoadOptions

    found = rank_capture(opened, heads, teacher, o.chosen(LoadOptions(), asked), o.progress())
    return {"path": given, **found}


def show(found: dict[str, Any], as_json: bool) -> None:
    """What `rank` found, as tables or as JSON; the layer that loses most comes first."""
    if as_json:
        print(json.dumps(found))
        return
    order = sorted(found["layers"], key=lambda layer: -sum(found["layers"][layer]))
    rows = [["layer", *(f"window {window}" for window in found["windows"])]]
    rows += [[layer, *(f"{loss:.3g}" for loss in found["layers"][layer])] for layer in order]
    print(table(rows))
    if "heads" in found:
        most = max(map(len, found["heads"].values()))
        rows = [[f"window {found['heads_window']}", *(f"key head {head}" for head in range(most))]]
        rows += [[f"layer {layer}", *_padded(found["heads"][layer], most)] for layer in order]
        print(table(rows))
    print(f"nats per token that the teacher loses, measured on {found['tokens']:,} tokens")


def _padded(losses: list[float], count: int) -> list[str]:
    return [f"{loss:.3g}" for loss in losses] + ["-"] * (count - len(losses))
