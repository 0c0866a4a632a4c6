"""lolcats report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o


def report(
    student: Annotated[
        str,
        typer.Argument(help="A merged folder, a LoRA or a transfer artifact, or - to read its path from stdin."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out data, as for capture (repeatable). With it the student and its teacher are run and compared."
        ),
    ] = None,
    seq_len: o.SeqLen = 1024,
    samples: Annotated[int, typer.Option(min=1, help="The most rows to take of --data.")] = 64,
    recall: Annotated[int, typer.Option(min=0, help="Rows per recall distance; 0 leaves recall out.")] = 32,
    pack: o.Pack = True,
    format: o.Format = "auto",
    template: o.Template = "auto",
    text_field: o.TextField = "text",
    subset: o.Subset = None,
    split: o.Split = "train",
    on_bad_row: o.OnBadRow = "error",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 4,
    teacher: o.Teacher = None,
    trust_remote_code: o.TrustRemoteCode = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    device_map: o.DeviceMap = None,
    seed: o.Seed = 0,
) -> Path:
    """Write one HTML page about a student: lineage, curves, errors by head, memory.

    Without --data no model is run, and the page is made within seconds. With it the page also compares perplexity,
    recall, samples and decoding speed with the teacher's.
    """
    asked = locals()

    from lolcats_formats import Artifact, atomic

    from lolcats_cli.errors import UsageError

    given = o.artifact_path(student, data)
    if "-" in (data or ()):
        raise UsageError("`lolcats report` reads --data twice, so it cannot come from stdin. Name a file.")
    opened = Artifact.open(given, ("transfer", "lora", "student"))
    if data:
        checks.model(given, teacher)
        checks.data(data)
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder. Give the path of a file for the page.")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: The folder of this file does not exist. Make it first.")

    from lolcats_cli.reporting.page import page

    measured = None
    if data:
        from lolcats_cli.reporting.measure import measure
        from lolcats_cli.teacher.load import LoadOptions
        from lolcats_cli.teacher.records import DataOptions

        measured = measure(
            opened,
            data,
            options=o.chosen(DataOptions(), asked),
            recall_count=recall,
            batch_size=batch_size,
            teacher=teacher,
            load=o.chosen(LoadOptions(), asked),
            seed=seed,
            progress=o.progress(),
        )
    atomic.write(output, [page(opened, measured).encode()])
    return output
