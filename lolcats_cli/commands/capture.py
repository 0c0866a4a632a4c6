"""lolcats capture"""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from lolcats_formats import Artifact

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.errors import UsageError
from lolcats_cli.teacher.identity import local_folder


def capture(
    teacher: Annotated[str, typer.Argument(help="A model folder, or a hub id.")],
    data: Annotated[
        list[str],
        typer.Argument(help="Files of text, JSON, CSV, TSV or Parquet, folders, patterns, - for stdin, hub datasets."),
    ],
    output: o.Output,
    seq_len: o.SeqLen = 1024,
    pack: o.Pack = True,
    samples: Annotated[
        str | None, typer.Option(help="The most rows to take, or a range such as 1000-1999, for `join`.")
    ] = None,
    store: Annotated[
        Literal["auto", "attention", "block", "tokens"],
        typer.Option(
            help="What to keep: every layer's q, k and v; the hidden states before every block of layers; or tokens. "
            "auto: the first of attention, tokens, block that fits the disk and the device's memory."
        ),
    ] = "auto",
    block_size: Annotated[int | None, typer.Option(min=1, help="Layers in each block, with --store block: 8.")] = None,
    disk: o.Disk = None,
    memory: o.Memory = None,
    store_dtype: Annotated[
        Literal["teacher", "float8_e4m3"],
        typer.Option(
            help="How --store attention keeps q, k and v: in the teacher's dtype, or in 8 bits and a scale per head."
        ),
    ] = "teacher",
    store_logits: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also keep the teacher's N likeliest next tokens, which lora --match teacher then takes instead of "
            "running the teacher: 6 N bytes a token. 32 is a good number.",
        ),
    ] = None,
    statistics: Annotated[
        Literal["sample", "all", "none"],
        typer.Option(help="Measure the attention of one row in 16, of all rows, or of none."),
    ] = "sample",
    select: Annotated[
        Literal["top-esl"] | None,
        typer.Option(help="Of these rows, capture the --keep whose attention looks back farthest (effective length)."),
    ] = None,
    keep: Annotated[int | None, typer.Option(min=2, help="How many rows --select takes.")] = None,
    val_fraction: Annotated[float, typer.Option(min=0.0, max=0.5, help="Part of the rows kept for validation.")] = 0.05,
    format: o.Format = "auto",
    template: o.Template = "auto",
    text_field: o.TextField = "text",
    subset: o.Subset = None,
    split: o.Split = "train",
    on_bad_row: o.OnBadRow = "error",
    dtype: o.Dtype = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    revision: Annotated[str | None, typer.Option(help="The hub revision of the teacher.")] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    devices: o.Devices = None,
    seed: o.Seed = 0,
    resume: o.Resume = "auto",
    force: o.Force = False,
) -> Artifact:
    """Record the inputs of the teacher's attentions: each layer's queries, keys and values, or what recomputes them."""
    asked = locals()
    first, count = o.parse_samples(samples)
    space, device_memory = o.parse_size(disk, "--disk"), o.parse_size(memory, "--memory")
    if block_size and store != "block":
        raise UsageError("--block-size is for --store block. --store auto chooses the largest blocks that fit.")
    if (space or device_memory) and store != "auto":
        raise UsageError(f"--disk and --memory are for --store auto. Leave out these options, or --store {store}.")
    if (select is None) != (keep is None):
        raise UsageError("--select and --keep need each other. Give both, as in --select top-esl --keep 1000.")
    if store_dtype != "teacher" and store != "attention":
        raise UsageError(f"--store-dtype {store_dtype} needs --store attention. Give it, or leave out --store-dtype.")
    local_folder(teacher)
    checks.data(data)
    checks.output(output, "capture", resume, force)
    o.launch_on(devices)

    from lolcats_cli.stages.capture import capture as run
    from lolcats_cli.teacher.load import LoadOptions
    from lolcats_cli.teacher.records import DataOptions

    return run(
        teacher,
        data,
        output,
        options=o.chosen(DataOptions(), asked | {"first": first, "samples": count}),
        load=o.chosen(LoadOptions(), asked),
        store=store,
        block_size=block_size,
        disk=space,
        memory=device_memory,
        store_dtype=store_dtype,
        store_logits=store_logits,
        statistics=statistics,
        revision=revision,
        keep=keep,
        val_fraction=val_fraction,
        batch_size=batch_size,
        seed=seed,
        resume=resume,
        force=force,
        progress=o.progress(),
    )
