"""lolcats rank"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.commands._tables import table
from lolcats_cli.errors import UsageError


def rank(
    artifact: o.ArtifactIn,
    heads: Annotated[
        bool, typer.Option("--heads", help="Of a capture, measure every key head alone too, with one window.")
    ] = False,
    teacher: o.Teacher = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
) -> dict[str, Any]:
    """Show where to spend: what the teacher's predictions lose by each layer.

    Of a capture: what is lost if a layer is converted, with several windows, before its maps are trained. `transfer
    --windows auto`, `--feature-dims auto`, `--keep-softmax auto:N` and `heads:N` measure the same. Of a transfer: what
    each converted layer costs, alone and beside the others.
    """
    asked = locals()
    given = o.artifact_path(artifact)
    opened = checks.artifact(given, ("capture", "transfer"), teacher, needs_teacher=True)
    if heads and opened.kind == "transfer":
        raise UsageError(f"--heads measures a capture, and {given} holds a transfer. Give its capture.")

    from lolcats_cli.stages.importance import rank_capture, rank_transfer
    from lolcats_cli.teacher.load import LoadOptions

    load = o.chosen(LoadOptions(), asked)
    if opened.kind == "transfer":
        return {"path": given, **rank_transfer(opened, teacher, load, o.progress())}
    return {"path": given, **rank_capture(opened, heads, teacher, load, o.progress())}


def show(found: dict[str, Any], as_json: bool) -> None:
    """What `rank` found, as tables or as JSON; the layer that loses most comes first."""
    if as_json:
        print(json.dumps(found))
    elif "all" in found:
        _show_transfer(found)
    else:
        _show_capture(found)


def _show_transfer(found: dict[str, Any]) -> None:
    order = sorted(found["layers"], key=lambda layer: -found["layers"][layer]["alone"])
    rows = [["layer", "converted alone", "all others converted"]]
    rows += [[layer, *(f"{found['layers'][layer][which]:.3g}" for which in ("alone", "others"))] for layer in order]
    print(table(rows))
    print(
        f"nats per token that the teacher loses, measured on {found['tokens']:,} tokens. All {len(order)} converted "
        f"layers cost {found['all']:.3g}."
    )


def _show_capture(found: dict[str, Any]) -> None:
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
