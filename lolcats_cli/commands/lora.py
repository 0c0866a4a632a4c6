"""lolcats lora"""

from __future__ import annotations

from typing import Annotated

import typer

from lolcats_cli.commands import _options as o


def lora(
    transfer: o.ArtifactIn,
    output: o.Output,
    rank: Annotated[int, typer.Option(min=1, help="LoRA's r.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA's alpha; its update is scaled by alpha / r.")] = 16.0,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="LoRA's dropout.")] = 0.0,
    targets: Annotated[str, typer.Option(help="Modules that get an adapter.")] = "q_proj,k_proj,v_proj,o_proj",
    train_maps: Annotated[bool, typer.Option("--train-maps", help="Train the feature maps too.")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Train on this instead of the capture's tokens: a capture, or data as for capture."),
    ] = None,
    seq_len: o.SeqLen = 1024,
    samples: Annotated[int | None, typer.Option(min=2, help="The most rows to take of --data.")] = None,
    template: o.Template = "auto",
    text_field: o.TextField = "text",
    split: o.Split = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 1,
    grad_accum: Annotated[int, typer.Option(min=1, help="Forward passes per optimizer step.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of --epochs.")] = None,
    lr: Annotated[float, typer.Option(min=0, help="AdamW's learning rate, reduced on plateau.")] = 1e-4,
    eval_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps between validations.")] = 100,
    teacher: o.Teacher = None,
    trust_remote_code: o.TrustRemoteCode = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    resume: o.Resume = "auto",
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Train a LoRA adapter end to end on next-token loss, with the transferred attentions in place."""
    given = o.artifact_path(transfer, data)

    from lolcats_cli.stages.lora import LoraOptions
    from lolcats_cli.stages.lora import lora as run
    from lolcats_cli.teacher.data import DataOptions
    from lolcats_cli.teacher.load import LoadOptions

    artifact = run(
        given,
        output,
        options=LoraOptions(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            targets=tuple(targets.split(",")),
            train_maps=train_maps,
            batch_size=batch_size,
            grad_accum=grad_accum,
            epochs=epochs,
            steps=steps,
            lr=lr,
            eval_steps=eval_steps,
            seed=seed,
        ),
        data=data,
        data_options=DataOptions(seq_len, True, template, text_field, split, samples=samples),
        teacher=teacher,
        load=LoadOptions(dtype, device, trust_remote_code),
        resume=resume,
        force=force,
        progress=o.progress(),
    )
    o.print_result(output, {"id": artifact.id, **artifact.summary}, json)
