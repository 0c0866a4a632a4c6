"""lolcats import"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from lolcats_formats import Artifact

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.teacher.identity import local_folder


def import_published(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file: feature maps, or a LoRA adapter.")],
    output: o.Output,
    teacher: o.Teacher = None,
    transfer: Annotated[str | None, typer.Option(help="For an adapter: the imported maps that it goes with.")] = None,
    feature_map: Annotated[Literal["hedgehog", "t2r"], typer.Option(help="The feature map.")] = "hedgehog",
    window: Annotated[int, typer.Option(min=0, help="Keys seen by softmax; 0 is pure linear attention.")] = 64,
    layout: Annotated[
        Literal["terraced", "sliding"], typer.Option(help="terraced: configurations named wtk; sliding: wsw.")
    ] = "terraced",
    linear_factor: Annotated[
        Literal["one", "affine"], typer.Option(help="affine: where affine_attention_factors was set.")
    ] = "one",
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha; twice its rank unless given.")] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    resume: o.Resume = "auto",
    force: o.Force = False,
) -> Artifact:
    """Take over a checkpoint of the LoLCATs authors' code: a transfer (with --teacher), or a LoRA (with --transfer)."""
    asked = locals()
    if not checkpoint.is_file():
        raise BadInput(f"The checkpoint {checkpoint} is not a file. Give the path of a .pt file.")
    if teacher is None and transfer is None:
        raise UsageError("Give --teacher MODEL for feature maps, or --transfer MAPS for a LoRA adapter.")
    if transfer is not None:
        checks.artifact(transfer, "transfer", teacher)
    elif teacher is not None:
        local_folder(teacher)
    checks.output(output, "transfer" if transfer is None else "lora", resume, force, (teacher, transfer))

    from lolcats_kernels import HybridConfig

    from lolcats_cli.stages.import_published import holds_adapter, import_adapter, import_maps
    from lolcats_cli.teacher.load import LoadOptions

    common: dict[str, Any] = {"resume": resume, "force": force, "progress": o.progress()}
    if holds_adapter(checkpoint):
        if transfer is None:
            raise UsageError(
                f"{checkpoint} holds a LoRA adapter. Give the maps that belong to it with --transfer MAPS."
            )
        return import_adapter(checkpoint, output, transfer, alpha=alpha, teacher=teacher, **common)
    if teacher is None:
        raise UsageError(f"{checkpoint} holds feature maps. Give the model that they belong to with --teacher MODEL.")
    hybrid, load = o.chosen(HybridConfig(), asked), o.chosen(LoadOptions(), asked)
    return import_maps(checkpoint, output, teacher, hybrid=hybrid, load=load, **common)
