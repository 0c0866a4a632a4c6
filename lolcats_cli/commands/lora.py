"""lolcats lora"""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from lolcats_formats import Artifact

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.errors import UsageError
from lolcats_cli.stages.lora_options import RECIPES, check_processes, in_full


def lora(
    transfer: o.ArtifactIn,
    output: o.Output,
    recipe: Annotated[
        Literal["best", "lolcats"],
        typer.Option(help="Defaults of --train-maps, --grad-accum, --lr and --eval-steps; lolcats: the paper's."),
    ] = "best",
    rank: Annotated[int, typer.Option(min=1, help="LoRA's r.")] = 8,
    alpha: Annotated[
        float, typer.Option(callback=o.positive, help="LoRA's alpha; its update is scaled by alpha / r.")
    ] = 16.0,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="LoRA's dropout.")] = 0.0,
    targets: Annotated[
        str | None,
        typer.Option(help="Modules that get an adapter: a,b,c. By default all projections of the attentions."),
    ] = None,
    train_maps: Annotated[
        bool | None, typer.Option("--train-maps/--freeze-maps", help="Train the feature maps too (best), or not.")
    ] = None,
    match: Annotated[
        Literal["text", "teacher"],
        typer.Option(
            help="Train on the text's next tokens, or on the teacher's predictions: those that the capture stores "
            "(--store-logits), else the teacher runs along."
        ),
    ] = "text",
    match_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="With --match teacher: its share of the loss, of which the text has the rest. 1 if not given.",
        ),
    ] = None,
    full_attention: Annotated[
        bool,
        typer.Option(
            "--full-attention",
            help="Train all of the attentions' projections (--targets) instead of an adapter: for 100 M tokens and "
            "more. 16 bytes of memory a weight.",
        ),
    ] = False,
    loss_on: Annotated[
        Literal["all", "completion"],
        typer.Option(help="Train on all tokens, or only on the answers to prompts and the assistant's turns."),
    ] = "all",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Train on this instead of the capture's tokens: a capture, or data as for capture (repeatable)."
        ),
    ] = None,
    seq_len: o.SeqLen = 1024,
    samples: Annotated[int | None, typer.Option(min=2, help="The most rows to take of --data.")] = None,
    pack: o.Pack = True,
    format: o.Format = "auto",
    template: o.Template = "auto",
    text_field: o.TextField = "text",
    subset: o.Subset = None,
    split: o.Split = "train",
    on_bad_row: o.OnBadRow = "error",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 1,
    grad_accum: Annotated[
        int | None,
        typer.Option(min=1, help="Forward passes per optimizer step: 2, 8 (lolcats), or 48 (--full-attention)."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of --epochs.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="AdamW's learning rate: 5e-4, 1e-4 (lolcats), or 1e-5 (--full-attention)."),
    ] = None,
    schedule: Annotated[
        Literal["plateau", "linear"],
        typer.Option(help="Lower --lr when the validation loss stops falling, or linearly to 0."),
    ] = "plateau",
    eval_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimizer steps between validations: 400, or 100 (lolcats, --full-attention)."),
    ] = None,
    teacher: o.Teacher = None,
    trust_remote_code: o.TrustRemoteCode = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    devices: o.Devices = None,
    device_map: o.DeviceMap = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Keep no layer's activations for the backward pass: less memory, a third more time.",
        ),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Spread the teacher's weights over the processes of --devices or torchrun (FSDP2)."
        ),
    ] = False,
    log_to: Annotated[
        Literal["tensorboard", "wandb", "trackio"] | None,
        typer.Option(
            help="Show the losses there too. TensorBoard's files go to OUTPUT-runs, or TENSORBOARD_LOGGING_DIR."
        ),
    ] = None,
    seed: o.Seed = 0,
    resume: o.Resume = "auto",
    force: o.Force = False,
) -> Artifact:
    """Train a LoRA adapter end to end on next-token loss, with the transferred attentions in place."""
    asked = locals()
    given = o.artifact_path(transfer, data)
    checks.artifact(given, "transfer", teacher)
    checks.data(data, captures=True)
    checks.output(output, "lora", resume, force, (given, *(data or ())))
    checks.tracker(log_to)
    if match_weight is not None and match == "text":
        raise UsageError("--match-weight is for --match teacher. Give both, or leave it out.")
    if full_attention and (rank, alpha, dropout) != (8, 16.0, 0.0):
        raise UsageError("--rank, --alpha and --dropout are of an adapter, and --full-attention trains none.")
    names = None if targets is None else tuple(name.strip() for name in targets.split(","))
    if names is not None and not all(names):
        raise UsageError(f"--targets {targets} is not a list of names like q_proj,v_proj.")
    defaults = in_full(RECIPES[recipe]) if full_attention else RECIPES[recipe]
    options = o.chosen(defaults, asked | {"targets": names})
    o.launch_on(devices, given)
    check_processes(options, data, shard)

    from lolcats_cli.stages.lora import lora as run
    from lolcats_cli.teacher.load import LoadOptions
    from lolcats_cli.teacher.records import DataOptions

    return run(
        given,
        output,
        options=options,
        data=data,
        data_options=o.chosen(DataOptions(), asked),
        teacher=teacher,
        load=o.chosen(LoadOptions(), asked),
        gradient_checkpointing=gradient_checkpointing,
        log_to=log_to,
        resume=resume,
        force=force,
        progress=o.progress(),
    )
